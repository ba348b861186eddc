// The Hopper convolution (sm_90a), as the ops of ops.h. Arguments: params.h.
#pragma once

#include "params.h"

namespace vovnet_fast {
namespace cuda {

void conv_sm90(const ConvSm90Params& params, void* stream);
void conv_sm90_fp8(const ConvSm90Fp8Params& params, void* stream);

}  // namespace cuda
}  // namespace vovnet_fast
