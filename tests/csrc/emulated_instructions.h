// Instructions of processors that this machine is not, in plain vectors: force-included into files
// of csrc/cpu, whose engines then run anywhere, slowly. After the manual of Intel's instruction
// sets: AMX's tdpbusd, and vpdpbusd and vpdpwssd of AVX-VNNI and AVX512-VNNI. None saturates.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

inline void require(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "emulated instructions: %s\n", what);
  abort();
}

// Sums of four products of unsigned and signed bytes, of 16 bits each at a time.
inline __m256i dpbusd(__m256i sums, __m256i bytes, __m256i signs) {
  const __m256i even = _mm256_and_si256(bytes, _mm256_set1_epi16(0xff));
  const __m256i odd = _mm256_srli_epi16(bytes, 8);
  const __m256i even_signs = _mm256_srai_epi16(_mm256_slli_epi16(signs, 8), 8);
  const __m256i odd_signs = _mm256_srai_epi16(signs, 8);
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(even, even_signs));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(odd, odd_signs));
}

inline __m256i dpwssd(__m256i sums, __m256i x, __m256i y) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(x, y));
}

#ifdef __AVX512BW__
inline __m512i dpwssd(__m512i sums, __m512i x, __m512i y) {
  return _mm512_add_epi32(sums, _mm512_madd_epi16(x, y));
}

inline __m512i dpbusd(__m512i sums, __m512i bytes, __m512i signs) {
  const __m512i even = _mm512_and_si512(bytes, _mm512_set1_epi16(0xff));
  const __m512i odd = _mm512_srli_epi16(bytes, 8);
  const __m512i even_signs = _mm512_srai_epi16(_mm512_slli_epi16(signs, 8), 8);
  const __m512i odd_signs = _mm512_srai_epi16(signs, 8);
  sums = _mm512_add_epi32(sums, _mm512_madd_epi16(even, even_signs));
  return _mm512_add_epi32(sums, _mm512_madd_epi16(odd, odd_signs));
}
#endif

// Eight tiles of 16 rows of 64 bytes, of a thread.
struct Tiles {
  bool configured = false;
  alignas(64) uint8_t rows[8][16][64];
};

inline Tiles& tiles() {
  static thread_local Tiles found;
  return found;
}

inline uint8_t (*tile(int number))[64] {
  require(tiles().configured, "a tile is used that was not configured, or is released");
  return tiles().rows[number];
}

template <class Config>
void configure(const Config& config) {
  static_assert(sizeof(Config) == 64, "the operand of ldtilecfg");
  uint8_t bytes[64];
  memcpy(bytes, &config, 64);
  require(bytes[0] == 1 && bytes[1] == 0, "a palette other than the first, or a start row");
  for (int i = 0; i < 8; ++i) {
    uint16_t columns;
    memcpy(&columns, bytes + 16 + 2 * i, 2);
    require(columns == 64 && bytes[48 + i] == 16, "tiles other than of 16 rows of 64 bytes");
  }
  tiles().configured = true;
  memset(tiles().rows, 0, sizeof(tiles().rows));
}

inline void zero(int to) { memset(tile(to), 0, 1024); }

inline void load(int to, const void* from, int64_t step) {
  for (int i = 0; i < 16; ++i) memcpy(tile(to)[i], static_cast<const char*>(from) + i * step, 64);
}

inline void store(int from, void* to, int64_t step) {
  for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(to) + i * step, tile(from)[i], 64);
}

// sums[m][n] += the sum over k and i of a[m][4 k + i] * b[k][4 n + i].
inline void tile_dpbusd(int to, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    uint32_t sums[16];
    memcpy(sums, tile(to)[m], 64);
    for (int k = 0; k < 16; ++k) {
      const uint8_t* bytes = tile(a)[m] + 4 * k;
      const int8_t* signs = reinterpret_cast<const int8_t*>(tile(b)[k]);
      for (int n = 0; n < 16; ++n) {
        for (int i = 0; i < 4; ++i) sums[n] += uint32_t(int(bytes[i]) * int(signs[4 * n + i]));
      }
    }
    memcpy(tile(to)[m], sums, 64);
  }
}

}  // namespace emulated

#define VF_LOAD_TILE_CONFIG(config) emulated::configure(config)
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#undef _mm256_dpbusd_avx_epi32
#undef _mm512_dpbusd_epi32
#undef _mm256_dpwssd_avx_epi32
#undef _mm512_dpwssd_epi32
#define _tile_release() (emulated::tiles().configured = false)
#define _tile_zero(to) emulated::zero(to)
#define _tile_loadd(to, from, step) emulated::load(to, from, step)
#define _tile_stored(from, to, step) emulated::store(from, to, step)
#define _tile_dpbusd(to, a, b) emulated::tile_dpbusd(to, a, b)
#define _tile_dpbf16ps(to, a, b) emulated::require(false, "bf16 is not emulated")
#define _mm256_dpbusd_avx_epi32(sums, a, b) emulated::dpbusd(sums, a, b)
#define _mm512_dpbusd_epi32(sums, a, b) emulated::dpbusd(sums, a, b)
#define _mm256_dpwssd_avx_epi32(sums, a, b) emulated::dpwssd(sums, a, b)
#define _mm512_dpwssd_epi32(sums, a, b) emulated::dpwssd(sums, a, b)
