// Blocks of a convolution by the matrix unit of Intel's processors (AMX).
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "conv_strips.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

// Eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr TileConfig kTileConfig;

// The intrinsics are macros that want numbers of registers.
#define VF_PRODUCTS(sum, pixels, weights)   \
  do {                                      \
    if constexpr (kIntegers) {              \
      _tile_dpbusd(sum, pixels, weights);   \
    } else {                                \
      _tile_dpbf16ps(sum, pixels, weights); \
    }                                       \
  } while (false)

// Tiles 0 to 3 are sums, 4 and 5 pixels, 6 and 7 weights. The intrinsics, which are macros, do not
// tell the compiler what memory they read.
template <class Sum, bool kTwoRows, bool kTwoColumns>
void multiply_tiles(const Block& block, Sum* sums) {
  constexpr bool kIntegers = std::is_integral_v<Sum>;
  asm volatile("" ::: "memory");
  _tile_zero(0);
  if (kTwoColumns) _tile_zero(1);
  if (kTwoRows) _tile_zero(2);
  if (kTwoRows && kTwoColumns) _tile_zero(3);
  const char *input = block.input, *weight = block.weight;
  const int64_t pixel_step = block.pixel_step;
  for (int64_t chunk = 0; chunk < block.chunks; ++chunk, input += block.chunk_step) {
    for (int tap = 0; tap < block.taps; ++tap, weight += kTileBytes) {
      const char* pixels = input + block.offsets[tap];
      _tile_loadd(4, pixels, pixel_step);
      _tile_loadd(6, weight, 64);
      VF_PRODUCTS(0, 4, 6);
      if (kTwoColumns) {
        _tile_loadd(7, weight + block.tile_step, 64);
        VF_PRODUCTS(1, 4, 7);
      }
      if (kTwoRows) {
        _tile_loadd(5, pixels + 16 * pixel_step, pixel_step);
        VF_PRODUCTS(2, 5, 6);
        if constexpr (kTwoColumns) VF_PRODUCTS(3, 5, 7);
      }
    }
  }
  constexpr int kRow = kTwoColumns ? 32 : 16, kRowBytes = kRow * 4;
  _tile_stored(0, sums, kRowBytes);
  if (kTwoColumns) _tile_stored(1, sums + 16, kRowBytes);
  if (kTwoRows) _tile_stored(2, sums + 16 * kRow, kRowBytes);
  if (kTwoRows && kTwoColumns) _tile_stored(3, sums + 16 * kRow + 16, kRowBytes);
}

// Not the intrinsic, which tells the compiler of eight bytes. Who emulates tiles has another.
#ifndef VF_LOAD_TILE_CONFIG
#define VF_LOAD_TILE_CONFIG(config) asm volatile("ldtilecfg %0" ::"m"(config))
#endif

// The registers are a thread's while it works.
class TileSession {
 public:
  TileSession() { VF_LOAD_TILE_CONFIG(kTileConfig); }
  ~TileSession() { _tile_release(); }
};

#undef VF_PRODUCTS

// An engine, but for how it stores.
template <class Packed_, class Sum_>
struct Tiles {
  using Packed = Packed_;
  using Sum = Sum_;
  using Session = TileSession;
  static constexpr int64_t kPixels = 32;
  static constexpr int kTiles = 2;
  static constexpr int64_t kSteps = INT64_MAX;
  static constexpr bool kByRows = false;
  static constexpr bool kDirect = true;

  static int64_t block_pixels(int64_t) { return kPixels; }

  static void multiply(const Block& block, Sum* sums, bool) {
    const bool two_rows = block.pixels > 16, two_columns = block.tiles == 2;
    const auto run =
        two_rows
            ? (two_columns ? multiply_tiles<Sum, true, true> : multiply_tiles<Sum, true, false>)
            : (two_columns ? multiply_tiles<Sum, false, true> : multiply_tiles<Sum, false, false>);
    run(block, sums);
  }
};

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
