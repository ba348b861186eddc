// What becomes of a tile whose sum CTAs of a cluster share, on any machine.
//
// Each CTA has fp32 sums of all of the tile, over its own taps and input channels. They hand them
// over in their shared memory, 128 pixels at once; of these every CTA adds up an equal share, in
// the order of the parts whoever adds, so that results do not change from run to run. What follows
// is the same as epilogue.h computes: scale, shift and ReLU, or what is added and what masks. The
// next tile is fetched meanwhile.
#pragma once

#include <cstring>

#include "../../dtypes.h"
#include "../../math.h"
#include "epilogue.h"
#include "epilogue_e4m3.h"
#include "layout.h"
#include "thread.h"

namespace vovnet_fast {
namespace conv_sm90 {

// Parts whose sums a thread reads before it adds: that many reads are under way at once.
constexpr int kPartsAtOnce = 4;

// Threads along the channels, each with a unit of eight, and along the pixels.
template <int N>
struct Adders {
  static constexpr int kAcross = N / kUnit;
  static constexpr int kDown = kConsumers * kWarpgroup / kAcross;
};

struct alignas(8) Pair {
  float first, second;
};

// Leave the sums of a block where other parts can read them.
template <int N, class Machine>
VF_THREAD void hand_over(Machine& m, const Problem& p, int thread, const float (&sums)[N / 2]) {
  thread -= kWarpgroup;
  const int row = thread / kWarpgroup * kBlockRows + row_of(thread % kWarpgroup);
  float* handed = m.floats(handed_at(p)) + row * handed_pitch(N) + column_of(thread);
  VF_UNROLL
  for (int j = 0; j < N / 8; ++j) {
    VF_UNROLL
    for (int i = 0; i < 2; ++i) {
      float* pair = handed + i * 8 * handed_pitch(N) + 8 * j;
      *reinterpret_cast<Pair*>(pair) = {sums[4 * j + 2 * i], sums[4 * j + 2 * i + 1]};
    }
  }
}

// Of one pixel and eight channels: the sums of all parts, in their order.
template <int N, class Machine>
VF_THREAD void add_parts(Machine& m, const Problem& p, int row, int channel, float (&y)[kUnit]) {
  const uint32_t from = handed_at(p) + (row * handed_pitch(N) + channel) * 4;
  const int first = rank_in_part(p, m.rank());
  VF_NO_UNROLL
  for (int part = 0; part < p.parts; part += kPartsAtOnce) {
    float found[kPartsAtOnce][2][4];
    VF_UNROLL
    for (int i = 0; i < kPartsAtOnce; ++i) {
      if (part + i >= p.parts) continue;
      const int rank = first + (part + i) * cluster_tiles(p);
      VF_UNROLL
      for (int half = 0; half < 2; ++half) m.load_shared(rank, from + half * 16, found[i][half]);
    }
    VF_UNROLL
    for (int i = 0; i < kPartsAtOnce; ++i) {
      if (part + i >= p.parts) continue;
      VF_UNROLL
      for (int k = 0; k < kUnit; ++k) {
        y[k] = part + i == 0 ? found[i][k / 4][k % 4] : y[k] + found[i][k / 4][k % 4];
      }
    }
  }
}

template <class T, class Machine>
VF_THREAD void load_unit(Machine& m, const T* from, float (&numbers)[kUnit]) {
  uint32_t words[4];
  m.load(from, words);
  VF_UNROLL
  for (int i = 0; i < 4; ++i) {
    T pair[2];
    memcpy(pair, &words[i], sizeof pair);
    VF_UNROLL
    for (int k = 0; k < 2; ++k) numbers[2 * i + k] = widen(pair[k]);
  }
}

// Of one pixel of the image and eight channels, from `channel` of the output on: all that is left.
template <class T, class Machine>
VF_THREAD void finish_unit(Machine& m, const Problem& p, const Tile& tile, const Pixel& pixel,
                           int channel, float (&y)[kUnit]) {
  if (p.scale != nullptr) {
    VF_UNROLL
    for (int k = 0; k < kUnit; ++k) {
      y[k] = scale_shift(y[k], p.scale[channel + k], p.shift[channel + k]);
      if (p.relu) y[k] = relu(y[k]);
    }
  }
  float beside[kUnit];
  if (channel < p.add_c) {
    load_unit(m, static_cast<const T*>(p.add) + offset(tile, pixel, p.add_pitch) + channel, beside);
    VF_UNROLL
    for (int k = 0; k < kUnit; ++k) y[k] += beside[k];
  }
  const int unmasked = p.c_out - p.mask_c;
  if (channel >= unmasked) {
    const T* mask = static_cast<const T*>(p.mask) + offset(tile, pixel, p.mask_pitch);
    load_unit(m, mask + (channel - unmasked), beside);
    VF_UNROLL
    for (int k = 0; k < kUnit; ++k) y[k] = relu_gradient(y[k], beside[k]);
  }
  uint32_t words[4];
  VF_UNROLL
  for (int i = 0; i < 4; ++i) words[i] = m.template narrow_pair<T>(y[2 * i], y[2 * i + 1]);
  m.store(static_cast<T*>(p.out) + offset(tile, pixel, p.out_pitch) + channel, words);
}

// The sums over the pixels that this CTA stored of the tile. Every part has a row of its own.
template <int N, class Machine>
VF_THREAD void store_part_partials(Machine& m, const Problem& p, const Tile& tile, int thread,
                                   const float (&sums)[kUnit]) {
  float* left = m.floats(sums_at(p));
  if (thread < Adders<N>::kAcross * Adders<N>::kDown) {
    VF_UNROLL
    for (int k = 0; k < kUnit; ++k) left[thread * kUnit + k] = sums[k];
  }
  m.synchronise_consumers();
  const int64_t row = tile.partial * p.parts + part_of(p, m.rank());
  for (int c = thread; c < channels_of(p, tile); c += kConsumers * kWarpgroup) {
    float sum = 0;
    for (int i = 0; i < Adders<N>::kDown; ++i) sum += left[i * N + c];
    if (exists(p, tile)) p.pool_partials[row * p.c_out + tile.first + c] = sum;
  }
  m.synchronise_consumers();  // Before the next tile's sums take their place.
}

// All of it. `parity`: of the phase in which rows are handed over next.
template <class T, int N, int BLOCKS, class Machine>
VF_THREAD void finish_part(Machine& m, const Problem& p, const Tile& tile,
                           const float (&sums)[BLOCKS][N / 2], uint32_t& parity) {
  const int thread = m.thread_again() - kWarpgroup, part = part_of(p, m.rank());
  const int unit = thread % Adders<N>::kAcross * kUnit, down = thread / Adders<N>::kAcross;
  // The warps of all parts of the tile tell all of them.
  const int to = rank_in_part(p, m.rank()) + thread % kWarp * cluster_tiles(p);
  float pool[kUnit] = {};
  VF_UNROLL
  for (int block = 0; block < BLOCKS; ++block) {
    m.wait_free(handed_free(p), parity ^ 1);
    hand_over<N>(m, p, thread + kWarpgroup, sums[block]);
    m.arrive(handed_full(p), p.parts, to);
    m.wait_free(handed_full(p), parity);
    if (down < Adders<N>::kDown && unit < channels_of(p, tile) && exists(p, tile)) {
      const int end = (part + 1) * kHandedRows / p.parts;
      VF_NO_UNROLL
      for (int row = part * kHandedRows / p.parts + down; row < end; row += Adders<N>::kDown) {
        const int of_tile = (row / kBlockRows * BLOCKS + block) * kBlockRows + row % kBlockRows;
        const Pixel pixel = pixel_at(p, tile, of_tile);
        if (!inside(p, pixel)) continue;
        float y[kUnit];
        add_parts<N>(m, p, row, unit, y);
        if constexpr (kIsE4m3<T>) {
          finish_unit_e4m3(m, p, tile, pixel, tile.first + unit, y);
        } else {
          finish_unit<T>(m, p, tile, pixel, tile.first + unit, y);
        }
        VF_UNROLL
        for (int k = 0; k < kUnit; ++k) pool[k] += y[k];
      }
    }
    m.arrive(handed_free(p), p.parts, to);
    parity ^= 1;
  }
  if (p.pool_partials != nullptr) store_part_partials<N>(m, p, tile, thread, pool);
}

}  // namespace conv_sm90
}  // namespace vovnet_fast
