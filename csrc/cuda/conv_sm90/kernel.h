// What a thread of the Hopper convolution does, on any machine.
//
// Two threads fetch: one the strips of pixels, one the weights of the taps, each into a ring of
// stages. Two warpgroups multiply: each holds 64 or 128 pixels of the tile by all of its output
// channels, in fp32. CTAs loop over tiles, so that the next tile is fetched under the epilogue.
//
// The machine is a class: that of device.cuh issues the instructions of sm_90a, that of the tests
// simulates them.
#pragma once

#include "../../math.h"
#include "layout.h"

#ifdef __CUDACC__
#define VF_THREAD __device__ __forceinline__
#define VF_UNROLL _Pragma("unroll")
#else
#define VF_THREAD inline
#define VF_UNROLL
#endif

namespace vovnet_fast {
namespace conv_sm90 {

template <class Machine>
VF_THREAD void initialise_barriers(Machine& m, const Problem& p) {
  for (int i = 0; i < p.x_stages; ++i) {
    m.initialise(strip_full(p, i), 1);
    m.initialise(strip_free(p, i), kConsumerWarps);
  }
  for (int i = 0; i < p.w_stages; ++i) {
    m.initialise(weights_full(p, i), 1);
    m.initialise(weights_free(p, i), kConsumerWarps);
  }
}

template <class Machine>
VF_THREAD void fetch_strips(Machine& m, const Problem& p) {
  Ring ring(p.x_stages);
  const int pad = p.kernel / 2;
  for (int index = m.cta(); index < p.tiles; index += m.ctas()) {
    const Tile tile = tile_at(p, index);
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      for (int tap_column = 0; tap_column < p.kernel; ++tap_column) {
        const uint32_t full = strip_full(p, ring.stage);
        m.wait(strip_free(p, ring.stage), ring.parity ^ 1);
        m.expect(full, strip_bytes(p));
        // What lies outside the image, or beyond the last channel, arrives as zeros.
        m.copy_strip(strip_at(p, ring.stage), full, chunk * kChunk, tile.w + tap_column - pad,
                     tile.h - pad, tile.n);
        ring.advance();
      }
    }
  }
}

template <class Machine>
VF_THREAD void fetch_weights(Machine& m, const Problem& p) {
  Ring ring(p.w_stages);
  for (int index = m.cta(); index < p.tiles; index += m.ctas()) {
    const Tile tile = tile_at(p, index);
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      for (int tap_column = 0; tap_column < p.kernel; ++tap_column) {
        for (int tap_row = 0; tap_row < p.kernel; ++tap_row) {
          const uint32_t full = weights_full(p, ring.stage);
          m.wait(weights_free(p, ring.stage), ring.parity ^ 1);
          m.expect(full, weight_bytes(p));
          m.copy_weights(weights_at(p, ring.stage), full, chunk * kChunk,
                         tap_row * p.kernel + tap_column, tile.first);
          ring.advance();
        }
      }
    }
  }
}

// Issue the products of a tap and STEPS * 16 input channels.
template <class T, int N, int BLOCKS, int STEPS, class Machine>
VF_THREAD void multiply_add(Machine& m, float (&sums)[BLOCKS][N / 2], uint64_t a, uint64_t b,
                            bool started) {
  m.begin_products();
  VF_UNROLL
  for (int step = 0; step < STEPS; ++step) {
    const uint64_t along = step * descriptor_offset(kStep * kElementBytes);
    VF_UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      const uint64_t down = block * descriptor_offset(kBlockRows * kRowBytes);
      m.template multiply_add<T, N>(sums[block], a + down + along, b + along, started || step > 0);
    }
  }
  m.commit_products();
}

// The loop over the taps and input channels of a tile. The products of one tap are still under way
// when those of the next are issued; what a tap read is free one tap later.
template <class T, int N, int BLOCKS, class Machine>
VF_THREAD void multiply(Machine& m, const Problem& p, Ring& strips, Ring& weights,
                        float (&sums)[BLOCKS][N / 2]) {
  const int consumer = m.thread() / kWarpgroup - 1;
  bool started = false;
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    const int steps = steps_of(p, chunk);
    for (int tap_column = 0; tap_column < p.kernel; ++tap_column) {
      m.wait(strip_full(p, strips.stage), strips.parity);
      for (int tap_row = 0; tap_row < p.kernel; ++tap_row) {
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
          m.arrive(weights_free(p, weights.previous()));
          if (tap_row == 0) m.arrive(strip_free(p, strips.previous()));
        }
        started = true;
        weights.advance();
      }
      strips.advance();
    }
  }
  m.template wait_products<0>();
  m.arrive(weights_free(p, weights.previous()));
  m.arrive(strip_free(p, strips.previous()));
}

// words[i] of lane q of four goes to words[q] of lane i.
template <class Machine>
VF_THREAD void transpose(Machine& m, uint32_t (&words)[4]) {
  const int lane = m.thread() % 4;
  VF_UNROLL
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool high = (lane & bit) != 0;
    VF_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int a = bit == 1 ? 2 * i : i, b = a + bit;
      const uint32_t received = m.shuffle_xor(high ? words[a] : words[b], bit);
      words[a] = high ? received : words[a];
      words[b] = high ? words[b] : received;
    }
  }
}

// Leave the sums of a tile's 8 * 4 columns, of the pixels of this warp, in shared memory.
template <class Machine>
VF_THREAD void leave_sums(Machine& m, const Problem& p, int column, int columns,
                          float (&sums)[4][2]) {
  const int thread = m.thread() - kWarpgroup;
  float* row = m.floats(sums_at(p)) + thread / kWarp * p.block_out + column + column_of(thread);
  VF_UNROLL
  for (int i = 0; i < 4; ++i) {
    VF_UNROLL
    for (int k = 0; k < 2; ++k) {
      float sum = sums[i][k];
      VF_UNROLL
      for (int lanes = 4; lanes < kWarp; lanes *= 2) sum += m.shuffle_xor(sum, lanes);
      if (thread % kWarp < 4 && i * 8 < columns) row[i * 8 + k] = sum;
    }
  }
}

// Add up what the warps left, in order.
template <class Machine>
VF_THREAD void store_partials(Machine& m, const Problem& p, const Tile& tile) {
  m.synchronise_consumers();
  const float* sums = m.floats(sums_at(p));
  for (int c = m.thread() - kWarpgroup; c < p.block_out; c += kConsumers * kWarpgroup) {
    float sum = 0;
    for (int warp = 0; warp < kConsumerWarps; ++warp) sum += sums[warp * p.block_out + c];
    p.pool_partials[tile.partial * p.c_out + tile.first + c] = sum;
  }
  m.synchronise_consumers();  // Before the next tile's sums take their place.
}

// Scale, shift, ReLU, rounding; and 16 bytes a store, for which four lanes swap what they hold of
// 8 * 4 adjacent channels.
template <class T, int N, int BLOCKS, class Machine>
VF_THREAD void store_tile(Machine& m, const Problem& p, const Tile& tile,
                          float (&sums)[BLOCKS][N / 2]) {
  const int thread = m.thread() % kWarpgroup;
  const int consumer = m.thread() / kWarpgroup - 1;
  T* pixels[BLOCKS][2];
  VF_UNROLL
  for (int i = 0; i < BLOCKS * 2; ++i) {
    const int row = (consumer * BLOCKS + i / 2) * kBlockRows + i % 2 * 8 + row_of(thread);
    const Pixel pixel = pixel_at(p, tile, row);
    T* out = static_cast<T*>(p.out) + out_offset(p, tile, pixel) + thread % 4 * 8;
    pixels[i / 2][i % 2] = inside(p, pixel) ? out : nullptr;
  }
  VF_UNROLL
  for (int column = 0; column < N; column += 32) {
    const int columns = N - column < 32 ? N - column : 32;
    const float* scale = p.scale + tile.first + column + column_of(thread);
    const float* shift = p.shift + tile.first + column + column_of(thread);
    float pooled[4][2] = {};
    VF_UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      VF_UNROLL
      for (int half = 0; half < 2; ++half) {
        T* out = pixels[block][half];
        uint32_t words[4] = {};
        VF_UNROLL
        for (int i = 0; i * 8 < columns; ++i) {
          float y[2];
          VF_UNROLL
          for (int k = 0; k < 2; ++k) {
            const float z = sums[block][column / 2 + i * 4 + half * 2 + k];
            y[k] = scale_shift(z, scale[i * 8 + k], shift[i * 8 + k]);
            if (p.relu) y[k] = relu(y[k]);
            pooled[i][k] += out != nullptr ? y[k] : 0.f;
          }
          words[i] = m.template narrow_pair<T>(y[0], y[1]);
        }
        transpose(m, words);
        if (out != nullptr && thread % 4 * 8 < columns) m.store(out + column, words);
      }
    }
    if (p.pool_partials != nullptr) leave_sums(m, p, column, columns, pooled);
  }
  if (p.pool_partials != nullptr) store_partials(m, p, tile);
}

// One thread of the kernel. BLOCKS: of 64 pixels, that a warpgroup multiplies.
template <class T, int N, int BLOCKS, class Machine>
VF_THREAD void run_thread(Machine& m, const Problem& p) {
  if (m.thread() == 0) {
    initialise_barriers(m, p);
    m.publish_barriers();
  }
  m.synchronise();
  if (m.thread() < kWarpgroup) {
    m.shrink_registers();
    if (m.thread() == 0) fetch_strips(m, p);
    if (m.thread() == kWarp) fetch_weights(m, p);
  } else {
    m.grow_registers();
    Ring strips(p.x_stages), weights(p.w_stages);
    for (int index = m.cta(); index < p.tiles; index += m.ctas()) {
      float sums[BLOCKS][N / 2];
      multiply<T, N, BLOCKS>(m, p, strips, weights, sums);
      store_tile<T, N, BLOCKS>(m, p, tile_at(p, index), sums);
    }
  }
}

}  // namespace conv_sm90
}  // namespace vovnet_fast
