// Convolution in fp32, and by fp32 in half precision.
#if defined(__AVX2__) || defined(__aarch64__)

#include <utility>

#include "conv_strips.h"
#ifndef __aarch64__
#include "fma.h"
#endif

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

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
template <int kPixels, int kVectors>
using Sums = Vector<float>[kPixels][kVectors];

#ifdef __aarch64__

// The products of one input channel, which is lane kLane of the vectors of pixels: the instruction
// takes it from there, and wants to know it beforehand.
template <int kLane, int kPixels, int kVectors>
VF_HD void multiply_lane(const Vector<float> (&pixels)[kPixels], const float* row,
                         Sums<kPixels, kVectors>& sum) {
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
template <int kPixels, int kVectors>
VF_HD void multiply_chunk(const float* pixels, const char* weight, int64_t,
                          Sums<kPixels, kVectors>& sum) {
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
template <int kPixels, int kVectors>
VF_HD void multiply_chunk(const float* pixels, const char* weight, int64_t tile_step,
                          Sums<kPixels, kVectors>& sum) {
  constexpr int kPerTile = 16 / kLanes<float>;
#pragma GCC unroll 4
  for (int k = 0; k < 16; ++k) {
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
      for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add(pixel, row[v], sum[i][v]);
    }
  }
}

#endif

// All sums are in registers, which takes the loops over them unrolled.
template <int kPixels, int kTiles>
void multiply_pixels(const conv::Block& block, float* sums, bool add) {
  constexpr int kVectors = kTiles * 16 / kLanes<float>;
  Sums<kPixels, kVectors> sum;
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Vector<float>{};
  }
  const char *input = block.input, *weight = block.weight;
  for (int64_t chunk = 0; chunk < block.chunks; ++chunk, input += block.chunk_step) {
    for (int tap = 0; tap < block.taps; ++tap, weight += conv::kTileBytes) {
      const auto* pixels = reinterpret_cast<const float*>(input + block.offsets[tap]);
      multiply_chunk<kPixels, kVectors>(pixels, weight, block.tile_step, sum);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + (i * kVectors + v) * kLanes<float>;
      store(to, add ? sum[i][v] + load(to, Full{}) : sum[i][v], Full{});
    }
  }
}

template <int kTiles, int... kCounts>
VF_HD void multiply_some(const conv::Block& block, float* sums, bool add,
                         std::integer_sequence<int, kCounts...>) {
  using Multiply = void (*)(const conv::Block&, float*, bool);
  static constexpr Multiply kBySize[] = {multiply_pixels<kCounts + 1, kTiles>...};
  kBySize[block.pixels - 1](block, sums, add);
}

struct Fma {
  using Packed = float;
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

  static void multiply(const conv::Block& block, float* sums, bool add) {
    constexpr std::make_integer_sequence<int, kMostPixels> kCounts;
    if (block.tiles == kMostTiles) {
      multiply_some<kMostTiles>(block, sums, add, kCounts);
    } else {
      multiply_some<1>(block, sums, add, kCounts);
    }
  }

  template <class T, class Span>
  static VF_HD void store(T* to, Vector<float> y, Span span) {
    VF_ISA::store(to, y, span);
  }
};

}  // namespace

void conv_fma(const ConvParams& p, int threads) {
  switch (p.dtype) {
    case kFloat16:
      return conv::run<Fma, float16>(p, threads);
    case kBFloat16:
      return conv::run<Fma, bfloat16>(p, threads);
    case kFloat32:
      return conv::run<Fma, float>(p, threads);
    default:
      cpu::refuse_dtype(p.dtype);
  }
}

void conv_pack_fma(const ConvPackParams& p, int threads) {
  switch (p.dtype) {
    case kFloat16:
      return conv::pack<float, float16>(p, threads);
    case kBFloat16:
      return conv::pack<float, bfloat16>(p, threads);
    case kFloat32:
      return conv::pack<float, float>(p, threads);
    default:
      cpu::refuse_dtype(p.dtype);
  }
}

}  // namespace VF_ISA
}  // namespace vovnet_fast

#endif
