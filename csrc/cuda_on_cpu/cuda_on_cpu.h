// What the kernels of csrc/cuda use of CUDA, for a C++ compiler: their grids run on the host.
//
//     c++ -std=c++17 -x c++ -DVF_CUDA_ON_CPU csrc/cuda/epilogue.cu ...
//
// This is for tests: of numbers, of what is read and written (under AddressSanitizer too), and of
// barriers. Blocks run one after the other, and the threads of a block as fibres, each until it
// waits for others; the first one starts alone, so a kernel without barriers is a plain loop.
//
// Reported as errors, which on a device would be undefined behaviour: vectors that are not aligned;
// a barrier, or a shuffle, that some threads of the block, or lanes that it names, do not come to.
// Shared arrays are full of NaN at the start of every block, and lie apart on the heap.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(8) uint2 {
  uint32_t x, y;
};

namespace cuda_on_cpu {

constexpr int kWarp = 32;

// Where the thread that runs now is.
struct Where {
  dim3 grid, block, block_index, thread_index;
};
extern Where here;

// Runs `thread` for every thread of every block, which has no depth, and `shared_bytes` that the
// launch asks for (warps.h). Raises std::runtime_error: a thread has failed.
void run(const char* op, dim3 grid, dim3 block, const std::function<void()>& thread,
         uint32_t shared_bytes = 0);

// Ends the launch with an error. Only from within a thread.
[[noreturn]] void fail(const std::string& what);

// Waits until all threads of the block are here.
void barrier(const char* place);

// The value of a lane of this warp, once all lanes of `lanes` are here with theirs.
uint64_t shuffle(const char* place, uint32_t lanes, uint64_t value, int source);

// Once all lanes of this warp are here: `work`, once, with what each has brought.
using Work = void (*)(void* const (&brought)[kWarp]);
void together(const char* place, Work work, void* mine);

// The number of this thread in its block, and how many barriers the block has passed.
int thread();
uint32_t barriers_passed();

// The shared array of this block that `key` stands for.
void* shared(const void* key, size_t bytes);

inline int lane() {
  return static_cast<int>(here.thread_index.y * here.block.x + here.thread_index.x) % kWarp;
}

template <class T>
T shuffled(const char* place, uint32_t lanes, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles take up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(place, lanes, bits, source);
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fail("a vector of " + std::to_string(bytes) + " bytes is not aligned");
  }
}

}  // namespace cuda_on_cpu

#define VF_PLACE_TEXT(line) #line
#define VF_PLACE_OF(file, line) file ":" VF_PLACE_TEXT(line)
#define VF_PLACE VF_PLACE_OF(__FILE__, __LINE__)

#define threadIdx (cuda_on_cpu::here.thread_index)
#define blockIdx (cuda_on_cpu::here.block_index)
#define blockDim (cuda_on_cpu::here.block)
#define gridDim (cuda_on_cpu::here.grid)

#define __syncthreads() cuda_on_cpu::barrier(VF_PLACE)
#define __shfl_xor_sync(lanes, value, mask) \
  cuda_on_cpu::shuffled(VF_PLACE, lanes, value, cuda_on_cpu::lane() ^ (mask))

#define VF_CHECK_ALIGNED(pointer, bytes) cuda_on_cpu::check_aligned(pointer, bytes)

// As `__shared__ type name[count]`: one array a place in the source, and a type of its template.
#define VF_SHARED(type, name, count) \
  static const char name##_key = 0;  \
  type* const name = static_cast<type*>(cuda_on_cpu::shared(&name##_key, sizeof(type) * (count)))
