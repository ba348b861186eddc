// Kernels that are wrong, each in one way that csrc/cuda_on_cpu has to report, and some that are
// not.
#include <pybind11/pybind11.h>

#include "../../csrc/cuda/common.cuh"
#include "../../csrc/cuda_on_cpu/warps.h"

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

// ---- Shared memory, and copies into it

constexpr int kSharedBytes = 64 * 16;

enum Fault : int {
  kNone,
  kNoWait,
  kTooManyPending,
  kNoGroup,
  kNoBarrier,
  kNoBarrierBehind,
  kNothingWritten,
  kLeftUnderWay,
  kTwoWriters,
  kOutside,
  kNotAligned
};

// Each thread fetches 16 bytes twice, and stores what its neighbour fetched. `from` has room.
__global__ void hand_on(const float* from, float* to, int fault) {
  using namespace cuda_on_cpu;
  const int me = thread();
  const int other = fault == kNoBarrier ? max(me - 1, 0) : (me + 1) % 64;
  uint32_t place = me * 16;
  if (fault == kTwoWriters) place = me / 2 * 16;
  if (fault == kOutside) place += 16;
  if (fault == kNotAligned) place += 4;
  if (fault == kNothingWritten) to[me] = load_shared(place);
  for (int round = 0; round < 2; ++round) {
    copy_async(place, from + (round * 64 + me) * 4, true, true);
    if (fault != kNoGroup) commit_copies();
    if (fault == kTooManyPending) {
      wait_copies(1);
    } else if (fault != kNoWait && (fault != kLeftUnderWay || round == 0)) {
      wait_copies(0);
    }
    if (fault == kLeftUnderWay && round == 1) return;
    if (fault != kNoBarrier) __syncthreads();
    to[round * 64 + me] = load_shared(other * 16 + 4);
    if (fault != kNoBarrierBehind) __syncthreads();
  }
}

// A warp reads matrices whose rows are so many bytes apart.
__global__ void matrices(uint32_t pitch) {
  using namespace cuda_on_cpu;
  for (uint32_t at = thread() * 4; at < kSharedBytes; at += kWarp * 4) store_shared(at, 0.f);
  __syncthreads();
  uint32_t words[4];
  load_matrices(VF_PLACE, words, 4, lane() * pitch);
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
  m.def("hand_on", [](uintptr_t from, uintptr_t to, int fault, bool early) {
    const float* source = pointer(from);
    float* target = pointer(to);
    cuda_on_cpu::copies_land_early(early);
    cuda_on_cpu::run("fault", 1, 64, [&] { hand_on(source, target, fault); }, kSharedBytes);
  });
  m.def("matrix_conflicts", [](uint32_t pitch) {
    (void)cuda_on_cpu::take_counts();
    cuda_on_cpu::run("fault", 1, 32, [&] { matrices(pitch); }, kSharedBytes);
    return cuda_on_cpu::take_counts().matrix_conflicts;
  });
  m.def("sum_of_lanes", [](uintptr_t values) { run(sum_of_lanes, pointer(values)); });
}
