// What engines that multiply in fp32 have beyond vector.h. For AVX2 and AVX-512.
#pragma once

#include <immintrin.h>

#include "vector.h"

namespace vovnet_fast {
inline namespace VF_ISA {

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

}  // namespace VF_ISA
}  // namespace vovnet_fast
