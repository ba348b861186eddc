// Winograd's convolution (conv_winograd_run.h) of bytes: in integers it is exact.
//
// A 3x3 convolution with a stride of 1, in tiles of 4x4 outputs, whose polynomials are taken at
// 0, +-1, +-2 and infinity: 36 products for the 144 of the definition. They are of 16 bits, in
// pairs (vpmaddwd), so that a pair of them is at most 2 * 17340 * 18288:
//
//   input    |sums| <= 68 * 255, of both directions of a tile
//   weight   the matrix of fractions times 24, with rows of (6 0 0), (-4 -4 -4), (-4 4 -4), (1 2
//   4),
//            (1 -2 4) and (0 0 6), the last times 4 when outputs are made: |sums| <= 12 * 12 * 127
//
// Sums are made modulo 2^32, and may pass over it as often as they like: an output is what comes of
// them divided by 24 * 24. The 9 has an inverse modulo 2^32, and the 64 is a shift, so that outputs
// are right modulo 2^26, and themselves where |output| < 2^25 (int8_conv_winograd_limits.h).
#pragma once

#include "conv_winograd_run.h"
#include "int8_conv_store.h"
#include "int8_conv_winograd_limits.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace winograd {

// 16-bit numbers in a register, the channels of pixels.
#ifdef __AVX512F__
using Shorts = __m512i;
VF_HD Shorts add_shorts(Shorts x, Shorts y) { return _mm512_add_epi16(x, y); }
VF_HD Shorts subtract_shorts(Shorts x, Shorts y) { return _mm512_sub_epi16(x, y); }
VF_HD Shorts twice(Shorts x) { return _mm512_slli_epi16(x, 1); }
VF_HD Shorts four_times(Shorts x) { return _mm512_slli_epi16(x, 2); }
VF_HD Shorts widen_shorts(const uint8_t* from) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#else
using Shorts = __m256i;
VF_HD Shorts add_shorts(Shorts x, Shorts y) { return _mm256_add_epi16(x, y); }
VF_HD Shorts subtract_shorts(Shorts x, Shorts y) { return _mm256_sub_epi16(x, y); }
VF_HD Shorts twice(Shorts x) { return _mm256_slli_epi16(x, 1); }
VF_HD Shorts four_times(Shorts x) { return _mm256_slli_epi16(x, 2); }
VF_HD Shorts widen_shorts(const uint8_t* from) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#endif

constexpr int kBytesSide = 4;
constexpr int64_t kShorts = sizeof(Shorts) / sizeof(int16_t);
constexpr int64_t kShortsChunk = kChunkBytes / static_cast<int64_t>(sizeof(int16_t));

// In one direction of a tile.
constexpr int kWeightOf[6][3] = {{6, 0, 0}, {-4, -4, -4}, {-4, 4, -4},
                                 {1, 2, 4}, {1, -2, 4},   {0, 0, 6}};

struct Bytes {
  static VF_HD void input(const Shorts* x, Shorts* y) {
    const Shorts even = subtract_shorts(x[4], x[2]), odd = subtract_shorts(x[3], x[1]);
    const Shorts even_one = subtract_shorts(x[4], four_times(x[2]));
    const Shorts odd_one = subtract_shorts(x[3], four_times(x[1]));
    y[0] = add_shorts(four_times(subtract_shorts(x[0], x[2])), even);
    y[1] = add_shorts(even_one, odd_one);
    y[2] = subtract_shorts(even_one, odd_one);
    y[3] = add_shorts(even, twice(odd));
    y[4] = subtract_shorts(even, twice(odd));
    y[5] = subtract_shorts(subtract_shorts(x[5], x[3]), four_times(odd));
  }

  // 24 times the outputs, of products with a weight that is 24 times what it should be.
  using Bits = VectorTypes<float>::Bits;
  static VF_HD void output(const Bits* x, Bits* y) {
    const Bits even_one = x[1] + x[2], odd_one = x[1] - x[2];
    const Bits even_two = x[3] + x[4], odd_two = x[3] - x[4];
    y[0] = x[0] + (even_one + even_two);
    y[1] = odd_one + (odd_two << 1);
    y[2] = even_one + (even_two << 2);
    y[3] = (odd_one + (odd_two << 3)) + (x[5] << 2);
  }

  static VF_HD Ints divided(Bits y) {
    constexpr uint32_t kInverseOf9 = 0x38e38e39;
    return (Ints)(y * kInverseOf9) >> 6;
  }
};

VF_HD Shorts load_shorts(const uint8_t* from, Full) { return widen_shorts(from); }
VF_HD Shorts load_shorts(const uint8_t* from, Part part) {
  uint8_t all[kShorts] = {};
  for (int i = 0; i < part.count; ++i) all[i] = from[i];
  return widen_shorts(all);
}

// Channels of a span of one tile's input, from `x`, that of its first output's pixel.
template <class Span>
VF_HD void transform_bytes(const Int8ConvParams& p, const uint8_t* x, Tile tile, Span span,
                           char* to, int64_t step) {
  constexpr int kCount = kBytesSide + 2;
  const auto once = [](const Shorts* from, Shorts* values)
                        VF_LAMBDA { Bytes::input(from, values); };
  const auto write = [&](int i, const Shorts* row) VF_LAMBDA {
    char* at = to + i * kCount * step;
#pragma GCC unroll 6
    for (int j = 0; j < kCount; ++j) memcpy(at + j * step, row + j, sizeof(Shorts));
  };
  const uint8_t* first = x - p.x.stride_h - p.x.stride_w;
  if (inside<kBytesSide>(p, tile)) {
    const auto read = [&](const uint8_t* from) VF_LAMBDA { return load_shorts(from, span); };
    return in_both<Shorts, kCount, kCount>(once, first, p.x.stride_h, p.x.stride_w, read, write);
  }
  Shorts padded[kCount][kCount] = {};
  for_inside<kBytesSide>(p, tile, [&](int64_t i, int64_t j, int64_t, int64_t) VF_LAMBDA {
    padded[i][j] = load_shorts(first + i * p.x.stride_h + j * p.x.stride_w, span);
  });
  in_both<Shorts, kCount, kCount>(
      once, &padded[0][0], kCount, 1, [](const Shorts* from) VF_LAMBDA { return *from; }, write);
}

// The outputs of a tile for the channels of a span, from `channel` on.
template <class Span>
VF_HD void finish_bytes(const Int8ConvParams& p, const int32_t* sums, int64_t step, Tile tile,
                        int64_t channel, Span span) {
  constexpr int kSide = kBytesSide, kCount = kSide + 2;
  using Bits = Bytes::Bits;
  const Ints bias = load(static_cast<const int32_t*>(p.bias) + channel, span);
  const Floats multiplier = load(static_cast<const float*>(p.multiplier) + channel, span);
  const Floats unit = load(static_cast<const float*>(p.unit) + channel, span);
  const Floats low{}, high = broadcast<float>(static_cast<float>(p.levels));
  const auto at = [&](const View& view, int i) VF_LAMBDA {
    return tile.image * view.stride_n + (tile.h + i) * view.stride_h + tile.w * view.stride_w +
           channel;
  };
  const int64_t rows = least<int64_t>(kSide, p.out_height - tile.h);
  const int64_t columns = least<int64_t>(kSide, p.out_width - tile.w);
  in_both<Bits, kCount, kSide>(
      [](const Bits* from, Bits* to) VF_LAMBDA { Bytes::output(from, to); }, sums, kCount * step,
      step, [](const int32_t* from) VF_LAMBDA { return (Bits)load(from, Full{}); },
      [&](int i, const Bits* row) VF_LAMBDA {
        if (i >= rows) return;
        Ints acc[kSide];
#pragma GCC unroll 4
        for (int j = 0; j < kSide; ++j) acc[j] = Bytes::divided(row[j]) + bias;
        if (p.out.data != nullptr) {
          uint8_t* to = static_cast<uint8_t*>(p.out.data) + at(p.out, i);
#pragma GCC unroll 4
          for (int j = 0; j < kSide; ++j, to += p.out.stride_w) {
            if (j >= columns) continue;
            store_bytes<float>(to, requantized(acc[j], multiplier, low, high), span);
          }
        }
        if (p.feature.data != nullptr) {
          float* to = static_cast<float*>(p.feature.data) + at(p.feature, i);
#pragma GCC unroll 4
          for (int j = 0; j < kSide; ++j, to += p.feature.stride_w) {
            if (j < columns) store(to, relu(to_floats(acc[j]) * unit), span);
          }
        }
      });
}

// See run_task. A Unit multiplies pairs of 16 bits.
template <class Unit>
struct BytesForm {
  static constexpr int kSide = kBytesSide;
  using Engine = conv::Registers<Unit>;
  static constexpr int64_t kChunksAtOnce = int64_t{1} << 40;  // all

  const Int8ConvParams& p;

  void inputs(const Division& d, int64_t first, int64_t count, char* to) const {
    const auto* x = static_cast<const uint8_t*>(p.x.data);
    for (int64_t chunk = 0; chunk < d.chunks; ++chunk) {
      for (int64_t i = 0; i < count; ++i) {
        const Tile tile = tile_at<kSide>(d, first + i);
        const uint8_t* from =
            x + tile.image * p.x.stride_n + tile.h * p.x.stride_h + tile.w * p.x.stride_w;
        char* tile_to = to + (chunk * d.size + i) * kChunkBytes;
        for (int64_t k = 0; k < kShortsChunk; k += kShorts, tile_to += sizeof(Shorts)) {
          const int64_t c = chunk * kShortsChunk + k, left = p.c_in - c;
          if (left >= kShorts) {
            transform_bytes(p, from + c, tile, Full{}, tile_to, d.input_step);
          } else {
            const Part part{static_cast<int>(left > 0 ? left : 0)};
            transform_bytes(p, from + (left > 0 ? c : 0), tile, part, tile_to, d.input_step);
          }
        }
      }
    }
  }

  void outputs(const Division& d, int64_t first, int64_t count, int64_t out_tile, int64_t out_tiles,
               const char* sums) const {
    const int64_t step = d.sum_step / static_cast<int64_t>(sizeof(int32_t));
    for (int64_t i = 0; i < count; ++i) {
      const Tile tile = tile_at<kSide>(d, first + i);
      const auto* from = reinterpret_cast<const int32_t*>(sums + i * out_tiles * kChunkBytes);
      const int64_t channels = least(out_tiles * kTileChannels, p.c_out - out_tile * kTileChannels);
      for_channels<float>(channels, [&](int64_t c, auto span) VF_LAMBDA {
        finish_bytes(p, from + c, step, tile, out_tile * kTileChannels + c, span);
      });
    }
  }
};

template <class Unit>
void run_bytes(const Int8ConvParams& p, int threads) {
  const auto* weights = static_cast<const char*>(p.tiles) + kWinogradHeaderBytes;
  run(BytesForm<Unit>{p}, p, weights, threads);
}

// 16 outputs and a chunk of inputs at a time, at all points. What an output can be at most, a
// level, is the sum of the weights of one sign.
inline void pack_bytes(const Int8ConvPackParams& p, int threads) {
  constexpr int kCount = kBytesSide + 2;
  const auto* weight = static_cast<const int8_t*>(p.weight);
  const int64_t chunks = ceil_div(p.c_in, kShortsChunk), tiles = ceil_div(p.c_out, kTileChannels);
  char* out = static_cast<char*>(p.out);
  memset(out, 0, kWinogradHeaderBytes);
  int64_t most = 0;
  for (int64_t o = 0; o < p.c_out; ++o) {
    int64_t sums[2] = {};
    for (int64_t i = 0; i < 9 * p.c_in; ++i) {
      const int64_t w = weight[o * 9 * p.c_in + i];
      (w < 0 ? sums[0] : sums[1]) += w < 0 ? -w : w;
    }
    for (const int64_t sum : sums) most = sum > most ? sum : most;
  }
  memcpy(out, &most, sizeof most);
  out += kWinogradHeaderBytes;
  const int64_t bytes = tiles * chunks * kCount * kCount * kTileBytes;
  parallel(tiles * chunks, bytes, threads, [&](int64_t index) {
    const int64_t tile = index / chunks, chunk = index % chunks;
    const int64_t outputs = least(kTileChannels, p.c_out - tile * kTileChannels);
    const int64_t inputs = least(kShortsChunk, p.c_in - chunk * kShortsChunk);
    for (int point = 0; point < kCount * kCount; ++point) {
      const int *down = kWeightOf[point / kCount], *right = kWeightOf[point % kCount];
      alignas(64) int16_t block[kTileChannels][kShortsChunk] = {};
      for (int64_t o = 0; o < outputs; ++o) {
        int32_t sums[kShortsChunk] = {};
        for (int tap = 0; tap < 9; ++tap) {
          const int32_t factor = down[tap / 3] * right[tap % 3];
          if (factor == 0) continue;
          const int8_t* from =
              weight + ((tile * kTileChannels + o) * 9 + tap) * p.c_in + chunk * kShortsChunk;
          for (int64_t k = 0; k < inputs; ++k) sums[k] += factor * from[k];
        }
        for (int64_t k = 0; k < inputs; ++k) block[o][k] = static_cast<int16_t>(sums[k]);
      }
      transpose(block, out + (point * tiles * chunks + index) * kTileBytes);
    }
  });
}

}  // namespace winograd
}  // namespace VF_ISA
}  // namespace vovnet_fast
