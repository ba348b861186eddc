// Where everything lies in the convolution for sm_80 and newer: tiles, shared memory, fragments.
//
// Plain arithmetic for host and device.
//
// Shared memory holds rows of 64 bytes: a chunk of the input channels of one pixel, or of one tap
// of one output channel. A row has four units of 16 bytes; two rows fill the 32 banks. Unit u of
// row r lies at place u ^ (r / 2 % 4) of its row, so that the same unit of any eight rows in a row,
// which is what a phase of ldmatrix reads, and both of any two, which is what a phase of cp.async
// writes, lie in different banks.
//
// A strip is the input of a tile with its halo: it is fetched once for all nine taps, which read it
// at other rows. With stride 2 its even columns come first, then the odd ones: neighbours among the
// outputs then read neighbours among the rows, whichever the tap.
#pragma once

#include <cstdint>

#include "../../math.h"

namespace vovnet_fast {
namespace conv_sm80 {

constexpr int kWarp = 32;
constexpr int kWarpsDown = 4;    // over the pixels of a tile,
constexpr int kWarpsAcross = 2;  // and over its channels.
constexpr int kThreads = kWarpsDown * kWarpsAcross * kWarp;

constexpr int kUnitBytes = 16;
constexpr int kUnits = 4;  // of a row
constexpr int kRowBytes = kUnits * kUnitBytes;
constexpr int kStepUnits = 2;  // of the rows that one mma.sync multiplies
constexpr int kSteps = kUnits / kStepUnits;
constexpr int kBlockRows = 16;    // pixels of one mma.sync,
constexpr int kBlockColumns = 8;  // and output channels.
constexpr int kStripStages = 2;   // of strips that nine taps read
constexpr int kMinStages = 3, kMaxStages = 4;

// f(output channels of a tile, whether there are tiles of 256 pixels by them): with more than 128
// sums a thread has no registers left. Tests compile a few of them, of each form one.
#ifdef VF_CONV_SM80_FEW
#define VF_CONV_SM80_TILES(f) f(80, true) f(128, true) f(224, false)
#else
#define VF_CONV_SM80_TILES(f)                                                               \
  f(64, true) f(80, true) f(96, true) f(112, true) f(128, true) f(160, false) f(192, false) \
      f(224, false) f(256, false)
#endif

// Strides of a view, in bytes.
struct Pitches {
  int64_t n, h, w;
};

// All that the kernel is told.
struct Problem {
  const char* x;
  const char* weight;
  char* out;
  const char* add;   // or null
  const char* mask;  // or null
  const float* scale;
  const float* shift;    // or null, both
  float* pool_partials;  // or null
  float* statistics;     // or null
  Pitches x_pitch, out_pitch, add_pitch, mask_pitch;
  int64_t filter_bytes;   // of an output channel
  int32_t height, width;  // of x
  int32_t out_height, out_width, c_out, relu;
  int32_t add_c, mask_c;
  int32_t kernel, stride, pad;
  int32_t tap_bytes;  // of an output channel
  int32_t tile_h, tile_w;
  int32_t strip_rows, pitch, even;  // rows of a strip; of one line of it; of its even columns
  uint32_t pitch_magic, tile_magic, kernel_magic;  // divide by pitch, tile_w and kernel
  int32_t down, across, groups;      // tiles: of lines, of columns, of output channels
  int32_t taps, chunks, last_units;  // units that the last chunk has
  int32_t stages, strip_stages;
};

// ---- Divisions ---------------------------------------------------------------------------------

// a / b = high 32 bits of a * magic(b), for a < 2^16, and b from 2 to 2^16.
inline uint32_t magic(int b) { return b == 1 ? 0 : 0xffffffffu / static_cast<uint32_t>(b) + 1; }

VF_HD int divide(int a, uint32_t magic) {
  if (magic == 0) return a;
#ifdef __CUDA_ARCH__
  return static_cast<int>(__umulhi(static_cast<uint32_t>(a), magic));
#else
  return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(a)) * magic >> 32);
#endif
}

// ---- Tiles -------------------------------------------------------------------------------------

// What a block computes.
struct Tile {
  int n, h, w;      // its first output pixel
  int first;        // its first output channel; the last tile may reach beyond c_out
  int64_t partial;  // which of all partials is its own
  int parity;       // of its pixels, in an input gradient with stride 2: input_grad.cuh
};

// Tiles that share pixels are neighbours: the second one finds them in L2.
VF_HD Tile tile_at(const Problem& p, int block_out, int index) {
  const int rectangle = index / p.groups;
  const int of_image = rectangle % (p.down * p.across);
  return {rectangle / (p.down * p.across),
          of_image / p.across * p.tile_h,
          of_image % p.across * p.tile_w,
          index % p.groups * block_out,
          rectangle,
          0};
}

// ---- Strips ------------------------------------------------------------------------------------

// Where a row of a strip lies in the image.
struct Pixel {
  int h, w;
};

VF_HD Pixel strip_pixel(const Problem& p, const Tile& tile, int row) {
  const int line = divide(row, p.pitch_magic), place = row - line * p.pitch;
  const int column =
      p.stride == 1 ? place : (place < p.even ? 2 * place : 2 * (place - p.even) + 1);
  return {tile.h * p.stride + line - p.pad, tile.w * p.stride + column - p.pad};
}

// The row of a strip that the first tap of pixel `index` of a tile reads,
VF_HD int first_row(const Problem& p, int index) {
  const int h = divide(index, p.tile_magic), w = index - h * p.tile_w;
  return h * p.stride * p.pitch + w;
}

// and how many rows later those of another tap are.
VF_HD int tap_rows(const Problem& p, int tap) {
  const int line = divide(tap, p.kernel_magic), column = tap - line * p.kernel;
  return line * p.pitch + (p.stride == 1 ? column : (column & 1) * p.even + (column >> 1));
}

// ---- Shared memory -----------------------------------------------------------------------------

// Of a unit of a row, in bytes from the start of the strip or the weights.
VF_HD uint32_t unit_at(int row, int unit) {
  return static_cast<uint32_t>(row * kRowBytes + ((unit ^ (row >> 1 & 3)) * kUnitBytes));
}

VF_HD uint32_t strip_at(const Problem& p, int stage) {
  return static_cast<uint32_t>(stage * p.strip_rows * kRowBytes);
}

VF_HD uint32_t weights_at(const Problem& p, int block_out, int stage) {
  return strip_at(p, p.strip_stages) + static_cast<uint32_t>(stage * block_out * kRowBytes);
}

// Sums of the warps take the place of what was multiplied: two rows for each warp of pixels.
VF_HD uint32_t sums_at(int block_out, int set, int warp_down) {
  return static_cast<uint32_t>((set * kWarpsDown + warp_down) * block_out * 4);
}

inline uint32_t shared_bytes(const Problem& p, int block_out) {
  const uint32_t rings = weights_at(p, block_out, p.stages), sums = sums_at(block_out, 2, 0);
  return rings > sums ? rings : sums;
}

// ---- Fragments ---------------------------------------------------------------------------------
// (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "for mma.m16n8k8" with .tf32.) A thread holds
// four sums of a block of 16 pixels by 8 channels: sum 2i + k is that of pixel 8i + lane / 4 and of
// channel 2 * (lane % 4) + k.

// Of ldmatrix.x4 on 16 pixels: which pixel and which unit of the step a lane points at,
VF_HD int pixel_of(int lane) { return lane & 15; }
VF_HD int pixel_unit_of(int lane) { return lane >> 4; }
// and on 16 output channels, which are two operands.
VF_HD int channel_of(int lane) { return (lane & 7) + (lane >> 4) * 8; }
VF_HD int channel_unit_of(int lane) { return lane >> 3 & 1; }

}  // namespace conv_sm80
}  // namespace vovnet_fast
