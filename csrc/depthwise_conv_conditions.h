// What the fields of DepthwiseConvParams must hold: for conditions.h.
#pragma once

#include "checks.h"
#include "cuda/depthwise_conv/params.h"

namespace vovnet_fast {
namespace checks {

// Alignment and which tiles there are is the matter of depthwise_conv/plan.h.
inline void tensors(const DepthwiseConvParams& p) {
  choice("dtype", p.dtype, {kFloat16, kBFloat16, kFloat32});
  choice("relu", p.relu, {0, 1});
  choice("stages", p.stages, {2, 3});
  strided_output(p);
  if (p.c_in < 1) refuse("c_in", "at least 1", std::to_string(p.c_in));
  for (const int32_t size : {p.tile_h, p.tile_w, p.block_out}) {
    if (size < 1 || size > 256) {
      refuse("tile_h, tile_w and block_out", "from 1 to 256", std::to_string(size));
    }
  }
  const int64_t bytes = bytes_of("dtype", p.dtype);
  const Image out{p.n, p.out_height, p.out_width, p.c_out};
  const int64_t tiles = count("out", {ceil_div(out.height, static_cast<int64_t>(p.tile_h)),
                                      ceil_div(out.width, static_cast<int64_t>(p.tile_w))});
  together("scale", p.scale, "shift", p.shift);
  if (p.scale == nullptr && (p.pool_partials != nullptr || p.relu != 0)) {
    refuse("pool_partials and relu", "None and 0 where scale is None", "others");
  }
  if (p.scale != nullptr && p.statistics != nullptr) {
    refuse("statistics", "None where scale is given", "an address");
  }
  view("x", p.x, bytes, {p.n, p.height, p.width, p.c_in});
  view("out", p.out, bytes, out);
  packed("taps", p.taps, bytes, {3, 3, p.c_in});
  packed("weight", p.weight, bytes, {p.c_out, p.c_in});
  packed("scale", p.scale, 4, {p.c_out}, kOptional);
  packed("shift", p.shift, 4, {p.c_out}, kOptional);
  packed("pool_partials", p.pool_partials, 4, {p.n, tiles, p.c_out}, kOptional);
  packed("statistics", p.statistics, 4, {p.n, tiles, kStatisticsRows, p.c_out}, kOptional);
}

}  // namespace checks
}  // namespace vovnet_fast
