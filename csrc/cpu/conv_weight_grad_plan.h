// How the weight gradient of a convolution is divided.
//
// Both operands have their pixels side by side, and the gradient of a weight is the sum over pixels
// of an outer product: of some output channels of g, and a chunk of 16 channels of x at one tap.
// Pixels are divided into strips: a few rows, or a few small images. Of a strip x is gathered as
// conv_plan.h says, with its padding, a few chunks at a time, and g in tiles,
// [C_out / tile][pixel][tile]. A chunk of x stays in the L1 cache while all tiles and taps are
// multiplied with it. The sums of a strip are complete in registers before they are added to those
// of the strips before, which keeps them exact.
//
// Threads take ranges of chunks and tiles, each with the sums of all strips in their order. Where
// there are few of them, and where pixels are unfolded, which takes a while, strips are divided
// into parts, whose sums are added up in the end. Their number depends on the shape alone.
#pragma once

#include "conv_plan.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

constexpr int64_t kStripPixels = 256;  // A chunk of them takes half of an L1 cache.
constexpr int64_t kMostParts = 16;
constexpr int64_t kEnoughTiles = 16;  // of 16 output channels and a chunk

struct PixelPlan {
  Plan input;            // of a strip
  int64_t image_pixels;  // gathered of an image
  int64_t images, rows;  // of a strip
  int64_t row_strips;    // of an image, or of a few small ones
  int64_t strips;        // of all images
};

// `chunk`: channels that make 64 bytes; `pixels`: of a strip, where its rows are not longer.
VF_HD PixelPlan divide_pixels(const Shape& shape, int64_t n, int64_t chunk, int64_t pixels) {
  PixelPlan plan{};
  plan.input = divide(shape, chunk);
  const int64_t most = shape.out_width < pixels ? pixels / shape.out_width : 1;
  plan.row_strips = ceil_div(shape.out_height, most);
  plan.rows = ceil_div(shape.out_height, plan.row_strips);
  plan.row_strips = ceil_div(shape.out_height, plan.rows);
  const bool small = plan.row_strips == 1;
  const int64_t together = small ? most / shape.out_height : 1;
  plan.images = least(n, together < 1 ? 1 : together);
  plan.strips = plan.row_strips * ceil_div(n, plan.images);
  plan.input.rows = plan.rows;
  plan.input.plane_pixels = (plan.rows + plan.input.extra) * plan.input.width;
  plan.image_pixels = plan.input.planes * plan.input.planes * plan.input.plane_pixels;
  plan.input.pixels = plan.images * plan.image_pixels;
  return plan;
}

// Parts of the pixels of all images, whoever sums them.
VF_HD int64_t divide_parts(const Shape& shape, int64_t n) {
  const PixelPlan plan = divide_pixels(shape, n, kFloatChunk, kStripPixels);
  const bool few = plan.input.chunks * ceil_div(shape.c_out, kTileChannels) < kEnoughTiles;
  return plan.input.unfolded || few ? least(plan.strips, kMostParts) : 1;
}

// Ranges of chunks, and of tiles.
struct Ranges {
  int64_t chunks, tiles;
};

// What an engine takes for a pixel: to gather a chunk, or a tile; and the product of both. Alone
// their ratios matter.
struct Cycles {
  int64_t chunk, tile, product;
};

// The ranges that let so many threads end first. A range gathers for itself all that it reads.
VF_HD Ranges divide_outputs(const Plan& plan, int64_t tiles, int64_t threads, Cycles cycles) {
  Ranges best{1, 1};
  int64_t least_cost = INT64_MAX;
  for (int64_t ranges = 1; ranges <= least(plan.unfolded ? 1 : plan.chunks, threads); ++ranges) {
    const int64_t others = least(tiles, ceil_div(threads, ranges));
    const int64_t chunks = ceil_div(plan.chunks, ranges), each = ceil_div(tiles, others);
    const int64_t cost =
        cycles.product * taps(plan) * chunks * each + cycles.chunk * chunks + cycles.tile * each;
    if (cost < least_cost) {
      least_cost = cost;
      best = {ranges, others};
    }
  }
  return best;
}

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
