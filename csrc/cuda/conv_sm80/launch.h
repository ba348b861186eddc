// The convolution for sm_80 and newer, as the ops of ops.h. Arguments: params.h,
// image_grad_params.h, input_grad_params.h and weight_grad_params.h.
#pragma once

#include "image_grad_params.h"
#include "input_grad_params.h"
#include "params.h"
#include "weight_grad_params.h"

namespace vovnet_fast {
namespace cuda {

void conv_sm80(const ConvSm80Params& params, void* stream);
void conv_sm80_image_grad(const ConvSm80ImageGradParams& params, void* stream);
void conv_sm80_input_grad(const ConvSm80InputGradParams& params, void* stream);
void conv_sm80_weight_grad(const ConvSm80WeightGradParams& params, void* stream);

}  // namespace cuda
}  // namespace vovnet_fast
