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

// The same in e4m3, stride 1, with z = conv(x, weight) + bias, summed in fp32:
//
//     out = e4m3(min(relu(z * multiplier), 448))    feature = relu(z * unit)
//
// of which either may be absent. Rounded to nearest even; NaN stays NaN.
struct ConvSm90Fp8Params {
  View x;                  // [N, H, W, C_in] e4m3; C_in and all strides are multiples of 16
  View out;                // [N, H, W, C_out] e4m3, or absent; C_out and strides multiples of 16
  View feature;            // [N, H, W, C_out] fp32, or absent; strides are multiples of 4
  const void* weight;      // [C_out, K, K, C_in] packed, e4m3
  const void* bias;        // [C_out] fp32
  const void* multiplier;  // [C_out] fp32
  const void* unit;        // [C_out] fp32
  void* pool_partials;  // [N, T, C_out] fp32, T as above, or null: sums of out, as it is rounded;
                        // only with out
  int64_t n, height, width, c_in, c_out;
  int32_t kernel, tile_h, tile_w, block_out, cluster_pixels, cluster_channels, parts;  // as above
};

namespace conv_sm90 {

constexpr int32_t kE4m3 = 8;  // A dtype of ConvSm90Params within plan.h, beside those of DType.

}  // namespace conv_sm90

}  // namespace vovnet_fast
