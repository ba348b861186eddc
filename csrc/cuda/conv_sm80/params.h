// Arguments of the convolution for sm_80 and newer; conventions as in ../../params.h.
#pragma once

#include "../../params.h"

namespace vovnet_fast {

// out = relu(conv(x, weight) * scale + shift), padded by kernel / 2.
// Without scale and shift: out = mask(conv(x, weight) + add), which is the gradient of an input, or
// out = conv(x, weight) with its statistics.
//
// A unit is 16 bytes: 8 halves, or 4 numbers of fp32. All addresses, strides and numbers of
// channels are whole units, but for the first layer: with a kernel of 3 and three input channels
// neither those of x nor those of the weights need be, tiles have 128 pixels by 64 channels, and
// nothing is added or masks. fp32 is multiplied as TF32: operands are rounded to it.
struct ConvSm80Params {
  View x;               // [N, H, W, C_in]
  View out;             // [N, H', W', C_out], H' = (H - 1) / stride + 1
  View add;             // [N, H', W', add_c], added to the first channels, or absent; may be out
  View mask;            // [N, H', W', mask_c], activations of the last channels, or absent
  const void* weight;   // [C_out, K, K, C_in] packed, dtype
  const void* scale;    // [C_out] fp32, or null together with shift
  const void* shift;    // [C_out] fp32
  void* pool_partials;  // [N, T, C_out] fp32, T = ceil(H' / tile_h) * ceil(W' / tile_w), or null:
                        // sums over a tile of what is stored, before it is rounded; only with scale
  void* statistics;     // [N, T, 3, C_out] fp32, or null: of a tile, before it is rounded; without
                        // scale, add and mask
  int64_t n, height, width, out_height, out_width, c_in, c_out, add_c, mask_c;
  int32_t kernel, stride;  // 1 or 3; 1, or 2 with a kernel of 3
  int32_t tile_h, tile_w;  // output pixels of a tile: 128 or 256; tile_w is a multiple of 8
  int32_t block_out;       // output channels of a tile
  int32_t stages;          // of the ring of weights: 3 or 4
  int32_t relu;            // only with scale
  int32_t dtype;           // kFloat16, kBFloat16 or kFloat32
};

}  // namespace vovnet_fast
