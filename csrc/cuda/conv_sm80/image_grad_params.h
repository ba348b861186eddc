// Arguments of the gradient of images of ../conv_sm80; conventions as in ../../params.h.
#pragma once

#include "../../params.h"

namespace vovnet_fast {

// out = mask(gradient of the input of a 3x3 convolution of three channels, padded by 1, + add).
// Addresses, strides and channels of g and weight are multiples of 16 bytes.
struct ConvSm80ImageGradParams {
  View g;              // [N, H', W', C_out], H' = (H - 1) / stride + 1
  View out;            // [N, H, W, 3]
  View add;            // [N, H, W, add_c], added to the first channels, or absent; may be out
  View mask;           // [N, H, W, mask_c], activations of the last channels, or absent
  const void* weight;  // [3, 3, 3, C_out] packed, transposed and flipped, dtype
  int64_t n, height, width, out_height, out_width, c_out, add_c, mask_c;
  int32_t stride;  // 1 or 2
  int32_t dtype;   // kFloat16, kBFloat16 or kFloat32
};

}  // namespace vovnet_fast
