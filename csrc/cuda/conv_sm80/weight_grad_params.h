// Arguments of the weight gradient of ../conv_sm80; conventions as in ../../params.h.
#pragma once

#include "../../params.h"

namespace vovnet_fast {

// out = gradient of the weight of a convolution, padded by kernel / 2. Addresses, strides and
// numbers of channels are multiples of 16 bytes, but for those of x with a kernel of 3 and three
// input channels, those of an image.
struct ConvSm80WeightGradParams {
  View x;          // [N, H, W, C_in]
  View g;          // [N, H', W', C_out], H' = (H - 1) / stride + 1
  void* partials;  // [parts, C_out, K, K, C_in] fp32, scratch; not used where parts is 1
  void* out;       // [C_out, K, K, C_in] packed, fp32
  int64_t n, height, width, out_height, out_width, c_in, c_out;
  int64_t parts;           // of all pixels, at least 1
  int32_t kernel, stride;  // 1 or 3; 1, or 2 with a kernel of 3
  int32_t tile_h, tile_w;  // pixels of a step: 64, 32 in fp32; tile_w is a multiple of 16 or of 8
  int32_t stages;          // steps that are in shared memory: 2 or 3
  int32_t dtype;           // kFloat16, kBFloat16, or kFloat32, which is multiplied as TF32
};

}  // namespace vovnet_fast
