// The Hopper convolution (sm_90a), as the ops of ops.h. Arguments: conv_sm90_params.h.
#pragma once

#include "conv_sm90_params.h"

namespace vovnet_fast {
namespace cuda {

void conv_sm90(const ConvSm90Params& params, void* stream);

}  // namespace cuda
}  // namespace vovnet_fast
