// The input gradient of a 3x3 convolution with stride 2, by the kernel of kernel.cuh.
//
// A pixel of the input meets those taps whose distance from it is even: with h = 2i the middle row
// at line i of g, with h = 2i + 1 the last row (the first one, of filters that are flipped) at line
// i, and the other one at line i + 1; columns as well. So there are four convolutions of g with
// stride 1 and 1, 2, 2 and 4 taps, whose outputs are the pixels of one parity each, and a tile is
// of one of them. The four that share pixels of g are neighbours, those with most taps first: the
// strip of a tile is the same for all of them, and is found in L2.
#pragma once

#include "input_grad_params.h"
#include "kernel.cuh"
#include "plan.h"

namespace vovnet_fast {
namespace conv_sm80 {

constexpr int kParities = 4;
constexpr int kGradChannels = 64;  // Input channels of a tile: what strided layers here have.

// The taps that the pixels of a parity meet: bit 0 is that of the column, bit 1 that of the line.
struct ParityTaps {
  static VF_DEVICE Tile tile_at(const Problem& p, int block, int index) {
    Tile tile = conv_sm80::tile_at(p, block, index / kParities);
    tile.parity = kParities - 1 - index % kParities;
    return tile;
  }
  static VF_DEVICE int line(const Tile& tile, int tap) { return tap >> (tile.parity & 1); }
  static VF_DEVICE int column(const Tile& tile, int tap) { return tap & tile.parity & 1; }

  static VF_DEVICE int count(const Problem&, const Tile& tile) {
    return (1 + (tile.parity >> 1)) * (1 + (tile.parity & 1));
  }
  static VF_DEVICE int filter_tap(const Tile& tile, int tap) {
    const int row = tile.parity >> 1 ? 2 * line(tile, tap) : 1;
    return row * 3 + (tile.parity & 1 ? 2 * column(tile, tap) : 1);
  }
  static VF_DEVICE int rows(const Problem& p, const Tile& tile, int tap) {
    return line(tile, tap) * p.pitch + column(tile, tap);
  }
  static VF_DEVICE Pixel output(const Tile& tile, int line, int index, int tile_w) {
    return {2 * (tile.h + line) + (tile.parity >> 1),
            2 * (tile.w + index - line * tile_w) + (tile.parity & 1)};
  }
};

// What the kernel is told. Nothing may be empty.
//
// Raises: it cannot take these arguments.
inline Problem plan(const ConvSm80InputGradParams& params) {
  ConvSm80Params as = {};
  as.x = params.g;
  as.out = params.out;
  as.add = params.add;
  as.mask = params.mask;
  as.weight = params.weight;
  as.n = params.n;
  as.height = params.out_height;
  as.width = params.out_width;
  as.out_height = params.height;
  as.out_width = params.width;
  as.c_in = params.c_out;
  as.c_out = params.c_in;
  as.add_c = params.add_c;
  as.mask_c = params.mask_c;
  as.kernel = 3;
  as.stride = 1;
  as.tile_h = params.tile_h;
  as.tile_w = params.tile_w;
  as.block_out = kGradChannels;
  as.stages = params.stages;
  as.dtype = params.dtype;
  const int pixels = params.tile_h * params.tile_w;
  Problem p =
      plan(as, pixels == 128 ||
                   pixels == 256);  // Of tiles it counts about four times as many: all parities.
  p.pad = 0;
  p.pitch = p.tile_w + 1;
  p.strip_rows = (p.tile_h + 1) * p.pitch;
  p.pitch_magic = magic(p.pitch);
  p.down = static_cast<int32_t>(ceil_div(params.out_height, params.tile_h));
  p.across = static_cast<int32_t>(ceil_div(params.out_width, params.tile_w));
  p.strip_stages = p.stages;  // A strip may be for one tap alone.
  detail::require(
      static_cast<int64_t>(p.down) * p.across * p.groups * params.n * kParities < int64_t{1} << 30,
      "more than 2^30 tiles: split the batch");
  return p;
}

}  // namespace conv_sm80
}  // namespace vovnet_fast
