// How a convolution is divided, and its weight packed.
//
// An image is divided into strips of output rows. A thread gathers the input of a strip into memory
// of its own, where the channels of a pixel lie in chunks of 64 bytes, chunk after chunk:
// [C_in / chunk][pixel][chunk]. Gathered rows have their padding, so that the input of a tap lies a
// constant number of pixels behind that of the first tap, whatever row the output is in: outputs
// are counted through over gathered rows, and those that fall into the padding are not stored.
// With a stride of 2, even and odd rows and columns are gathered apart, and the same holds.
//
// Weights are packed in tiles of 1 KiB, [C_out / 16][C_in / chunk][tap][tile]: 16 output channels
// of one chunk of input channels. Chunks and tiles are filled up with zeros.
#pragma once

#include "../params.h"
#include "loops.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

constexpr int64_t kChunkBytes = 64;
constexpr int kUnits = 16;  // of four bytes, which are multiplied at once: those of a chunk
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileChannels = 16;
constexpr int64_t kMaxTaps = 9;

// What a thread gathers should stay in its L2 cache, beside the weights that it is multiplied by.
// Where the weights themselves do not, they should be read only once: then a whole image pays. In
// fp32, which is slow to multiply, large strips pay where others would read something again, and
// small ones where not (measured on a core with 2 MiB).
constexpr int64_t kStripBytes = 384 << 10;
constexpr int64_t kLargeStripBytes = 768 << 10;
constexpr int64_t kSmallStripBytes = 192 << 10;
constexpr int64_t kWholeBytes = 1280 << 10;
constexpr int64_t kLargeWeightBytes = 1 << 20;
constexpr int64_t kFloatChunk = 16;

struct Shape {
  int64_t out_height, out_width, c_in, c_out, kernel, stride;
};

struct Plan {
  bool unfolded;             // a pixel is gathered with all its taps, as if they were its channels
  int64_t kernel, stride;    // what is left of them then
  int64_t channels, chunks;  // gathered of a pixel
  int64_t tiles;             // of output channels
  int64_t planes;            // of rows, and of columns: 2 with a stride of 2
  int64_t rows, strips;      // output rows of a strip, strips of an image
  int64_t width;             // of a gathered row
  int64_t extra;             // gathered rows, and columns, beyond those of the output
  int64_t plane_pixels, pixels;  // gathered of a strip
};

VF_HD int64_t taps(const Plan& plan) { return plan.kernel * plan.kernel; }

// One strip of an image, or a part of its output channels.
struct Task {
  int64_t image, strip, row, rows;  // output rows from `row` on
  int64_t first_tile, last_tile;
};

// Bytes from a tile of output channels to the next one.
VF_HD int64_t tile_step(const Plan& plan) { return plan.chunks * taps(plan) * kTileBytes; }

// Strips of so many rows.
VF_HD void set_rows(int64_t out_height, int64_t rows, Plan* plan) {
  plan->rows = rows;
  plan->strips = ceil_div(out_height, rows);
  plan->plane_pixels = (rows + plan->extra) * plan->width;
  plan->pixels = plan->planes * plan->planes * plan->plane_pixels;
}

// `chunk`: channels that make 64 bytes.
VF_HD Plan divide(const Shape& shape, int64_t chunk) {
  Plan plan{};
  const int64_t all = shape.kernel * shape.kernel * shape.c_in;
  plan.unfolded = shape.kernel > 1 && all <= 2 * chunk;
  plan.kernel = plan.unfolded ? 1 : shape.kernel;
  plan.stride = plan.unfolded ? 1 : shape.stride;
  plan.channels = plan.unfolded ? all : shape.c_in;
  plan.chunks = ceil_div(plan.channels, chunk);
  plan.tiles = ceil_div(shape.c_out, kTileChannels);
  plan.planes = least(plan.kernel, plan.stride);
  plan.extra = (plan.kernel - 1) / plan.stride;
  plan.width = shape.out_width + plan.extra;
  const int64_t row_bytes = plan.planes * plan.planes * plan.width * plan.chunks * kChunkBytes;
  const bool large = plan.tiles * tile_step(plan) > kLargeWeightBytes;
  const bool whole = large && row_bytes * shape.out_height <= kWholeBytes;
  const int64_t few = large || plan.extra > 0 ? kLargeStripBytes : kSmallStripBytes;
  const int64_t most = chunk == kFloatChunk ? few : kStripBytes;
  int64_t strips = 1;  // A power of two: so are the numbers of threads, mostly.
  while (!whole && strips < shape.out_height &&
         ceil_div(shape.out_height, strips) * row_bytes > most) {
    strips *= 2;
  }
  set_rows(shape.out_height, ceil_div(shape.out_height, strips), &plan);
  return plan;
}

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
