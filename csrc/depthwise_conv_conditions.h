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
  const int64_t bytes = bytes_of("dtype", p.dtype);
  tiled_layer(p, bytes);
  if (p.scale != nullptr && p.statistics != nullptr) {
    refuse("statistics", "None where scale is given", "an address");
  }
  packed("taps", p.taps, bytes, {3, 3, p.c_in});
  packed("weight", p.weight, bytes, {p.c_out, p.c_in});
}

}  // namespace checks
}  // namespace vovnet_fast
