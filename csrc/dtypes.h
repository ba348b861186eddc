// Storage types, and the numbers that are computed with: float, or double for double.
//
// widen(x) is the number that x stands for; narrow<T>(y) rounds to nearest even. Under nvcc half
// and bfloat16 are CUDA's; on the host they are 16 bits with conversions of their own.
#pragma once

#include <cstdint>
#include <cstring>

#include "math.h"
#include "params.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace vovnet_fast {
inline namespace VF_ISA {

#ifdef __CUDACC__

using float16 = __half;
using bfloat16 = __nv_bfloat16;

VF_HD float widen(float16 x) { return __half2float(x); }
VF_HD float widen(bfloat16 x) { return __bfloat162float(x); }

namespace detail {
VF_HD void narrow_to(float16& out, float y) { out = __float2half_rn(y); }
VF_HD void narrow_to(bfloat16& out, float y) { out = __float2bfloat16_rn(y); }
}  // namespace detail

#else

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

namespace detail {

VF_HD uint32_t bits_of(float y) {
  uint32_t bits;
  memcpy(&bits, &y, sizeof bits);
  return bits;
}

VF_HD float float_of(uint32_t bits) {
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

}  // namespace detail

VF_HD float widen(bfloat16 x) { return detail::float_of(static_cast<uint32_t>(x.bits) << 16); }

VF_HD float widen(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // Inf, and NaN with its payload.
    return detail::float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  // The exponent is rebased by a product, which is exact and normalises subnormals.
  const float y = detail::float_of(magnitude << 13) * detail::float_of(0x77800000u);  // 2^112
  return detail::float_of(sign | detail::bits_of(y));
}

namespace detail {

VF_HD void narrow_to(bfloat16& out, float y) {
  const uint32_t bits = bits_of(y);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(y != y ? (bits >> 16) | 0x40u : rounded);
}

VF_HD void narrow_to(float16& out, float y) {
  const uint32_t bits = bits_of(y);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t found;
  if (magnitude > 0x7f800000u) {
    found = 0x7e00u | ((magnitude >> 13) & 0x1ffu);  // NaN, quiet.
  } else if (magnitude >= 0x477ff000u) {
    found = 0x7c00u;  // Rounds beyond 65504: Inf.
  } else if (magnitude >= 0x38800000u) {
    found = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {
    // Subnormal: the sum with 0.5 leaves what is kept in the lowest bits, rounded by the hardware.
    found = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  }
  out.bits = static_cast<uint16_t>(sign | found);
}

}  // namespace detail

#endif

namespace detail {
VF_HD void narrow_to(float& out, float y) { out = y; }
VF_HD void narrow_to(double& out, double y) { out = y; }
template <class T>
struct HighOf {
  using type = float;
};
template <>
struct HighOf<double> {
  using type = double;
};
}  // namespace detail

VF_HD float widen(float x) { return x; }
VF_HD double widen(double x) { return x; }

// What T is computed in.
template <class T>
using High = typename detail::HighOf<T>::type;

template <class T>
VF_HD T narrow(High<T> y) {
  T out;
  detail::narrow_to(out, y);
  return out;
}

// Element i of an array of any dtype.
template <class Number>
VF_HD Number element(const Array& array, int64_t i) {
  switch (array.dtype) {
    case kFloat16:
      return static_cast<Number>(widen(static_cast<const float16*>(array.data)[i]));
    case kBFloat16:
      return static_cast<Number>(widen(static_cast<const bfloat16*>(array.data)[i]));
    case kFloat32:
      return static_cast<Number>(static_cast<const float*>(array.data)[i]);
    default:
      return static_cast<Number>(static_cast<const double*>(array.data)[i]);
  }
}

// The same, or a number where the array is absent.
template <class Number>
VF_HD Number element_or(const Array& array, int64_t i, Number absent) {
  return array.data == nullptr ? absent : element<Number>(array, i);
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
