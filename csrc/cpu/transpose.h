// The transpose of 16 rows of 16 units of four bytes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "vector.h"

namespace vovnet_fast {
inline namespace VF_ISA {

constexpr int kSide = 16;

#if defined(__AVX512F__)
// (Masked by ones: of the other forms GCC warns.)
VF_HD void transpose(__m512i (&rows)[kSide], char* to) {
  constexpr __mmask16 kAll = 0xffff;
  constexpr __mmask8 kAllTwos = 0xff;
  constexpr int64_t kRow = 64;
  __m512i twos[kSide], fours[kSide];
#pragma GCC unroll 8
  for (int i = 0; i < kSide; i += 2) {
    twos[i] = _mm512_maskz_unpacklo_epi32(kAll, rows[i], rows[i + 1]);
    twos[i + 1] = _mm512_maskz_unpackhi_epi32(kAll, rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kSide; i += 4) {
    fours[i] = _mm512_maskz_unpacklo_epi64(kAllTwos, twos[i], twos[i + 2]);
    fours[i + 1] = _mm512_maskz_unpackhi_epi64(kAllTwos, twos[i], twos[i + 2]);
    fours[i + 2] = _mm512_maskz_unpacklo_epi64(kAllTwos, twos[i + 1], twos[i + 3]);
    fours[i + 3] = _mm512_maskz_unpackhi_epi64(kAllTwos, twos[i + 1], twos[i + 3]);
  }
  // Lane k of fours[4 r + c] is column 4 k + c of rows 4 r to 4 r + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_maskz_shuffle_i32x4(kAll, fours[c], fours[4 + c], 0x88);
    const __m512i b = _mm512_maskz_shuffle_i32x4(kAll, fours[c], fours[4 + c], 0xdd);
    const __m512i d = _mm512_maskz_shuffle_i32x4(kAll, fours[8 + c], fours[12 + c], 0x88);
    const __m512i e = _mm512_maskz_shuffle_i32x4(kAll, fours[8 + c], fours[12 + c], 0xdd);
    _mm512_storeu_si512(to + c * kRow, _mm512_maskz_shuffle_i32x4(kAll, a, d, 0x88));
    _mm512_storeu_si512(to + (c + 4) * kRow, _mm512_maskz_shuffle_i32x4(kAll, b, e, 0x88));
    _mm512_storeu_si512(to + (c + 8) * kRow, _mm512_maskz_shuffle_i32x4(kAll, a, d, 0xdd));
    _mm512_storeu_si512(to + (c + 12) * kRow, _mm512_maskz_shuffle_i32x4(kAll, b, e, 0xdd));
  }
}
#endif

// Rows that lie one after another, to the same somewhere else.
VF_HD void transpose(const void* from, char* to) {
#if defined(__AVX512F__)
  __m512i rows[kSide];
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) {
    rows[i] = _mm512_loadu_si512(static_cast<const char*>(from) + i * int64_t{64});
  }
  transpose(rows, to);
#else
  uint32_t units[kSide][kSide], tile[kSide][kSide];
  memcpy(units, from, sizeof units);
  for (int k = 0; k < kSide; ++k) {
    for (int o = 0; o < kSide; ++o) tile[k][o] = units[o][k];
  }
  memcpy(to, tile, sizeof tile);
#endif
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
