// Weight gradients of convolutions in fp16, bf16 and fp32, products and sums in fp32; on AVX2 and
// AVX-512 alone.
#pragma once

#include <cstdint>

#include "../params.h"

namespace vovnet_fast {
namespace cpu {

// Whether the instruction set that is in use has them.
bool has_conv_weight_grad();

// On `threads` threads; results do not depend on how many they are.
void conv_weight_grad(const ConvWeightGradParams& params, int threads);

// Parts into which the pixels of all images are divided, each with sums of its own.
int64_t conv_weight_grad_parts(int64_t n, int64_t out_height, int64_t out_width, int64_t c_in,
                               int64_t c_out, int64_t kernel, int64_t stride);

}  // namespace cpu
}  // namespace vovnet_fast
