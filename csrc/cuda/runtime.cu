// What there is besides kernels: shares of reductions, and whether the device can run them.
#include "../ops.h"
#include "common.cuh"

namespace vovnet_fast {
namespace cuda {

// Parts depend on shapes alone, not on the device, so that sums are the same everywhere.
int64_t reduction_parts(int64_t n, int64_t height, int64_t width, int64_t c) {
  constexpr int64_t kBlocks = 1024;   // Enough to keep any device busy,
  constexpr int64_t kMinPixels = 64;  // of parts that are worth a block.
  const int64_t groups = std::max(ceil_div(c, kMaxVectors * kVector<float16>), int64_t{1});
  const int64_t wanted = ceil_div(kBlocks, std::max(n, int64_t{1}) * groups);
  const int64_t most = std::max(ceil_div(height * width, kMinPixels), int64_t{1});
  return std::min(wanted, most);
}

#ifdef VF_CUDA_ON_CPU

int runtime_version() { return 0; }

void probe() {}

#else

int runtime_version() {
  int version;
  check("runtime_version", cudaRuntimeGetVersion(&version), "the CUDA runtime does not say");
  return version;
}

namespace {
__global__ void nothing() {}
}  // namespace

void probe() {
  cudaFuncAttributes found;
  check("probe", cudaFuncGetAttributes(&found, nothing), "no kernel can be run");
}

#endif

}  // namespace cuda
}  // namespace vovnet_fast
