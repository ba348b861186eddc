// Where everything lies in the Hopper convolution: tiles, shared memory, descriptors, fragments.
//
// Plain arithmetic for host and device. The kernel computes with it, and so does the simulator that
// the tests run the kernel on.
//
// Shared memory holds rows of 128 bytes: a chunk of the input channels of one pixel, or of one tap
// of one output channel. Those are 64 in fp16 and bf16, and 128 in e4m3. Eight rows, 1024 bytes,
// make an atom of the 128-byte swizzle, in which bits 4-6 of an address are XORed with its bits
// 7-9. Bulk copies write that pattern and WGMMA reads it, both by the address itself, so that
// operands which start at an atom need no base offset.
//
// A strip is what the three taps of a column read: tile_h + 2 rows of tile_w pixels, copied once
// for each of the three columns. The taps of one column start tile_w rows of 128 bytes apart, which
// are whole atoms, as tile_w is a multiple of 8. (To share one copy among the columns too, operands
// would have to start within an atom, at every pixel.)
#pragma once

#include <cstdint>

#include "../../math.h"

namespace vovnet_fast {
namespace conv_sm90 {

constexpr int kRowBytes = 128;  // of a chunk: input channels of a step of the pipeline
constexpr int kStepBytes = 32;  // of the input channels of one WGMMA
constexpr int kAtomRows = 8;
constexpr int kAtomBytes = kAtomRows * kRowBytes;
constexpr int kBlockRows = 64;  // pixels of one WGMMA
constexpr int kUnit = 8;        // output channels of one store of 16 bytes

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups that multiply; one more fetches
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kBarrierBytes = 8;
constexpr int kMaxStages = 8;

// Strides of a [N, H, W, C] view in elements.
struct Pitch {
  int64_t n, h, w;
};

// All that the kernel is told, besides where to copy from.
struct Problem {
  const float* scale;    // [C_out], or null; in e4m3 the multiplier
  const float* shift;    // [C_out]; in e4m3 the bias
  float* pool_partials;  // [N, down * across, C_out], or null
  void* out;             // [N, H, W, C_out]; in e4m3 it may be null
  const void* add;       // [N, H, W, add_c], of the first channels; may be out
  const void* mask;      // [N, H, W, mask_c], of the last channels
  Pitch out_pitch, add_pitch, mask_pitch;
  float* feature;     // [N, H, W, C_out], or null; this and what follows in e4m3 alone
  const float* unit;  // [C_out]
  Pitch feature_pitch;
  int32_t height, width, c_out, kernel, relu;
  int32_t add_c, mask_c;  // 0: nothing is added, or masks
  int32_t tile_h, tile_w, block_out;
  int32_t down, across;                      // tiles of an image: of rows, of columns
  int32_t rectangles;                        // of all images
  int32_t cluster_pixels, cluster_channels;  // tiles of a cluster
  int32_t parts;                             // CTAs of each of them
  int32_t turns;                             // a tile is one warpgroup's, not both's
  int32_t cluster_shift;                     // cluster_pixels is 2 to its power
  int32_t part_shift;                        // of a part, CTAs are at most 2 to its power
  int32_t strip_sharers, weight_sharers;     // of the first of a cluster, by bits
  int32_t groups;                            // clusters' steps along the output channels
  int32_t tiles;                             // of clusters, over all images
  int32_t in_bytes;                          // of all input channels of a pixel
  int32_t chunk, chunks;                     // input channels of one, and how many there are
  int32_t x_stages, w_stages;                // depth of the rings of strips and of weights of a tap
  int32_t resident;  // weights stay where they are: their ring has room for all
};

// ---- Tiles -------------------------------------------------------------------------------------

// What one pass of a CTA computes.
struct Tile {
  int n, h, w;      // its first pixel
  int first;        // its first output channel
  int64_t partial;  // which of all pool partials is its own
};

VF_HD int cluster_tiles(const Problem& p) { return p.cluster_pixels * p.cluster_channels; }
VF_HD int cluster_size(const Problem& p) { return cluster_tiles(p) * p.parts; }

// Ranks in a cluster: pixels fastest, then channels, then parts.
VF_HD int part_of(const Problem& p, int rank) { return rank >> p.part_shift; }
VF_HD int rank_in_part(const Problem& p, int rank) { return rank & ((1 << p.part_shift) - 1); }

// CTAs of a part that read the same: strips, those that differ in their channels, and weights,
// those that differ in their pixels. One after the other fetches it for all of them.
VF_HD int own_of_strips(const Problem& p, int rank) {
  return rank_in_part(p, rank) >> p.cluster_shift;
}
VF_HD int own_of_weights(const Problem& p, int rank) {
  return rank_in_part(p, rank) & (p.cluster_pixels - 1);
}
// The rank of the first of them.
VF_HD int first_of_strips(const Problem& p, int rank) {
  return rank - own_of_strips(p, rank) * p.cluster_pixels;
}
VF_HD int first_of_weights(const Problem& p, int rank) { return rank - own_of_weights(p, rank); }

// The sharers of the CTA with rank 0, by bits: those of another one follow by its first.
VF_HD int strip_sharers(int cluster_pixels, int cluster_channels) {
  int found = 0;
  for (int i = 0; i < cluster_channels; ++i) found |= 1 << i * cluster_pixels;
  return found;
}
VF_HD int weight_sharers(int cluster_pixels) { return (1 << cluster_pixels) - 1; }

// Of the CTA with this rank in its cluster. Tiles that share pixels are neighbours: the second one
// finds them in L2. A cluster may reach beyond the last image, or the last channel: tiles there
// have zeros to multiply, and store nothing.
VF_HD Tile tile_at(const Problem& p, int index, int rank) {
  const int rectangle = index / p.groups * p.cluster_pixels + own_of_weights(p, rank);
  const int group = index % p.groups * p.cluster_channels + own_of_strips(p, rank);
  const int of_image = rectangle % (p.down * p.across);
  return {rectangle / (p.down * p.across), of_image / p.across * p.tile_h,
          of_image % p.across * p.tile_w, group * p.block_out, rectangle};
}

// Warps that multiply a tile together.
VF_HD int warps_of_tile(const Problem& p) {
  return p.turns != 0 ? kWarpgroup / kWarp : kConsumerWarps;
}

VF_HD bool exists(const Problem& p, const Tile& tile) { return tile.partial < p.rectangles; }

// Pixel `row` of a tile, which are in raster order.
struct Pixel {
  int h, w;
};

VF_HD Pixel pixel_at(const Problem& p, const Tile& tile, int row) {
  return {tile.h + row / p.tile_w, tile.w + row % p.tile_w};
}

VF_HD bool inside(const Problem& p, const Pixel& pixel) {
  return pixel.h < p.height && pixel.w < p.width;
}

VF_HD int64_t offset(const Tile& tile, const Pixel& pixel, const Pitch& pitch) {
  return tile.n * pitch.n + pixel.h * pitch.h + pixel.w * pitch.w;
}

// Output channels of a tile: the last one may have fewer, or none.
VF_HD int channels_of(const Problem& p, const Tile& tile) {
  const int left = p.c_out - tile.first;
  return left < p.block_out ? left : p.block_out;
}

// The sum of a tile has a term for each chunk of input channels, column of taps and row of taps, in
// this order, which is counted in taps. The terms of a part: none has more than one beyond another.
struct Terms {
  int first, end;
};

VF_HD Terms terms_of(const Problem& p, int rank) {
  const int terms = p.chunks * p.kernel * p.kernel, part = part_of(p, rank);
  if (p.parts == 1) return {0, terms};
  return {part * terms / p.parts, (part + 1) * terms / p.parts};
}

// The size of a kernel is 1 or 3.
VF_HD int over_kernel(const Problem& p, int number) {
  return p.kernel == 1 ? number : static_cast<int>(static_cast<unsigned>(number) / 3);
}

// Of the terms of a column, which counts all columns of all chunks, those that a part has.
VF_HD Terms rows_of(const Problem& p, const Terms& terms, int column) {
  const int first = terms.first - column * p.kernel, end = terms.end - column * p.kernel;
  return {first < 0 ? 0 : first, end < p.kernel ? end : p.kernel};
}

// WGMMAs along the input channels of a chunk: the last chunk may have fewer.
VF_HD int steps_of(const Problem& p, int chunk) {
  const int left = p.in_bytes - chunk * kRowBytes;
  return left >= kRowBytes ? kRowBytes / kStepBytes : (left + kStepBytes - 1) / kStepBytes;
}

// ---- Shared memory -----------------------------------------------------------------------------
// In bytes from a base that starts an atom: strips, weights, partial sums of the warps, what a part
// hands to the others, barriers.

VF_HD uint32_t strip_bytes(const Problem& p) {
  return static_cast<uint32_t>((p.tile_h + p.kernel - 1) * p.tile_w * kRowBytes);
}

VF_HD uint32_t weight_bytes(const Problem& p) {
  return static_cast<uint32_t>(p.block_out * kRowBytes);
}

VF_HD uint32_t strip_at(const Problem& p, int stage) { return stage * strip_bytes(p); }

VF_HD uint32_t weights_at(const Problem& p, int stage) {
  return p.x_stages * strip_bytes(p) + stage * weight_bytes(p);
}

VF_HD uint32_t sums_at(const Problem& p) { return weights_at(p, p.w_stages); }

// Of a part, threads keep sums of eight channels each.
VF_HD uint32_t sums_bytes(const Problem& p) {
  if (p.pool_partials == nullptr) return 0;
  return (p.parts > 1 ? kConsumers * kWarpgroup * kUnit : kConsumerWarps * p.block_out) * 4u;
}

// Tiles that can have parts: their sums leave registers, and shared memory, for what adds them up.
constexpr VF_HD bool has_parts(int block_out, int blocks) { return block_out * blocks <= 256; }
// In e4m3 the products of a block are in registers beside them.
constexpr VF_HD bool has_parts_e4m3(int block_out, int blocks) {
  return block_out * (blocks + 1) < 384;
}

// Rows of fp32 that parts hand over at once, one block of each warpgroup, with a pitch at which the
// eight rows that a warp writes do not meet in a bank: block_out is a multiple of 16.
constexpr int kHandedRows = kConsumers * kBlockRows;

constexpr VF_HD int handed_pitch(int block_out) { return block_out + 8; }

VF_HD uint32_t handed_at(const Problem& p) { return sums_at(p) + sums_bytes(p); }

VF_HD uint32_t handed_bytes(const Problem& p) {
  return p.parts > 1 ? kHandedRows * handed_pitch(p.block_out) * 4u : 0;
}

VF_HD uint32_t barrier_at(const Problem& p, int index) {
  return handed_at(p) + handed_bytes(p) + index * kBarrierBytes;
}

// Every stage has one barrier for having arrived and one for having been read.
VF_HD uint32_t strip_full(const Problem& p, int stage) { return barrier_at(p, stage); }
VF_HD uint32_t strip_free(const Problem& p, int stage) { return barrier_at(p, p.x_stages + stage); }
VF_HD uint32_t weights_full(const Problem& p, int stage) {
  return barrier_at(p, 2 * p.x_stages + stage);
}
VF_HD uint32_t weights_free(const Problem& p, int stage) {
  return barrier_at(p, 2 * p.x_stages + p.w_stages + stage);
}

// And so have the rows that are handed over.
VF_HD uint32_t handed_full(const Problem& p) {
  return barrier_at(p, 2 * (p.x_stages + p.w_stages));
}
VF_HD uint32_t handed_free(const Problem& p) {
  return barrier_at(p, 2 * (p.x_stages + p.w_stages) + 1);
}

// In their place, where tiles have no parts: one for each warpgroup that takes turns.
VF_HD uint32_t turn_of(const Problem& p, int consumer) {
  return barrier_at(p, 2 * (p.x_stages + p.w_stages) + consumer);
}

VF_HD uint32_t shared_bytes(const Problem& p) {
  return barrier_at(p, 2 * (p.x_stages + p.w_stages) + (p.parts > 1 || p.turns != 0 ? 2 : 0));
}

// Where a thread is in a ring of stages. A barrier's phase has a parity: that of the pass. What is
// resident arrives once, and is waited for in its first phase ever after.
struct Ring {
  int depth;
  uint32_t flip;
  int stage = 0;
  uint32_t parity = 0;

  VF_HD explicit Ring(int depth, bool resident = false) : depth(depth), flip(resident ? 0 : 1) {}
  VF_HD int previous() const { return (stage == 0 ? depth : stage) - 1; }
  VF_HD void advance() {
    if (++stage == depth) {
      stage = 0;
      parity ^= flip;
    }
  }
  // Past what another warpgroup reads.
  VF_HD void skip(int count) {
    const int to = stage + count, passes = to / depth;
    stage = to - passes * depth;
    parity ^= flip & passes;
  }
};

// ---- Descriptors -------------------------------------------------------------------------------

// A matrix descriptor counts in 16 bytes.
constexpr int kDescriptorUnit = 16;

// Rows of 128 bytes from `address` on, channels along K, atoms adjacent. (PTX ISA, "Matrix
// Descriptor Format".) The base offset is 0, since every pattern starts at an atom.
VF_HD uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kLeading = 1;  // Has no meaning with this swizzle.
  constexpr uint64_t kStride = kAtomBytes / kDescriptorUnit;
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>((address & 0x3ffff) / kDescriptorUnit) | kLeading << 16 |
         kStride << 32 | kSwizzle128 << 62;
}

// What is added to a descriptor to start some bytes later.
constexpr VF_HD uint64_t descriptor_offset(int bytes) {
  return static_cast<uint64_t>(bytes / kDescriptorUnit);
}

// Start of what a consumer reads for a tap: its own pixels, moved down by `tap_row` rows.
VF_HD uint32_t pixels_at(const Problem& p, int stage, int consumer, int blocks, int tap_row) {
  return strip_at(p, stage) + (consumer * blocks * kBlockRows + tap_row * p.tile_w) * kRowBytes;
}

// ---- Accumulators ------------------------------------------------------------------------------
// A thread of a warpgroup holds N / 2 sums of a WGMMA: sum 4j + 2i + k is that of row 8i + row_of
// and column 8j + column_of + k. (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16".)

VF_HD int row_of(int thread) { return thread / kWarp * 16 + thread % kWarp / 4; }
VF_HD int column_of(int thread) { return thread % 4 * 2; }

}  // namespace conv_sm90
}  // namespace vovnet_fast
