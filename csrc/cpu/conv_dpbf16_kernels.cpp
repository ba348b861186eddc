// Convolution in bf16 by AVX512-BF16 (vdpbf16ps): products of pairs, sums in fp32.
#include <immintrin.h>

#include "conv_registers.h"
#include "conv_weight_grad_pairs.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

VF_HD Vector<float> add_products(Vector<float> x, Vector<float> y, Vector<float> sums) {
  return _mm512_dpbf16_ps(sums, (__m512bh)x, (__m512bh)y);
}

struct Unit {
  using Packed = bfloat16;
  using Sum = float;
  static constexpr bool kTrim = false;
  static VF_HD Vector<float> multiply(Vector<float> pixel, Vector<float> weights,
                                      Vector<float> sums) {
    return add_products(pixel, weights, sums);
  }
};

struct Dpbf16 : conv::Registers<Unit> {
  template <class Span>
  static VF_HD void store(bfloat16* to, Vector<float> y, Span span) {
    VF_ISA::store(to, y, span);
  }
};

// The products of kRows channels of g, which lie in a tile each, with all of x.
constexpr int kMostRows = 8;

template <int kRows, int kTiles>
VF_HD void multiply_rows(const conv::Pairs& pairs, const char* g, float* out, bool full) {
  Vector<float> sum[kRows][kTiles];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kTiles; ++v) sum[i][v] = Vector<float>{};
  }
  const char* x = pairs.x;
  for (int64_t step = 0; step < pairs.steps; ++step, x += conv::kTileBytes, g += conv::kTileBytes) {
#pragma GCC unroll 2
    for (int k = 0; k < 16; ++k) {
      Vector<float> pixel[kTiles];
#pragma GCC unroll 2
      for (int v = 0; v < kTiles; ++v) {
        pixel[v] = load(reinterpret_cast<const float*>(x + v * pairs.x_step) + k * 16, Full{});
      }
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const auto gradient = same(reinterpret_cast<const float*>(g)[i * 16 + k]);
#pragma GCC unroll 2
        for (int v = 0; v < kTiles; ++v) sum[i][v] = add_products(gradient, pixel[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kTiles; ++v) {
      float* to = out + i * pairs.out_step + v * 16;
      const auto put = [&](auto span) VF_LAMBDA {
        store(to, pairs.add ? sum[i][v] + load(to, span) : sum[i][v], span);
      };
      const int left = pairs.columns - v * 16;
      if (full || left >= 16) {
        put(Full{});
      } else {
        put(Part{left});
      }
    }
  }
}

template <int kTiles>
void multiply_pairs(const conv::Pairs& pairs) {
  const bool full = pairs.columns == kTiles * 16;
  for (int row = 0; row < pairs.rows; row += kMostRows) {
    const char* g = pairs.g + row / 16 * pairs.g_step + row % 16 * conv::kChunkBytes;
    float* out = pairs.out + row * pairs.out_step;
    if (pairs.rows - row >= kMostRows) {
      multiply_rows<kMostRows, kTiles>(pairs, g, out, full);
    } else {
      for (int i = 0; i < pairs.rows - row; ++i) {
        multiply_rows<1, kTiles>(pairs, g + i * conv::kChunkBytes, out + i * pairs.out_step, full);
      }
    }
  }
}

struct Dpbf16Pairs {
  class Session {
   public:
    ~Session() {}
  };

  static void multiply(const conv::Pairs& pairs) {
    pairs.columns > 16 ? multiply_pairs<2>(pairs) : multiply_pairs<1>(pairs);
  }
};

}  // namespace

void conv_dpbf16(const ConvParams& p, int threads) { conv::run<Dpbf16, bfloat16>(p, threads); }

void conv_pack_dpbf16(const ConvPackParams& p, int threads) {
  conv::pack<bfloat16, bfloat16>(p, threads);
}

void conv_weight_grad_dpbf16(const ConvWeightGradParams& p, int threads) {
  conv::run_weight_grad_pairs<Dpbf16Pairs>(p, threads);
}

void conv_weight_grad_finish_dpbf16(const ConvWeightGradFinishParams& p, int threads) {
  conv::finish_weight_grad(p, threads);
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
