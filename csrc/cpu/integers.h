// What ops in eight bits have beyond vector.h.
#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "vector.h"

namespace vovnet_fast {
inline namespace VF_ISA {

using Floats = Vector<float>;
using Ints = Integers<float>;

VF_HD Floats to_floats(Ints y) { return __builtin_convertvector(y, Floats); }

// To nearest even; they must fit.
VF_HD Ints to_nearest(Floats y) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtps_epi32(0xffff, y);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtps_epi32(y);
#elif defined(__x86_64__)
  return (Ints)_mm_cvtps_epi32(y);
#else
  return (Ints)vcvtnq_s32_f32(y);
#endif
}

VF_HD Floats bounded(Floats y, Floats low, Floats high) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, _mm512_maskz_max_ps(0xffff, y, low), high);
#elif defined(__AVX2__)
  return _mm256_min_ps(_mm256_max_ps(y, low), high);
#elif defined(__x86_64__)
  return _mm_min_ps(_mm_max_ps(y, low), high);
#else
  return vminq_f32(vmaxq_f32(y, low), high);
#endif
}

VF_HD Floats at_most(Floats y, Floats high) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, y, high);
#elif defined(__AVX2__)
  return _mm256_min_ps(y, high);
#else
  return y < high ? y : high;
#endif
}

// The one rounding there is.
VF_HD Ints requantized(Ints acc, Floats multiplier, Floats low, Floats high) {
  return to_nearest(bounded(to_floats(acc) * multiplier, low, high));
}

#ifdef __AVX2__

// Two vectors of each of two pixels as bytes, side by side: what is negative becomes 0; none is
// above 255.
VF_HD void store_two(uint8_t* const* to, const Ints (&first)[2], const Ints (&second)[2]) {
#ifdef __AVX512F__
  const __m512i halves = _mm512_packs_epi32((__m512i)first[0], (__m512i)first[1]);
  const __m512i others = _mm512_packs_epi32((__m512i)second[0], (__m512i)second[1]);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes =
      _mm512_maskz_permutexvar_epi32(0xffff, order, _mm512_packus_epi16(halves, others));
#else
  const __m256i halves = _mm256_packs_epi32((__m256i)first[0], (__m256i)first[1]);
  const __m256i others = _mm256_packs_epi32((__m256i)second[0], (__m256i)second[1]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(halves, others), order);
#endif
  constexpr int kHalf = sizeof bytes / 2;
  const auto* from = reinterpret_cast<const char*>(&bytes);
  memcpy(to[0], from, kHalf);
  memcpy(to[1], from + kHalf, kHalf);
}

#endif

// Two numbers of 16 bits with a sign in each lane.
VF_HD Ints in_pairs(Ints low, Ints high) { return (low & 0xffff) | (high << 16); }

// The sums of both products of such lanes.
VF_HD Ints sums_of_pairs(Ints x, Ints y) {
#if defined(__AVX512F__)
  return (Ints)_mm512_madd_epi16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  return (Ints)_mm256_madd_epi16((__m256i)x, (__m256i)y);
#elif defined(__x86_64__)
  return (Ints)_mm_madd_epi16((__m128i)x, (__m128i)y);
#else
  return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

template <class Span>
VF_HD Ints load_signed(const int8_t* from, Span span) {
  const Ints bytes = load_bytes<float>(reinterpret_cast<const uint8_t*>(from), span);
  return (bytes << 24) >> 24;
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
