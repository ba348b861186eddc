// Arguments of a depthwise 3x3 convolution with the 1x1 that follows it, in one kernel; conventions
// as in ../../params.h.
#pragma once

#include "../../params.h"

namespace vovnet_fast {

// out = relu(conv(depthwise(x, taps), weight) * scale + shift), the depthwise one padded by one.
// Without scale and shift: out = conv(depthwise(x, taps), weight), with its statistics.
//
// A unit is 16 bytes: 8 halves, or 4 numbers of fp32. All addresses, strides and numbers of
// channels are whole units. What the depthwise convolution makes is summed in fp32 and rounded to
// dtype, as if it had been stored; fp32 is then multiplied as TF32: operands are rounded to it.
struct DepthwiseConvParams {
  View x;               // [N, H, W, C_in]
  View out;             // [N, H', W', C_out], H' = (H - 1) / stride + 1
  const void* taps;     // [3, 3, C_in] packed, dtype
  const void* weight;   // [C_out, C_in] packed, dtype
  const void* scale;    // [C_out] fp32, or null together with shift
  const void* shift;    // [C_out] fp32
  void* pool_partials;  // [N, T, C_out] fp32, T = ceil(H' / tile_h) * ceil(W' / tile_w), or null:
                        // sums over a tile of what is stored, before it is rounded; only with scale
  void* statistics;     // [N, T, 3, C_out] fp32, or null: of a tile, before it is rounded; only
                        // without scale
  int64_t n, height, width, out_height, out_width, c_in, c_out;
  int32_t stride;          // 1 or 2
  int32_t tile_h, tile_w;  // output pixels of a tile: 128; tile_w is a multiple of 8, tile_h of 2
  int32_t block_out;       // output channels of a tile; divides c_out
  int32_t stages;          // of the rings: 2 or 3
  int32_t relu;            // only with scale
  int32_t dtype;           // kFloat16, kBFloat16 or kFloat32
};

}  // namespace vovnet_fast
