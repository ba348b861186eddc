// What becomes of a tile's sums in e4m3, on any machine: bias, and then activations of eight bits,
// a feature in fp32, or both. Sums of activations are those of what is stored, rounded.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../math.h"
#include "epilogue.h"
#include "layout.h"
#include "thread.h"

namespace vovnet_fast {
namespace conv_sm90 {

// A number of e4m3: 1 sign, 4 exponent and 3 mantissa bits, no infinity. Machines convert it.
struct Float8 {
  uint8_t bits;
};

template <class T>
constexpr bool kIsE4m3 = std::is_same_v<T, Float8>;

constexpr int kUnitE4m3 = 16;  // output channels of one store of 16 bytes

// Rounds two numbers to e4m3, and leaves them so.
template <class Machine>
VF_THREAD uint32_t round_pair(Machine& m, float& a, float& b) {
  const uint32_t pair = m.narrow_e4m3(a, b);
  m.widen_e4m3(pair, a, b);
  return pair;
}

// Of one pixel of the image and eight channels: all that is left. See finish_unit() of parts.h.
template <class Machine>
VF_THREAD void finish_unit_e4m3(Machine& m, const Problem& p, const Tile& tile, const Pixel& pixel,
                                int channel, float (&y)[kUnit]) {
  VF_UNROLL
  for (int k = 0; k < kUnit; ++k) y[k] += p.shift[channel + k];
  if (p.feature != nullptr) {
    float* to = p.feature + offset(tile, pixel, p.feature_pitch) + channel;
    VF_UNROLL
    for (int k = 0; k < kUnit; k += 2) {
      m.store_pair(to + k, relu(y[k] * p.unit[channel + k]),
                   relu(y[k + 1] * p.unit[channel + k + 1]));
    }
  }
  if (p.out == nullptr) return;
  uint32_t words[2] = {};
  VF_UNROLL
  for (int k = 0; k < kUnit; k += 2) {
    y[k] = relu(y[k] * p.scale[channel + k]);
    y[k + 1] = relu(y[k + 1] * p.scale[channel + k + 1]);
    words[k / 4] |= round_pair(m, y[k], y[k + 1]) << k % 4 * 8;
  }
  m.store_words(static_cast<uint8_t*>(p.out) + offset(tile, pixel, p.out_pitch) + channel, words);
}

template <int N, int BLOCKS>
VF_THREAD void add_bias(const Problem& p, const Tile& tile, int thread,
                        float (&sums)[BLOCKS][N / 2]) {
  const int first = tile.first + column_of(thread), channels = channels_of(p, tile);
  VF_UNROLL
  for (int j = 0; j < N / 8; ++j) {
    if (8 * j >= channels) break;
    VF_UNROLL
    for (int k = 0; k < 2; ++k) {
      const float bias = p.shift[first + 8 * j + k];
      VF_UNROLL
      for (int i = 0; i < 2 * BLOCKS; ++i) sums[i / 2][4 * j + i % 2 * 2 + k] += bias;
    }
  }
}

// Four lanes store 32 adjacent bytes of a pixel: all of a sector.
template <int N, int BLOCKS, class Machine>
VF_THREAD void store_feature(Machine& m, const Problem& p, const Tile& tile, int thread,
                             unsigned inside, const float (&sums)[BLOCKS][N / 2]) {
  const int first = tile.first + column_of(thread), channels = channels_of(p, tile);
  int64_t pixels[2 * BLOCKS];
  VF_UNROLL
  for (int i = 0; i < 2 * BLOCKS; ++i) {
    const Pixel pixel = pixel_at(p, tile, row_at<BLOCKS>(thread, i));
    pixels[i] = offset(tile, pixel, p.feature_pitch) + first;
  }
  VF_UNROLL
  for (int j = 0; j < N / 8; ++j) {
    if (8 * j >= channels) break;
    const float unit[2] = {p.unit[first + 8 * j], p.unit[first + 8 * j + 1]};
    VF_UNROLL
    for (int i = 0; i < 2 * BLOCKS; ++i) {
      if ((inside >> i & 1) == 0) continue;
      const float* z = &sums[i / 2][4 * j + i % 2 * 2];
      m.store_pair(p.feature + pixels[i] + 8 * j, relu(z[0] * unit[0]), relu(z[1] * unit[1]));
    }
  }
}

// What activations are before they are rounded, or, for a pool, after that.
template <int N, int BLOCKS, class Machine>
VF_THREAD void activate(Machine& m, const Problem& p, const Tile& tile, int thread,
                        float (&sums)[BLOCKS][N / 2]) {
  const int first = tile.first + column_of(thread), channels = channels_of(p, tile);
  VF_UNROLL
  for (int j = 0; j < N / 8; ++j) {
    if (8 * j >= channels) break;
    const float scale[2] = {p.scale[first + 8 * j], p.scale[first + 8 * j + 1]};
    VF_UNROLL
    for (int i = 0; i < 2 * BLOCKS; ++i) {
      float* y = &sums[i / 2][4 * j + i % 2 * 2];
      VF_UNROLL
      for (int k = 0; k < 2; ++k) y[k] = relu(y[k] * scale[k]);
      if (p.pool_partials != nullptr) round_pair(m, y[0], y[1]);
    }
  }
}

// Rounds and stores 16 bytes at once, for which four lanes swap what they hold of 64 adjacent
// channels: lane q has of every eight the pair of channels 2 * q and 2 * q + 1, and stores channels
// 16 * q to 16 * q + 15. Word i of a lane holds its pairs of the two eights that lane i stores.
template <int N, int BLOCKS, class Machine>
VF_THREAD void store_e4m3(Machine& m, const Problem& p, const Tile& tile, int thread,
                          unsigned inside, const float (&sums)[BLOCKS][N / 2]) {
  const int unit = thread % 4 * kUnitE4m3, channels = channels_of(p, tile);
  VF_UNROLL
  for (int i = 0; i < 2 * BLOCKS; ++i) {
    const Pixel pixel = pixel_at(p, tile, row_at<BLOCKS>(thread, i));
    uint8_t* out = static_cast<uint8_t*>(p.out) + offset(tile, pixel, p.out_pitch) + tile.first;
    VF_UNROLL
    for (int column = 0; column < N; column += 4 * kUnitE4m3) {
      uint32_t words[4] = {};
      VF_UNROLL
      for (int j = column / 8; j < column / 8 + 8 && j < N / 8; ++j) {
        const float* y = &sums[i / 2][4 * j + i % 2 * 2];
        words[(j - column / 8) / 2] |= m.narrow_e4m3(y[0], y[1]) << j % 2 * 16;
      }
      transpose(m, words);
      const uint32_t bytes[4] = {m.low_halves(words[0], words[1]), m.low_halves(words[2], words[3]),
                                 m.high_halves(words[0], words[1]),
                                 m.high_halves(words[2], words[3])};
      if ((inside >> i & 1) != 0 && column + unit < channels) {
        m.store(out + column + unit, bytes);
      }
    }
  }
}

// All of it.
template <int N, int BLOCKS, class Machine>
VF_THREAD void finish_e4m3(Machine& m, const Problem& p, const Tile& tile,
                           float (&sums)[BLOCKS][N / 2]) {
  const int thread = m.thread_again();  // As in finish().
  const unsigned inside = pixels_inside<BLOCKS>(p, tile, thread);
  add_bias<N, BLOCKS>(p, tile, thread, sums);
  if (p.feature != nullptr) store_feature<N, BLOCKS>(m, p, tile, thread, inside, sums);
  if (p.out == nullptr) return;
  activate<N, BLOCKS>(m, p, tile, thread, sums);
  if (p.pool_partials != nullptr) {
    leave_sums<N, BLOCKS>(m, p, thread, inside, sums);
    store_partials<N>(m, p, tile);
  }
  store_e4m3<N, BLOCKS>(m, p, tile, thread, inside, sums);
}

}  // namespace conv_sm90
}  // namespace vovnet_fast
