// What becomes of a tile's sums in the Hopper convolution, on any machine.
//
// Each pass changes the sums where they are, in registers, so that none needs many of its own.
#pragma once

#include <cstring>

#include "../../dtypes.h"
#include "../../math.h"
#include "layout.h"
#include "thread.h"

namespace vovnet_fast {
namespace conv_sm90 {

// A thread has two pixels of each of its blocks. Pixel i of them: its row in the tile.
template <int BLOCKS>
VF_THREAD int row_at(int thread, int i) {
  const int consumer = thread / kWarpgroup - 1;
  return (consumer * BLOCKS + i / 2) * kBlockRows + i % 2 * 8 + row_of(thread % kWarpgroup);
}

// Which pixels of a thread the image has, by bits.
template <int BLOCKS>
VF_THREAD unsigned pixels_inside(const Problem& p, const Tile& tile, int thread) {
  unsigned found = 0;
  VF_UNROLL
  for (int i = 0; i < 2 * BLOCKS; ++i) {
    const Pixel pixel = pixel_at(p, tile, row_at<BLOCKS>(thread, i));
    if (exists(p, tile) && inside(p, pixel)) found |= 1u << i;
  }
  return found;
}

template <int N, int BLOCKS>
VF_THREAD void scale_and_shift(const Problem& p, const Tile& tile, int thread,
                               float (&sums)[BLOCKS][N / 2]) {
  const int first = tile.first + column_of(thread), channels = channels_of(p, tile);
  VF_UNROLL
  for (int j = 0; j < N / 8; ++j) {
    if (8 * j >= channels) break;
    VF_UNROLL
    for (int k = 0; k < 2; ++k) {
      const float scale = p.scale[first + 8 * j + k], shift = p.shift[first + 8 * j + k];
      VF_UNROLL
      for (int i = 0; i < 2 * BLOCKS; ++i) {
        float& sum = sums[i / 2][4 * j + i % 2 * 2 + k];
        sum = scale_shift(sum, scale, shift);
        if (p.relu) sum = relu(sum);
      }
    }
  }
}

// What this thread is of those that multiply its tile, which count from kWarpgroup on: where a tile
// is one warpgroup's, the same as in the first.
template <class Machine>
VF_THREAD int thread_of_tile(Machine& m, const Problem& p) {
  const int thread = m.thread_again();
  return p.turns != 0 ? kWarpgroup + thread % kWarpgroup : thread;
}

// Those that multiply the tile meet.
template <class Machine>
VF_THREAD void synchronise_tile(Machine& m, const Problem& p) {
  m.synchronise_consumers(p.turns != 0 ? m.thread_again() / kWarpgroup : 0,
                          warps_of_tile(p) * kWarp);
}

// Leave the sums over the pixels of this warp in shared memory.
template <int N, int BLOCKS, class Machine>
VF_THREAD void leave_sums(Machine& m, const Problem& p, int thread, unsigned inside,
                          const float (&sums)[BLOCKS][N / 2]) {
  // Those that take turns leave them beside each other.
  const int warp = m.thread_again() / kWarp - kWarpgroup / kWarp;
  float* row = m.floats(sums_at(p)) + warp * N + column_of(thread);
  VF_UNROLL
  for (int j = 0; j < N / 8; ++j) {
    VF_UNROLL
    for (int k = 0; k < 2; ++k) {
      float sum = 0;
      VF_UNROLL
      for (int i = 0; i < 2 * BLOCKS; ++i) {
        if ((inside >> i & 1) != 0) sum += sums[i / 2][4 * j + i % 2 * 2 + k];
      }
      VF_UNROLL
      for (int lanes = 4; lanes < kWarp; lanes *= 2) sum += m.shuffle_xor(sum, lanes);
      if (thread % kWarp < 4) row[8 * j + k] = sum;
    }
  }
}

// Add up what the warps left, in order.
template <int N, class Machine>
VF_THREAD void store_partials(Machine& m, const Problem& p, const Tile& tile) {
  synchronise_tile(m, p);
  const int warps = warps_of_tile(p);
  const int first = p.turns != 0 ? (m.thread_again() / kWarpgroup - 1) * warps : 0;
  const float* left = m.floats(sums_at(p)) + first * N;
  for (int c = thread_of_tile(m, p) - kWarpgroup; c < channels_of(p, tile); c += warps * kWarp) {
    float sum = 0;
    for (int warp = 0; warp < warps; ++warp) sum += left[warp * N + c];
    if (exists(p, tile)) p.pool_partials[tile.partial * p.c_out + tile.first + c] = sum;
  }
  synchronise_tile(m, p);  // Before the next tile's sums take their place.
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

// A unit of 16 bytes is what four lanes swap: lane q has channels 8 * q to 8 * q + 7 of 32 adjacent
// ones in memory, and of its sums the pairs of channels 2 * q and 2 * q + 1 of every eight.

// Of those 32 of a tile which begin at `column`: the lane's pairs of a view that has channels from
// `first` to `end` of the output's. Those it lacks are zeros.
template <class T, int N, class Machine>
VF_THREAD void load_pairs(Machine& m, const T* pixel, int channel, int column, int first, int end,
                          bool inside, float (&pairs)[4][2]) {
  const int unit = m.thread() % 4 * 8, from = channel + column + unit;
  uint32_t words[4] = {};
  if (inside && column + unit < N && from >= first && from < end) {
    m.load(pixel + (from - first), words);
  }
  transpose(m, words);
  VF_UNROLL
  for (int i = 0; i < 4; ++i) {
    T pair[2];
    memcpy(pair, &words[i], sizeof pair);
    VF_UNROLL
    for (int k = 0; k < 2; ++k) pairs[i][k] = widen(pair[k]);
  }
}

// sums = mask(sums + add): what masks are activations, whose zeros have no gradient.
template <class T, int N, int BLOCKS, class Machine>
VF_THREAD void add_and_mask(Machine& m, const Problem& p, const Tile& tile, int thread,
                            unsigned inside, float (&sums)[BLOCKS][N / 2]) {
  const int unmasked = p.c_out - p.mask_c;
  VF_UNROLL
  for (int i = 0; i < 2 * BLOCKS; ++i) {
    const Pixel pixel = pixel_at(p, tile, row_at<BLOCKS>(thread, i));
    const bool there = (inside >> i & 1) != 0;
    const T* add = static_cast<const T*>(p.add) + offset(tile, pixel, p.add_pitch);
    const T* mask = static_cast<const T*>(p.mask) + offset(tile, pixel, p.mask_pitch);
    VF_UNROLL
    for (int column = 0; column < N; column += 32) {
      float pairs[4][2];
      if (tile.first + column < p.add_c) {
        load_pairs<T, N>(m, add, tile.first, column, 0, p.add_c, there, pairs);
        VF_UNROLL
        for (int j = 0; j < 4 && column + 8 * j < N; ++j) {
          float* y = &sums[i / 2][column / 2 + 4 * j + i % 2 * 2];
          VF_UNROLL
          for (int k = 0; k < 2; ++k) y[k] += pairs[j][k];
        }
      }
      if (tile.first + column + 32 > unmasked) {
        load_pairs<T, N>(m, mask, tile.first, column, unmasked, p.c_out, there, pairs);
        VF_UNROLL
        for (int j = 0; j < 4 && column + 8 * j < N; ++j) {
          float* y = &sums[i / 2][column / 2 + 4 * j + i % 2 * 2];
          const bool masked = tile.first + column + 8 * j >= unmasked;
          VF_UNROLL
          for (int k = 0; k < 2; ++k) y[k] = masked ? relu_gradient(y[k], pairs[j][k]) : y[k];
        }
      }
    }
  }
}

// Rounds and stores 16 bytes at once, for which four lanes swap what they hold of 8 * 4 adjacent
// channels.
template <class T, int N, int BLOCKS, class Machine>
VF_THREAD void store_tile(Machine& m, const Problem& p, const Tile& tile, int thread,
                          unsigned inside, const float (&sums)[BLOCKS][N / 2]) {
  const int unit = thread % 4 * 8, channels = channels_of(p, tile);
  VF_UNROLL
  for (int i = 0; i < 2 * BLOCKS; ++i) {
    const Pixel pixel = pixel_at(p, tile, row_at<BLOCKS>(thread, i));
    T* out = static_cast<T*>(p.out) + offset(tile, pixel, p.out_pitch) + tile.first + unit;
    VF_UNROLL
    for (int column = 0; column < N; column += 32) {
      uint32_t words[4] = {};
      VF_UNROLL
      for (int j = column / 8; j < column / 8 + 4 && j < N / 8; ++j) {
        const float* y = &sums[i / 2][4 * j + i % 2 * 2];
        words[j - column / 8] = m.template narrow_pair<T>(y[0], y[1]);
      }
      transpose(m, words);
      if ((inside >> i & 1) != 0 && column + unit < channels) m.store(out + column, words);
    }
  }
}

// All of it.
template <class T, int N, int BLOCKS, class Machine>
VF_THREAD void finish(Machine& m, const Problem& p, const Tile& tile,
                      float (&sums)[BLOCKS][N / 2]) {
  // Every pass asks anew which thread this is, so that none keeps addresses for the next one, and
  // nothing is kept while the next tile is multiplied.
  const unsigned inside = pixels_inside<BLOCKS>(p, tile, thread_of_tile(m, p));
  if (p.scale != nullptr) scale_and_shift<N, BLOCKS>(p, tile, thread_of_tile(m, p), sums);
  if (p.add_c != 0 || p.mask_c != 0) {
    add_and_mask<T, N, BLOCKS>(m, p, tile, thread_of_tile(m, p), inside, sums);
  }
  if (p.pool_partials != nullptr) {
    leave_sums<N, BLOCKS>(m, p, thread_of_tile(m, p), inside, sums);
    store_partials<N>(m, p, tile);
  }
  store_tile<T, N, BLOCKS>(m, p, tile, thread_of_tile(m, p), inside, sums);
}

}  // namespace conv_sm90
}  // namespace vovnet_fast
