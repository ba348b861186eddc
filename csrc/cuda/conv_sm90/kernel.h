// What a thread of the Hopper convolution does, on any machine.
//
// Two threads fetch: one the strips of pixels, one the weights of the taps, each into a ring of
// stages, which other CTAs of its cluster may fill as well. Two warpgroups multiply: each holds 64
// or 128 pixels of the tile by all of its output channels, in fp32. CTAs loop over tiles, so that
// the next tile is fetched under the epilogue, as far as the rings have room. Where the warpgroups
// take turns, each has a tile of its own: the next tile is multiplied under the epilogue as well.
// CTAs of a cluster may share a tile: each then loops over a part of its terms.
//
// The machine is a class: that of device.cuh issues the instructions of sm_90a, that of the tests
// simulates them.
#pragma once

#include "../../math.h"
#include "epilogue.h"
#include "epilogue_e4m3.h"
#include "layout.h"
#include "parts.h"
#include "thread.h"

namespace vovnet_fast {
namespace conv_sm90 {

template <class Machine>
VF_THREAD void initialise_barriers(Machine& m, const Problem& p) {
  for (int i = 0; i < p.x_stages; ++i) {
    m.initialise(strip_full(p, i), 1);
    m.initialise(strip_free(p, i), warps_of_tile(p) * p.cluster_channels);
  }
  for (int i = 0; i < p.w_stages; ++i) {
    m.initialise(weights_full(p, i), 1);
    m.initialise(weights_free(p, i), warps_of_tile(p) * p.cluster_pixels);
  }
  if (p.parts > 1) {
    m.initialise(handed_full(p), kConsumerWarps * p.parts);
    m.initialise(handed_free(p), kConsumerWarps * p.parts);
  }
  if (p.turns != 0) {
    for (int i = 0; i < kConsumers; ++i) m.initialise(turn_of(p, i), warps_of_tile(p));
  }
}

// Which of the sharers fetches: one after the other.
struct Turn {
  int next = 0;

  VF_HD bool take(int own, int count) {
    const bool mine = next == own;
    next = next + 1 == count ? 0 : next + 1;
    return mine;
  }
};

// A stage is free when all sharers have read it; each then expects what one of them fetches.
template <class Machine>
VF_THREAD void fetch_strips(Machine& m, const Problem& p) {
  Ring ring(p.x_stages);
  Turn turn;
  const int pad = p.kernel / 2;
  const Terms terms = terms_of(p, m.rank());
  VF_NO_UNROLL
  for (int index = m.cluster(); index < p.tiles; index += m.clusters()) {
    const Tile tile = tile_at(p, index, m.rank());
    VF_NO_UNROLL
    for (int column = over_kernel(p, terms.first); column * p.kernel < terms.end; ++column) {
      const int chunk = over_kernel(p, column), tap_column = column - chunk * p.kernel;
      const uint32_t full = strip_full(p, ring.stage);
      m.wait_free(strip_free(p, ring.stage), ring.parity ^ 1);
      m.expect(full, strip_bytes(p));
      // What lies outside the image, or beyond the last channel, arrives as zeros.
      if (turn.take(own_of_strips(p, m.rank()), p.cluster_channels)) {
        m.copy_strip(strip_at(p, ring.stage), full, chunk * p.chunk, tile.w + tap_column - pad,
                     tile.h - pad, tile.n, p.cluster_channels,
                     p.strip_sharers << first_of_strips(p, m.rank()));
      }
      ring.advance();
    }
  }
}

template <class Machine>
VF_THREAD void fetch_weights(Machine& m, const Problem& p) {
  Ring ring(p.w_stages);
  Turn turn;
  const int end = p.resident ? m.cluster() + 1 : p.tiles;
  const Terms terms = terms_of(p, m.rank());
  VF_NO_UNROLL
  for (int index = m.cluster(); index < end; index += m.clusters()) {
    const Tile tile = tile_at(p, index, m.rank());
    VF_NO_UNROLL
    for (int column = over_kernel(p, terms.first); column * p.kernel < terms.end; ++column) {
      const int chunk = over_kernel(p, column), tap_column = column - chunk * p.kernel;
      const Terms rows = rows_of(p, terms, column);
      VF_NO_UNROLL
      for (int tap_row = rows.first; tap_row < rows.end; ++tap_row) {
        const uint32_t full = weights_full(p, ring.stage);
        m.wait_free(weights_free(p, ring.stage), ring.parity ^ 1);
        m.expect(full, weight_bytes(p));
        if (turn.take(own_of_weights(p, m.rank()), p.cluster_pixels)) {
          m.copy_weights(weights_at(p, ring.stage), full, chunk * p.chunk,
                         tap_row * p.kernel + tap_column, tile.first, p.cluster_pixels,
                         p.weight_sharers << first_of_weights(p, m.rank()));
        }
        ring.advance();
      }
    }
  }
}

// The ranks whose barriers a lane arrives at, if there are so many sharers.
struct Readers {
  int strips, weights;

  VF_HD Readers(const Problem& p, int rank, int lane)
      : strips(first_of_strips(p, rank) + lane * p.cluster_pixels),
        weights(first_of_weights(p, rank) + lane) {}
};

template <class Machine>
VF_THREAD void free_strip(Machine& m, const Problem& p, const Readers& readers, int stage) {
  m.free(strip_free(p, stage), p.cluster_channels, readers.strips);
}

template <class Machine>
VF_THREAD void free_weights(Machine& m, const Problem& p, const Readers& readers, int stage) {
  if (!p.resident) m.free(weights_free(p, stage), p.cluster_pixels, readers.weights);
}

// Issue the products of a tap and STEPS * 32 bytes of input channels.
template <class T, int N, int BLOCKS, int STEPS, class Machine>
VF_THREAD void multiply_add(Machine& m, float (&sums)[BLOCKS][N / 2], uint64_t a, uint64_t b,
                            bool started) {
  m.begin_products();
  VF_UNROLL
  for (int step = 0; step < STEPS; ++step) {
    const uint64_t along = step * descriptor_offset(kStepBytes);
    VF_UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      const uint64_t down = block * descriptor_offset(kBlockRows * kRowBytes);
      m.template multiply_add<T, N>(sums[block], a + down + along, b + along, started || step > 0);
    }
  }
  m.commit_products();
}

// The loop over the taps and input channels of a tile, or of a part of it. The products of one tap
// are still under way when those of the next are issued; what a tap read is free one tap later.
template <class T, int N, int BLOCKS, class Machine>
VF_THREAD void multiply(Machine& m, const Problem& p, const Readers& readers, Ring& strips,
                        Ring& weights, float (&sums)[BLOCKS][N / 2]) {
  const int consumer = p.turns != 0 ? 0 : m.thread() / kWarpgroup - 1;
  constexpr bool kParts = has_parts(N, BLOCKS);
  const Terms all = {0, p.chunks * p.kernel * p.kernel};
  const Terms terms = kParts ? terms_of(p, m.rank()) : all;
  bool started = false;
  for (int column = over_kernel(p, terms.first); column * p.kernel < terms.end; ++column) {
    const int steps = steps_of(p, over_kernel(p, column));
    const Terms rows = kParts ? rows_of(p, terms, column) : Terms{0, p.kernel};
    m.wait(strip_full(p, strips.stage), strips.parity);
    for (int tap_row = rows.first; tap_row < rows.end; ++tap_row) {
      m.wait(weights_full(p, weights.stage), weights.parity);
      const uint64_t a = m.operand(pixels_at(p, strips.stage, consumer, BLOCKS, tap_row));
      const uint64_t b = m.operand(weights_at(p, weights.stage));
      switch (steps) {  // Unrolled, as WGMMAs that follow each other need no wait in between.
        case 4:
          multiply_add<T, N, BLOCKS, 4>(m, sums, a, b, started);
          break;
        case 3:
          multiply_add<T, N, BLOCKS, 3>(m, sums, a, b, started);
          break;
        case 2:
          multiply_add<T, N, BLOCKS, 2>(m, sums, a, b, started);
          break;
        default:
          multiply_add<T, N, BLOCKS, 1>(m, sums, a, b, started);
      }
      m.template wait_products<1>();
      if (started) {
        free_weights(m, p, readers, weights.previous());
        if (tap_row == rows.first) free_strip(m, p, readers, strips.previous());
      }
      started = true;
      weights.advance();
    }
    strips.advance();
  }
  // The other's products follow those that are under way. Whatever was waited for here had arrived:
  // the other meets every stage in the phase that it counts.
  if (p.turns != 0) m.free(turn_of(p, kConsumers - m.thread_again() / kWarpgroup), 1, 0);
  m.template wait_products<0>();
  free_weights(m, p, readers, weights.previous());
  free_strip(m, p, readers, strips.previous());
}

// The same in e4m3, of whose products Hopper's tensor cores keep some 14 bits while they add them
// up (DeepSeek-V3 Technical Report, arXiv:2412.19437, sections 3.3.2 and 3.5.2). So what one tap
// and one chunk of 128 channels contribute is summed from zero, by at most four WGMMAs, and added
// to fp32 sums in registers; CUTLASS does so after as many by default (mma_promotion_interval of
// its GmmaFP8Accumulation). Blocks take turns with the registers of the products: while a warpgroup
// adds, it is the other one that multiplies.
template <int N, int BLOCKS, class Machine>
VF_THREAD void multiply_e4m3(Machine& m, const Problem& p, Ring& strips, Ring& weights,
                             float (&sums)[BLOCKS][N / 2]) {
  const int consumer = m.thread() / kWarpgroup - 1;
  const Terms all = {0, p.chunks * p.kernel * p.kernel};
  const Terms terms = has_parts_e4m3(N, BLOCKS) ? terms_of(p, m.rank()) : all;
  VF_UNROLL
  for (int block = 0; block < BLOCKS; ++block) {
    VF_UNROLL
    for (int i = 0; i < N / 2; ++i) sums[block][i] = 0;
  }
  VF_NO_UNROLL
  for (int term = terms.first; term < terms.end; ++term) {
    const int column = over_kernel(p, term), tap_row = term - column * p.kernel;
    m.wait(strip_full(p, strips.stage), strips.parity);
    m.wait(weights_full(p, weights.stage), weights.parity);
    const uint64_t a = m.operand(pixels_at(p, strips.stage, consumer, BLOCKS, tap_row));
    const uint64_t b = m.operand(weights_at(p, weights.stage));
    const int steps = steps_of(p, over_kernel(p, column));
    VF_UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      float products[1][N / 2];
      const uint64_t down = block * descriptor_offset(kBlockRows * kRowBytes);
      switch (steps) {
        case 4:
          multiply_add<Float8, N, 1, 4>(m, products, a + down, b, false);
          break;
        case 3:
          multiply_add<Float8, N, 1, 3>(m, products, a + down, b, false);
          break;
        case 2:
          multiply_add<Float8, N, 1, 2>(m, products, a + down, b, false);
          break;
        default:
          multiply_add<Float8, N, 1, 1>(m, products, a + down, b, false);
      }
      m.template wait_products<0>();
      m.settle(products[0]);
      VF_UNROLL
      for (int i = 0; i < N / 2; ++i) sums[block][i] += products[0][i];
    }
    // Which others read the same is found out again: nothing is kept in registers for it.
    const Readers readers(p, m.rank(), m.thread_again() % kWarp);
    free_weights(m, p, readers, weights.stage);
    weights.advance();
    if (tap_row + 1 == p.kernel || term + 1 == terms.end) {
      free_strip(m, p, readers, strips.stage);
      strips.advance();
    }
  }
}

// One thread of the kernel. BLOCKS: of 64 pixels, that a warpgroup multiplies.
template <class T, int N, int BLOCKS, class Machine>
VF_THREAD void run_thread(Machine& m, const Problem& p) {
  if (m.thread() == 0) {
    initialise_barriers(m, p);
    m.publish_barriers();
  }
  const bool clustered = cluster_size(p) > 1;
  if (clustered) {
    m.synchronise_cluster();
  } else {
    m.synchronise();
  }
  if (m.thread() < kWarpgroup) {
    m.shrink_registers();
    if (m.thread() == 0) fetch_strips(m, p);
    if (m.thread() == kWarp) fetch_weights(m, p);
  } else {
    m.grow_registers();
    const Readers readers(p, m.rank(), m.thread() % kWarp);
    Ring strips(p.x_stages), weights(p.w_stages, p.resident);
    [[maybe_unused]] uint32_t parity = 0;  // Of the rows that parts hand over.
    int number = 0;
    for (int index = m.cluster(); index < p.tiles; index += m.clusters(), ++number) {
      if (!kIsE4m3<T> && p.turns != 0) {
        // Both pass all tiles: which it is does not depend on the thread, but for what is uniform.
        const int warpgroup = m.uniform(m.thread_again() / kWarpgroup - 1);
        if (number % kConsumers != warpgroup) {
          strips.skip(p.chunks * p.kernel);
          weights.skip(p.chunks * p.kernel * p.kernel);
          continue;
        }
        // The very first turn is nobody's to give.
        m.wait(turn_of(p, warpgroup), (number / kConsumers + warpgroup + 1) & 1);
      }
      float sums[BLOCKS][N / 2];
      if constexpr (kIsE4m3<T>) {
        multiply_e4m3<N, BLOCKS>(m, p, strips, weights, sums);
      } else {
        multiply<T, N, BLOCKS>(m, p, readers, strips, weights, sums);
      }
      if constexpr (kIsE4m3<T> ? has_parts_e4m3(N, BLOCKS) : has_parts(N, BLOCKS)) {
        if (p.parts > 1) {
          finish_part<T, N, BLOCKS>(m, p, tile_at(p, index, m.rank()), sums, parity);
          continue;
        }
      }
      const Tile tile = tile_at(p, index, m.rank());
      if constexpr (kIsE4m3<T>) {
        finish_e4m3<N, BLOCKS>(m, p, tile, sums);
      } else {
        finish<T, N, BLOCKS>(m, p, tile, sums);
      }
    }
  }
  // Others of the cluster still arrive at barriers of this CTA.
  if (clustered) m.synchronise_cluster();
}

}  // namespace conv_sm90
}  // namespace vovnet_fast
