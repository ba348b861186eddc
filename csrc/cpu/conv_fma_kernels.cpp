// Convolution in fp32, and by fp32 in half precision.
#ifdef __AVX2__

#include <immintrin.h>

#include <utility>

#include "conv_strips.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

// The largest block whose sums fit into the registers, beside a row of weights and a pixel.
#ifdef __AVX512F__
constexpr int kMostPixels = 14, kMostTiles = 2;
#else
constexpr int kMostPixels = 6, kMostTiles = 1;
#endif

VF_HD Vector<float> same(float x) {
#ifdef __AVX512F__
  return _mm512_set1_ps(x);
#else
  return _mm256_set1_ps(x);
#endif
}

// One instruction, whether or not the compiler may contract products and sums.
VF_HD Vector<float> multiply_add(Vector<float> x, Vector<float> y, Vector<float> z) {
#ifdef __AVX512F__
  return _mm512_fmadd_ps(x, y, z);
#else
  return _mm256_fmadd_ps(x, y, z);
#endif
}

// All sums are in registers, which takes the loops over them unrolled.
template <int kPixels, int kTiles>
void multiply_pixels(const conv::Block& block, float* sums, bool add) {
  constexpr int kPerTile = 16 / kLanes<float>, kVectors = kTiles * kPerTile;
  Vector<float> sum[kPixels][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Vector<float>{};
  }
  const char *input = block.input, *weight = block.weight;
  for (int64_t chunk = 0; chunk < block.chunks; ++chunk, input += block.chunk_step) {
    for (int tap = 0; tap < block.taps; ++tap, weight += conv::kTileBytes) {
      const auto* pixels = reinterpret_cast<const float*>(input + block.offsets[tap]);
#pragma GCC unroll 4
      for (int k = 0; k < 16; ++k) {
        Vector<float> row[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const char* tile = weight + v / kPerTile * block.tile_step;
          row[v] = load(
              reinterpret_cast<const float*>(tile) + k * 16 + v % kPerTile * kLanes<float>, Full{});
        }
#pragma GCC unroll 16
        for (int i = 0; i < kPixels; ++i) {
          const auto pixel = same(pixels[i * 16 + k]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add(pixel, row[v], sum[i][v]);
        }
      }
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
