// From sums over pixels to gradients of a weight and of its scale, in the layout of the weight.
#pragma once

#include "loops.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

// One output channel: multiples of its sums, and the sum of weight times sums. The gradient of an
// nn.Conv2d's weight has the taps of a channel side by side, sums have the channels of a tap so.
template <int kTaps, class Weight>
VF_HD double finish_by_channels(const float* products, const Weight* weight, float scale,
                                float* out, int64_t channels) {
  double sums[kTaps] = {};
  for (int64_t i = 0; i < channels; ++i, weight += kTaps, out += kTaps) {
    for (int tap = 0; tap < kTaps; ++tap) {
      const float product = products[tap * channels + i];
      out[tap] = product * scale;
      sums[tap] += static_cast<double>(widen(weight[tap])) * static_cast<double>(product);
    }
  }
  double sum = 0;
  for (int tap = 0; tap < kTaps; ++tap) sum += sums[tap];
  return sum;
}

template <class Weight>
VF_HD double finish_tap(const float* products, const Weight* weight, int64_t stride, float scale,
                        float* out, int64_t channels) {
  double sum = 0;
  if (stride == 1) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < channels; ++i) {
      out[i] = products[i] * scale;
      sum += static_cast<double>(widen(weight[i])) * static_cast<double>(products[i]);
    }
    return sum;
  }
  for (int64_t i = 0; i < channels; ++i) {
    out[i * stride] = products[i] * scale;
    sum += static_cast<double>(widen(weight[i * stride])) * static_cast<double>(products[i]);
  }
  return sum;
}

template <class Weight>
void finish_weight_grad(const ConvWeightGradFinishParams& p, int threads) {
  constexpr int kTaps = 9;
  const int64_t taps = p.kernel * p.kernel, size = taps * p.c_in;
  const bool by_channels =
      p.kernel == 3 && p.stride_w == 1 && p.stride_h == 3 && p.stride_i == kTaps;
  parallel(p.c_out, p.c_out * size, threads, [&](int64_t o) {
    const auto* products = static_cast<const float*>(p.products) + o * size;
    const auto* weight = static_cast<const Weight*>(p.weight.data) + o * p.stride_o;
    float* out = static_cast<float*>(p.dweight) + o * p.stride_o;
    const float scale = p.scale == nullptr ? 1.0f : static_cast<const float*>(p.scale)[o];
    double sum = 0;
    if (by_channels) {
      sum = finish_by_channels<kTaps>(products, weight, scale, out, p.c_in);
    } else {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t at = tap / p.kernel * p.stride_h + tap % p.kernel * p.stride_w;
        sum +=
            finish_tap(products + tap * p.c_in, weight + at, p.stride_i, scale, out + at, p.c_in);
      }
    }
    if (p.dscale != nullptr) static_cast<float*>(p.dscale)[o] = static_cast<float>(sum);
  });
}

// All engines have it.
VF_HD void finish_weight_grad(const ConvWeightGradFinishParams& p, int threads) {
  with_dtype(p.weight.dtype,
             [&](auto weight) { finish_weight_grad<decltype(weight)>(p, threads); });
}

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
