// From the arguments of the depthwise 3x3 with its 1x1 to what its kernel is told, on the host.
#pragma once

#include "../conv_sm80/plan.h"
#include "layout.h"
#include "params.h"

namespace vovnet_fast {
namespace depthwise_conv {

namespace detail {

inline void require(bool held, const std::string& what) {
  if (!held) throw std::invalid_argument("depthwise_conv: " + what);
}

inline bool has_tiles(int block_out) {
  switch (block_out) {
#define VF_CASE(channels) case channels:
    VF_DEPTHWISE_CONV_TILES(VF_CASE)
#undef VF_CASE
    return true;
    default:
      return false;
  }
}

}  // namespace detail

// What the kernel is told. Nothing may be empty.
//
// Raises: it cannot take these arguments.
inline Problem plan(const DepthwiseConvParams& params) {
  detail::require(params.tile_h * params.tile_w == kPixels && params.tile_h % kRun == 0 &&
                      detail::has_tiles(params.block_out) && params.c_out % params.block_out == 0,
                  "no tiles of " + std::to_string(params.tile_h) + " x " +
                      std::to_string(params.tile_w) + " pixels by " +
                      std::to_string(params.block_out) + " channels for " +
                      std::to_string(params.c_out) + " output channels");
  detail::require(conv_sm80::detail::aligned(params.taps),
                  "the address of taps must be a multiple of 16 bytes");
  // A 3x3 convolution has the same strips and tiles.
  ConvSm80Params same = {};
  same.x = params.x;
  same.out = params.out;
  same.weight = params.weight;
  same.scale = params.scale;
  same.shift = params.shift;
  same.pool_partials = params.pool_partials;
  same.statistics = params.statistics;
  same.n = params.n;
  same.height = params.height;
  same.width = params.width;
  same.out_height = params.out_height;
  same.out_width = params.out_width;
  same.c_in = params.c_in;
  same.c_out = params.c_out;
  same.kernel = 3;
  same.stride = params.stride;
  same.tile_h = params.tile_h;
  same.tile_w = params.tile_w;
  same.block_out = params.block_out;
  same.stages = params.stages;
  same.relu = params.relu;
  same.dtype = params.dtype;
  Problem p = {};
  static_cast<conv_sm80::Problem&>(p) = conv_sm80::plan(same);
  p.depthwise = static_cast<const char*>(params.taps);
  p.taps = 1;
  p.filter_bytes = p.tap_bytes;
  p.strip_stages = p.stages;
  return p;
}

}  // namespace depthwise_conv
}  // namespace vovnet_fast
