// Convolutions of few pixels, and their gradients, by weights as they are.
//
// Where maps are small a layer takes as long as reading its weight from memory. The other engines
// multiply a packed form of it, which a training step makes twice and uses once each, and have a
// third pass over it for its gradient. Here each pass of a layer reads the weight once: inputs,
// which are few, are gathered in the order of its rows instead (im2col), and
//
//   forward          out[pixel][o] = sum over k of x[pixel][k] * weight[o][k]
//   input gradient   dx[pixel][k]  = sum over o of g[pixel][o] * scale[o] * weight[o][k], added up
//   weight gradient  dweight[o][k] = sum over pixels of g[pixel][o] * x[pixel][k] * scale[o]
//
// with sums in fp32. The weight's gradient lies as the weight does. Rows in fp32 are read where
// they lie if a row is in one piece, as nn.Conv2d has it in either layout; others are copied first.
#pragma once

#include "../params.h"

namespace vovnet_fast {
namespace cpu {

// Whether the instruction set that is in use has them: AVX2, AVX-512 and NEON do.
bool conv_unpacked_runs();

// On `threads` threads; results do not depend on how many they are.
void conv_unpacked(const ConvUnpackedParams& params, int threads);
void conv_unpacked_input_grad(const ConvUnpackedInputGradParams& params, int threads);
void conv_unpacked_weight_grad(const ConvUnpackedWeightGradParams& params, int threads);

}  // namespace cpu
}  // namespace vovnet_fast
