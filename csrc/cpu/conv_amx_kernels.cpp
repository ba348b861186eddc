// Convolution by the matrix unit of Intel's processors (AMX): bf16, sums in fp32.
#include <immintrin.h>

#include "conv_strips.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

// Eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr TileConfig kTileConfig;

// Tiles 0 to 3 are sums, 4 and 5 pixels, 6 and 7 weights. The intrinsics, which are macros, do not
// tell the compiler what memory they read.
template <bool kTwoRows, bool kTwoColumns>
void multiply_tiles(const conv::Block& block, float* sums) {
  asm volatile("" ::: "memory");
  _tile_zero(0);
  if (kTwoColumns) _tile_zero(1);
  if (kTwoRows) _tile_zero(2);
  if (kTwoRows && kTwoColumns) _tile_zero(3);
  const char *input = block.input, *weight = block.weight;
  const int64_t pixel_step = block.pixel_step;
  for (int64_t chunk = 0; chunk < block.chunks; ++chunk, input += block.chunk_step) {
    for (int tap = 0; tap < block.taps; ++tap, weight += conv::kTileBytes) {
      const char* pixels = input + block.offsets[tap];
      _tile_loadd(4, pixels, pixel_step);
      _tile_loadd(6, weight, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (kTwoColumns) {
        _tile_loadd(7, weight + block.tile_step, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (kTwoRows) {
        _tile_loadd(5, pixels + 16 * pixel_step, pixel_step);
        _tile_dpbf16ps(2, 5, 6);
        if (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  constexpr int kRow = kTwoColumns ? 32 : 16, kRowBytes = kRow * 4;
  _tile_stored(0, sums, kRowBytes);
  if (kTwoColumns) _tile_stored(1, sums + 16, kRowBytes);
  if (kTwoRows) _tile_stored(2, sums + 16 * kRow, kRowBytes);
  if (kTwoRows && kTwoColumns) _tile_stored(3, sums + 16 * kRow + 16, kRowBytes);
}

struct Amx {
  using Packed = bfloat16;
  static constexpr int64_t kPixels = 32;
  static constexpr int kTiles = 2;
  static constexpr int64_t kSteps = INT64_MAX;
  static constexpr bool kByRows = false;
  static constexpr bool kDirect = true;

  class Session {
   public:
    Session() { asm volatile("ldtilecfg %0" ::"m"(kTileConfig)); }
    ~Session() { _tile_release(); }
  };

  static int64_t block_pixels(int64_t) { return kPixels; }

  static void multiply(const conv::Block& block, float* sums, bool) {
    if (block.pixels > 16) {
      (block.tiles == 2 ? multiply_tiles<true, true> : multiply_tiles<true, false>)(block, sums);
    } else {
      (block.tiles == 2 ? multiply_tiles<false, true> : multiply_tiles<false, false>)(block, sums);
    }
  }

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

}  // namespace

void conv_amx(const ConvParams& p, int threads) { conv::run<Amx, bfloat16>(p, threads); }

void conv_pack_amx(const ConvPackParams& p, int threads) {
  conv::pack<bfloat16, bfloat16>(p, threads);
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
