// Arguments of the Hopper convolution; conventions as in ../../params.h.
#pragma once

#include "../../params.h"

namespace vovnet_fast {

// out = relu(conv(x, weight) * scale + shift) with stride 1, padded by kernel / 2.
// Without scale and shift: out = mask(conv(x, weight) + add), which is the gradient of an input.
struct ConvSm90Params {
  View x;              // [N, H, W, C_in]; C_in and all strides are multiples of 8
  View out;            // [N, H, W, C_out]; all strides are multiples of 8, as those of add and mask
  View add;            // [N, H, W, add_c], added to the first channels, or absent; may be out
  View mask;           // [N, H, W, mask_c], activations of the last channels, or absent
  const void* weight;  // [C_out, K, K, C_in] packed, dtype
  const void* scale;   // [C_out] fp32, or null together with shift
  const void* shift;   // [C_out] fp32
  void* pool_partials;  // [N, T, C_out] fp32, T = ceil(H / tile_h) * ceil(W / tile_w) * parts, or
                        // null: sums over a tile, or over the pixels of it that one part stores, of
                        // what is stored, before it is rounded; only with scale
  int64_t n, height, width, c_in, c_out, add_c, mask_c;
  int32_t kernel;          // 1 or 3
  int32_t tile_h, tile_w;  // pixels of a tile: 128 or 256; tile_w is a multiple of 8
  int32_t block_out;       // output channels of a tile; of the last one some may be beyond c_out
  int32_t cluster_pixels;  // tiles that CTAs of a cluster have next to each other: of pixels, 1, 2,
                           // 4 or 8,
  int32_t cluster_channels;  // and of output channels
  int32_t parts;  // CTAs of a cluster that share a tile, each with a part of its taps and input
                  // channels; with the tiles of the cluster at most 8 in all
  int32_t turns;  // 1: both warpgroups that multiply have tiles of their own, of 128 pixels, and
                  // take turns; only in one part
  int32_t relu;   // only with scale
  int32_t dtype;  // kFloat16 or kBFloat16
};

}  // namespace vovnet_fast
