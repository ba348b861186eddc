// What engines that multiply in fp32 have beyond vector.h. For AVX2, AVX-512 and NEON.
#pragma once

#ifndef __aarch64__
#include <immintrin.h>
#endif

#include "vector.h"

namespace vovnet_fast {
inline namespace VF_ISA {

VF_HD Vector<float> same(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__aarch64__)
  return vdupq_n_f32(x);
#else
  return _mm256_set1_ps(x);
#endif
}

// One instruction, whether or not the compiler may contract products and sums.
VF_HD Vector<float> multiply_add(Vector<float> x, Vector<float> y, Vector<float> z) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(x, y, z);
#elif defined(__aarch64__)
  return vfmaq_f32(z, x, y);
#else
  return _mm256_fmadd_ps(x, y, z);
#endif
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
