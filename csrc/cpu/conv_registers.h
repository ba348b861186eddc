// Blocks of a convolution whose sums are all in registers. A Unit says what the four bytes of a
// pixel's channels are, and how they are multiplied:
//
//   Packed    fp32, or what two or four of are multiplied at once: bf16, 16 or 8 bits
//   Sum       fp32, or int32
//   kTrim     whether units of a last chunk that no channel fills are left out
//   multiply  (pixel, weights, sums): sums plus the products, by lanes of four bytes
//
// One that has kOwnChunks multiplies chunks of a block by itself:
//
//   multiply_chunk<pixels, vectors>  (block, pixels, weight, units, sums)
#pragma once

#include <type_traits>
#include <utility>

#include "conv_strips.h"
#include "fma.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

// The largest block whose sums fit into the registers, beside a row of weights and a pixel; on
// AArch64, whose 32 hold 4 numbers each, beside a row of weights and four channels of every pixel:
// of 6 pixels GCC keeps some sums in memory.
#if defined(__AVX512F__)
constexpr int kMostPixels = 14, kMostTiles = 2;
#elif defined(__aarch64__)
constexpr int kMostPixels = 5, kMostTiles = 1;
#else
constexpr int kMostPixels = 6, kMostTiles = 1;
#endif

// Sums of a block, by the vectors of its output channels.
template <class Sum, int kPixels, int kVectors>
using Sums = VectorOf<Sum>[kPixels][kVectors];

#ifdef __aarch64__

// The products of one input channel, which is lane kLane of the vectors of pixels: the instruction
// takes it from there, and wants to know it beforehand.
template <int kLane, int kPixels, int kVectors>
VF_HD void multiply_lane(const Vector<float> (&pixels)[kPixels], const float* row,
                         Sums<float, kPixels, kVectors>& sum) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const auto weights = load(row + v * kLanes<float>, Full{});
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
      sum[i][v] = vfmaq_laneq_f32(sum[i][v], weights, pixels[i], kLane);
    }
  }
}

// One chunk of a block, and the tile of its weights.
template <class, int kPixels, int kVectors>
VF_HD void multiply_chunk(const float* pixels, const char* weight, int64_t, int,
                          Sums<float, kPixels, kVectors>& sum) {
  static_assert(kVectors * kLanes<float> == 16, "one tile");
  const auto* rows = reinterpret_cast<const float*>(weight);
  for (int k = 0; k < 16; k += kLanes<float>, rows += kLanes<float> * 16) {
    Vector<float> four[kPixels];
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) four[i] = load(pixels + i * 16 + k, Full{});
    multiply_lane<0>(four, rows, sum);
    multiply_lane<1>(four, rows + 16, sum);
    multiply_lane<2>(four, rows + 32, sum);
    multiply_lane<3>(four, rows + 48, sum);
  }
}

#else

// One chunk of a block, and the tiles of its weights.
template <class Unit, int kPixels, int kVectors>
VF_HD void multiply_chunk(const float* pixels, const char* weight, int64_t tile_step, int units,
                          Sums<typename Unit::Sum, kPixels, kVectors>& sum) {
  constexpr int kPerTile = 16 / kLanes<float>;
#pragma GCC unroll 4
  for (int k = 0; k < (Unit::kTrim ? units : kUnits); ++k) {
    Vector<float> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const char* tile = weight + v / kPerTile * tile_step;
      row[v] = load(reinterpret_cast<const float*>(tile) + k * 16 + v % kPerTile * kLanes<float>,
                    Full{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
      const auto pixel = same(pixels[i * 16 + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Unit::multiply(pixel, row[v], sum[i][v]);
    }
  }
}

#endif

template <class Unit, class = void>
constexpr bool kOwnChunks = false;
template <class Unit>
constexpr bool kOwnChunks<Unit, std::enable_if_t<Unit::kOwnChunks>> = true;

// All sums are in registers, which takes the loops over them unrolled.
template <class Unit, int kPixels, int kTiles>
void multiply_pixels(const Block& block, typename Unit::Sum* sums, bool add) {
  using Sum = typename Unit::Sum;
  constexpr int kVectors = kTiles * 16 / kLanes<float>;
  Sums<Sum, kPixels, kVectors> sum;
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = VectorOf<Sum>{};
  }
  const char *input = block.input, *weight = block.weight;
  for (int64_t chunk = 0; chunk < block.chunks; ++chunk, input += block.chunk_step) {
    const int units = chunk + 1 == block.chunks ? block.last_units : kUnits;
    for (int tap = 0; tap < block.taps; ++tap, weight += kTileBytes) {
      const auto* pixels = reinterpret_cast<const float*>(input + block.offsets[tap]);
      if constexpr (kOwnChunks<Unit>) {
        Unit::template multiply_chunk<kPixels, kVectors>(block, pixels, weight, units, sum);
      } else {
        multiply_chunk<Unit, kPixels, kVectors>(pixels, weight, block.tile_step, units, sum);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Sum* to = sums + (i * kVectors + v) * kLanes<float>;
      store(to, add ? sum[i][v] + load(to, Full{}) : sum[i][v], Full{});
    }
  }
}

template <class Unit, int kTiles, int... kCounts>
VF_HD void multiply_some(const Block& block, typename Unit::Sum* sums, bool add,
                         std::integer_sequence<int, kCounts...>) {
  using Multiply = void (*)(const Block&, typename Unit::Sum*, bool);
  static constexpr Multiply kBySize[] = {multiply_pixels<Unit, kCounts + 1, kTiles>...};
  kBySize[block.pixels - 1](block, sums, add);
}

// The unit of products in fp32.
struct Fp32 {
  using Packed = float;
  using Sum = float;
  static constexpr bool kTrim = false;
#ifndef __aarch64__
  static VF_HD Vector<float> multiply(Vector<float> pixel, Vector<float> weights,
                                      Vector<float> sums) {
    return multiply_add(pixel, weights, sums);
  }
#endif
};

// An engine, but for how it stores.
template <class Unit>
struct Registers {
  using Packed = typename Unit::Packed;
  using Sum = typename Unit::Sum;
  static constexpr int64_t kPixels = kMostPixels;
  static constexpr int kTiles = kMostTiles;
  static constexpr int64_t kSteps = 18;
  static constexpr bool kByRows = true;
  static constexpr bool kDirect = false;  // Pointers to all pixels would not fit into registers.

  class Session {
   public:
    ~Session() {}
  };

  // Blocks of one size, rather than a small one at the end.
  static int64_t block_pixels(int64_t pixels) {
    return ceil_div(pixels, ceil_div(pixels, kPixels));
  }

  static void multiply(const Block& block, Sum* sums, bool add) {
    constexpr std::make_integer_sequence<int, kMostPixels> kCounts;
    if (block.tiles == kMostTiles) {
      multiply_some<Unit, kMostTiles>(block, sums, add, kCounts);
    } else {
      multiply_some<Unit, 1>(block, sums, add, kCounts);
    }
  }
};

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
