// A depthwise 3x3 convolution with the 1x1 that follows it, as an op of ops.h. Arguments: params.h.
#pragma once

#include "params.h"

namespace vovnet_fast {
namespace cuda {

void depthwise_conv(const DepthwiseConvParams& params, void* stream);

}  // namespace cuda
}  // namespace vovnet_fast
