// Kernels that are wrong, each in one way that csrc/cuda_on_cpu has to report, and some that are
// not.
#include <pybind11/pybind11.h>

#include "../../csrc/cuda/common.cuh"

namespace {

using vovnet_fast::cuda::load;

__global__ void barrier_for_some(int threads) {
  if (static_cast<int>(threadIdx.x) < threads) __syncthreads();
}

__global__ void two_barriers(int first) {
  if (static_cast<int>(threadIdx.x) < first) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_for_some(int lanes) {
  if (static_cast<int>(threadIdx.x) < lanes) __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void vector_from(const float* from) { (void)load<4>(from); }

// Without its barrier, threads would read what others have not written.
__global__ void reverse(float* values, bool barrier) {
  VF_SHARED(float, shared, 64);
  shared[threadIdx.x] = values[threadIdx.x];
  if (barrier) __syncthreads();
  values[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void sum_of_lanes(float* values) {
  float sum = values[threadIdx.x];
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  values[threadIdx.x] = sum;
}

template <class... Params>
void run(void (*kernel)(Params...), Params... params) {
  vovnet_fast::cuda::launch("fault", kernel, 1, 64, nullptr, params...);
}

float* pointer(uintptr_t address) { return reinterpret_cast<float*>(address); }

}  // namespace

PYBIND11_MODULE(cuda_on_cpu_faults, m) {
  m.def("barrier_for_some", [](int threads) { run(barrier_for_some, threads); });
  m.def("two_barriers", [](int first) { run(two_barriers, first); });
  m.def("shuffle_for_some", [](int lanes) { run(shuffle_for_some, lanes); });
  m.def("vector_from",
        [](uintptr_t from) { run(vector_from, static_cast<const float*>(pointer(from))); });
  m.def("reverse", [](uintptr_t values, bool barrier) { run(reverse, pointer(values), barrier); });
  m.def("sum_of_lanes", [](uintptr_t values) { run(sum_of_lanes, pointer(values)); });
}
