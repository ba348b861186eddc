// Convolution by the matrix unit of Intel's processors (AMX): bf16, sums in fp32.
#include "amx.h"
#include "conv_weight_grad_pairs.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

struct Amx : conv::Tiles<bfloat16, float> {
  // As all of AMX, it takes subnormal numbers for zero.
  static VF_HD void store(bfloat16* to, Vector<float> y, Full) {
    const __m256bh rounded = _mm512_cvtneps_pbh(y);
    memcpy(to, &rounded, sizeof rounded);
  }

  static VF_HD void store(bfloat16* to, Vector<float> y, Part part) {
    bfloat16 all[kLanes<float>];
    store(all, y, Full{});
    for (int i = 0; i < part.count; ++i) to[i] = all[i];
  }
};

// Tiles 0 to 3 are sums, 4 and 5 channels of g, 6 and 7 of x.
template <bool kTwoRows, bool kTwoColumns>
void multiply_pairs(const conv::Pairs& pairs, float* out, int64_t out_step, bool add) {
  asm volatile("" ::: "memory");
  float* lower = out + 16 * out_step;
  const int64_t row_bytes = out_step * 4;
  if (add) {
    _tile_loadd(0, out, row_bytes);
    if (kTwoColumns) _tile_loadd(1, out + 16, row_bytes);
    if (kTwoRows) _tile_loadd(2, lower, row_bytes);
    if (kTwoRows && kTwoColumns) _tile_loadd(3, lower + 16, row_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const char *x = pairs.x, *g = pairs.g;
  for (int64_t step = 0; step < pairs.steps; ++step) {
    _tile_loadd(4, g, 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoColumns) {
      _tile_loadd(7, x + pairs.x_step, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoRows) {
      _tile_loadd(5, g + pairs.g_step, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
    x += conv::kTileBytes;
    g += conv::kTileBytes;
  }
  _tile_stored(0, out, row_bytes);
  if (kTwoColumns) _tile_stored(1, out + 16, row_bytes);
  if (kTwoRows) _tile_stored(2, lower, row_bytes);
  if (kTwoRows && kTwoColumns) _tile_stored(3, lower + 16, row_bytes);
}

struct AmxPairs {
  using Session = conv::TileSession;

  static void multiply(const conv::Pairs& pairs) {
    const bool two_rows = pairs.rows > 16, two_columns = pairs.columns > 16;
    const auto run =
        two_rows ? (two_columns ? multiply_pairs<true, true> : multiply_pairs<true, false>)
                 : (two_columns ? multiply_pairs<false, true> : multiply_pairs<false, false>);
    if (pairs.rows % 16 == 0 && pairs.columns % 16 == 0) {
      return run(pairs, pairs.out, pairs.out_step, pairs.add);
    }
    alignas(64) float sums[32 * 32];
    run(pairs, sums, 32, false);
    for (int64_t i = 0; i < pairs.rows; ++i) {
      float* to = pairs.out + i * pairs.out_step;
      for (int64_t k = 0; k < pairs.columns; ++k) {
        to[k] = pairs.add ? to[k] + sums[i * 32 + k] : sums[i * 32 + k];
      }
    }
  }
};

}  // namespace

void conv_amx(const ConvParams& p, int threads) { conv::run<Amx, bfloat16>(p, threads); }

void conv_pack_amx(const ConvPackParams& p, int threads) {
  conv::pack<bfloat16, bfloat16>(p, threads);
}

void conv_weight_grad_amx(const ConvWeightGradParams& p, int threads) {
  conv::run_weight_grad_pairs<AmxPairs>(p, threads);
}

void conv_weight_grad_finish_amx(const ConvWeightGradFinishParams& p, int threads) {
  conv::finish_weight_grad(p, threads);
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
