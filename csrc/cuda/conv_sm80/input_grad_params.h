// Arguments of the input gradient with stride 2 of ../conv_sm80; conventions as in ../../params.h.
#pragma once

#include "../../params.h"

namespace vovnet_fast {

// out = mask(gradient of the input of a 3x3 convolution with stride 2, padded by 1, + add).
// Addresses, strides and numbers of channels are multiples of 16 bytes.
struct ConvSm80InputGradParams {
  View g;              // [N, H', W', C_out], H' = (H - 1) / 2 + 1
  View out;            // [N, H, W, C_in]
  View add;            // [N, H, W, add_c], added to the first channels, or absent; may be out
  View mask;           // [N, H, W, mask_c], activations of the last channels, or absent
  const void* weight;  // [C_in, 3, 3, C_out] packed, transposed and flipped, dtype
  int64_t n, height, width, out_height, out_width, c_in, c_out, add_c, mask_c;
  int32_t tile_h, tile_w;  // pixels of a tile, of one parity: 128 or 256; tile_w a multiple of 8
  int32_t stages;          // of the rings of strips and weights: 3 or 4
  int32_t dtype;           // kFloat16, kBFloat16 or kFloat32
};

}  // namespace vovnet_fast
