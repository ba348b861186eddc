// Every op by name, with its struct. Both halves have all of them.
#pragma once

#include <cstdint>

#include "params.h"

#define VF_OPS(X)                                     \
  X(epilogue, EpilogueParams)                         \
  X(accumulate, AccumulateParams)                     \
  X(depthwise, DepthwiseParams)                       \
  X(depthwise_input_grad, DepthwiseInputGradParams)   \
  X(depthwise_weight_grad, DepthwiseWeightGradParams) \
  X(gates, GatesParams)                               \
  X(apply_gates, ApplyGatesParams)                    \
  X(gate_sums, GateSumsParams)                        \
  X(gates_backward, GatesBackwardParams)              \
  X(apply_gates_backward, ApplyGatesBackwardParams)   \
  X(max_pool, MaxPoolParams)                          \
  X(max_pool_backward, MaxPoolBackwardParams)         \
  X(batch_norm_merge, BatchNormMergeParams)           \
  X(batch_norm_finish, BatchNormFinishParams)         \
  X(batch_norm_sums, BatchNormSumsParams)             \
  X(batch_norm_input_grad, BatchNormInputGradParams)  \
  X(channel_sums, ChannelSumsParams)                  \
  X(pack, PackParams)                                 \
  X(pack_transposed, PackParams)                      \
  X(pack_backward, PackBackwardParams)

// Those of the CPU half alone.
#define VF_CPU_OPS(X)                    \
  X(int8_image, Int8ImageParams)         \
  X(int8_depthwise, Int8DepthwiseParams) \
  X(int8_max_pool, Int8MaxPoolParams)    \
  X(int8_gates, Int8GatesParams)         \
  X(int8_apply_gates, Int8ApplyGatesParams)

namespace vovnet_fast {

// On `threads` threads of the OpenMP runtime that torch has loaded. Results do not depend on how
// many they are.
namespace cpu {
#define VF_DECLARE(name, Params) void name(const Params& params, int threads);
VF_OPS(VF_DECLARE)
VF_CPU_OPS(VF_DECLARE)
#undef VF_DECLARE

// apply_gates, and then max_pool of what it has made, at once (recording.h).
void gated_pool(const ApplyGatesParams& gates, const MaxPoolParams& pool, int threads);

// Parts into which reductions divide the pixels of an image.
int64_t reduction_parts(int64_t n, int64_t height, int64_t width, int64_t c);
// Groups of statistics that are merged first; 0: all at once.
int64_t merge_groups(int64_t parts, int64_t c);
}  // namespace cpu

// On the current device; `stream` is a cudaStream_t. They return once the kernels are launched.
namespace cuda {
#define VF_DECLARE(name, Params) void name(const Params& params, void* stream);
VF_OPS(VF_DECLARE)
#undef VF_DECLARE

int64_t reduction_parts(int64_t n, int64_t height, int64_t width, int64_t c);
int64_t merge_groups(int64_t parts, int64_t c);
// Version of the CUDA runtime that is linked in, 13000 for 13.0.
int runtime_version();
// Raises: the kernels cannot run on the current device, for want of code for it or of a driver.
void probe();
}  // namespace cuda

}  // namespace vovnet_fast
