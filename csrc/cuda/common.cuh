// What all kernels share: vectors of 16 bytes, who does which pixels and channels, launches.
//
// A thread takes a vector of channels, `V` of them, of one pixel after the other. A block is X
// threads along the channels by Y along the pixels. Where a view does not allow vectors (alignment,
// strides), and for the channels that are left over when whole vectors are taken, V is 1. So
// every kernel has two forms, and none of them needs to test how long a vector is.
#pragma once

#ifdef VF_CUDA_ON_CPU
#include "../cuda_on_cpu/cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../dtypes.h"
#include "../math.h"
#include "../params.h"

#ifndef VF_CUDA_ON_CPU
// An array that the threads of a block share.
#define VF_SHARED(type, name, count) __shared__ type name[count]
#define VF_CHECK_ALIGNED(pointer, bytes)
#endif

#define VF_DEVICE __device__ __forceinline__

namespace vovnet_fast {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 2;  // At least: a thread then has at most 128 registers.

#define VF_KERNEL __global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)

// ---- Vectors -----------------------------------------------------------------------------------

// Elements of a vector of 16 bytes. fp64 is for tests of gradients: one form is enough for it.
template <class T>
constexpr int kVector = 16 / sizeof(T);
template <>
inline constexpr int kVector<double> = 1;

// V elements as they are in memory. Loads of several are issued before the first is widened.
template <class T, int V>
struct alignas(V * sizeof(T)) Raw {
  T element[V];
};

// A word that is loaded and stored at once.
template <size_t Bytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<1> {
  using type = uint8_t;
};
template <class T, int V>
using Word = typename WordOf<sizeof(Raw<T, V>)>::type;

// For loads that depend on conditions: a word is chosen as one. The elements of a vector would be
// chosen one by one, and halves then take twice the registers.
template <int V, class T>
VF_DEVICE Word<T, V> load_word(const T* from) {
  VF_CHECK_ALIGNED(from, sizeof(Raw<T, V>));
  return *reinterpret_cast<const Word<T, V>*>(from);
}

template <class T, int V>
VF_DEVICE Raw<T, V> raw_of(const Word<T, V>& word) {
  Raw<T, V> raw;
  memcpy(&raw, &word, sizeof raw);
  return raw;
}

template <int V, class T>
VF_DEVICE Raw<T, V> load(const T* from) {
  return raw_of<T, V>(load_word<V>(from));
}

#ifdef VF_CUDA_ON_CPU

template <class Word>
void store_word(Word* to, Word word) {
  *to = word;
}

#else

// Assignments would be split: the compiler remembers what a word was put together from.
VF_DEVICE void store_word(uint4* to, uint4 word) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
}

VF_DEVICE void store_word(uint2* to, uint2 word) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(word.x), "r"(word.y) : "memory");
}

VF_DEVICE void store_word(uint32_t* to, uint32_t word) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

#endif

template <class T, int V>
VF_DEVICE void store(T* to, const Raw<T, V>& raw) {
  VF_CHECK_ALIGNED(to, sizeof raw);
  if constexpr (V > 1) {
    Word<T, V> word;
    memcpy(&word, &raw, sizeof raw);
    store_word(reinterpret_cast<Word<T, V>*>(to), word);
  } else {
    *to = raw.element[0];
  }
}

// Zeros: what stands for a pixel that is not there.
template <class T, int V>
VF_DEVICE Raw<T, V> zeros() {
  Raw<T, V> raw;
#pragma unroll
  for (int i = 0; i < V; ++i) raw.element[i] = narrow<T>(High<T>(0));
  return raw;
}

template <class T, int V>
VF_DEVICE void unpack(High<T> (&y)[V], const Raw<T, V>& raw) {
#pragma unroll
  for (int i = 0; i < V; ++i) y[i] = widen(raw.element[i]);
}

template <class T, int V>
VF_DEVICE void store_narrow(T* to, const High<T> (&y)[V]) {
  Raw<T, V> raw;
#pragma unroll
  for (int i = 0; i < V; ++i) raw.element[i] = narrow<T>(y[i]);
  store(to, raw);
}

// V numbers of a vector over the channels, which may lie anywhere: a row of [6, C] starts at any
// multiple of C.
template <int V, class Number>
VF_DEVICE void load_row(Number (&y)[V], const Number* from) {
  constexpr int kEach = 16 / sizeof(Number);
  if constexpr (V % kEach == 0) {
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < V; i += kEach) {
        const Raw<Number, kEach> raw = load<kEach>(from + i);
#pragma unroll
        for (int j = 0; j < kEach; ++j) y[i + j] = raw.element[j];
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) y[i] = from[i];
}

// ---- Views -------------------------------------------------------------------------------------

// The elements of channel `c` of image `n` of a view.
template <class T>
VF_DEVICE T* image(const View& view, int64_t n, int64_t c) {
  return static_cast<T*>(view.data) + n * view.stride_n + c;
}

VF_DEVICE int64_t offset(const View& view, int h, int w) {
  return h * view.stride_h + w * view.stride_w;
}

// Whether vectors of `bytes` may be read, or written, at every V-th channel of every pixel. An
// absent view has no say.
inline bool vectors_fit(const View& view, int vector, int64_t bytes) {
  if (view.data == nullptr) return true;
  return reinterpret_cast<uintptr_t>(view.data) % bytes == 0 && view.stride_n % vector == 0 &&
         view.stride_h % vector == 0 && view.stride_w % vector == 0;
}

template <class T>
bool vectors_fit(std::initializer_list<View> views) {
  return std::all_of(views.begin(), views.end(), [](const View& view) {
    return vectors_fit(view, kVector<T>, kVector<T> * sizeof(T));
  });
}

// Height and width of an image, by which pixels are counted.
struct Size {
  int height, width;

  VF_HD int pixels() const { return height * width; }
};

// Raises: an image has more pixels than are counted.
inline Size checked_size(const char* op, int64_t height, int64_t width) {
  // With room for a border, and for the numbers of threads that find no pixel left.
  if ((height + 2) * (width + 2) > int64_t{1} << 30) {
    throw std::invalid_argument(std::string(op) + ": images may have up to 2^30 pixels, got " +
                                std::to_string(height) + " x " + std::to_string(width) +
                                ": cut them into tiles");
  }
  return {static_cast<int>(height), static_cast<int>(width)};
}

// The size of images whose pixels nothing but a stride tells apart, if every view allows it: one
// row, whose pixels need no division.
inline Size collapsed(Size size, std::initializer_list<View> views) {
  const bool raster = std::all_of(views.begin(), views.end(), [&](const View& view) {
    return view.data == nullptr || size.height == 1 || view.stride_h == size.width * view.stride_w;
  });
  return raster ? Size{1, size.pixels()} : size;
}

// Row and column of a pixel.
struct Pixel {
  int h, w;
};

VF_DEVICE Pixel pixel_at(const Size& size, int index) {
  if (size.height == 1) return {0, index};
  const int h = static_cast<int>(static_cast<unsigned>(index) / static_cast<unsigned>(size.width));
  return {h, index - h * size.width};
}

// ---- Who does what -----------------------------------------------------------------------------

// How the blocks of a launch share images, tiles of their pixels, and channels.
struct Share {
  int64_t first;  // channel
  int vectors;    // of channels, from there on
  int groups;     // blocks that share them
  int64_t tiles;  // of the pixels of an image
  int tile;       // pixels of each, but for the last
  int64_t images;

  int64_t blocks() const { return images * tiles * groups; }
};

// Pixels of a part where scratch has room for so many parts of an image: of the last ones there may
// be fewer pixels, or none at all, and then no part. 0 where an image has no pixels.
inline int64_t tile_of_parts(const char* op, Size size, int64_t parts) {
  if (size.pixels() > 0 && parts < 1) {
    throw std::invalid_argument(std::string(op) +
                                ": parts must be what reduction_parts says, got " +
                                std::to_string(parts));
  }
  return size.pixels() > 0 ? ceil_div(size.pixels(), parts) : 0;
}

// How many parts an image then has.
inline int64_t parts_of(Size size, int64_t tile) {
  return tile > 0 ? ceil_div(size.pixels(), tile) : 0;
}

// What a thread does of it: its channels, and pixels `first + threadIdx.y + k * blockDim.y`.
struct Job {
  int64_t n, tile;
  int64_t c;        // its first channel
  bool active;      // whether there are channels for it
  int first, last;  // pixels of its tile
};

// Blocks that differ in channels only are neighbours: what they share is then found in L2.
template <int V>
VF_DEVICE Job job_of(const Share& share, int pixels, int64_t block) {
  const int64_t image_tile = block / share.groups;
  const int group = static_cast<int>(block - image_tile * share.groups);
  const int vector = group * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  Job job;
  job.n = image_tile / share.tiles;
  job.tile = image_tile - job.n * share.tiles;
  job.c = share.first + static_cast<int64_t>(vector) * V;
  job.active = vector < share.vectors;
  const int64_t first = job.tile * share.tile;
  job.first = static_cast<int>(first < pixels ? first : pixels);
  job.last = pixels - job.first < share.tile ? pixels : job.first + share.tile;
  return job;
}

// The first channel of a thread's block, and how many of the share's vectors there are from it on.
template <int V>
VF_DEVICE int64_t first_channel(const Job& job) {
  return job.c - static_cast<int64_t>(threadIdx.x) * V;
}

template <int V>
VF_DEVICE int vectors_left(const Share& share, const Job& job) {
  return share.vectors - static_cast<int>((first_channel<V>(job) - share.first) / V);
}

constexpr int kMaxVectors = 32;  // Of the threads of a block, along the channels.

// Threads of a block, along channels and pixels, for so many vectors of channels. Blocks have
// whole numbers of vectors, as equal as possible, so that few threads are without work.
inline dim3 block_for(int64_t vectors) {
  const int64_t x = ceil_div(vectors, ceil_div(vectors, kMaxVectors));
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(kThreads / x), 1);
}

// Shares so many vectors of channels, from `first` on, and tiles of so many pixels.
inline Share share_of(int64_t images, int pixels, int64_t first, int64_t vectors, int64_t tile) {
  Share share;
  share.first = first;
  share.vectors = static_cast<int>(vectors);
  share.groups = static_cast<int>(ceil_div(vectors, block_for(vectors).x));
  share.tile = static_cast<int>(tile);
  share.tiles = ceil_div(pixels, tile);
  share.images = images;
  return share;
}

// Pixels of a tile where nothing asks for a number of them: a block takes `step` of them at a time,
// several times if so many blocks are there that the device is busy all the same.
inline int64_t tile_for(int64_t images, int pixels, int64_t vectors, int64_t step) {
  constexpr int64_t kEnough = 2048, kMost = 8;
  const int64_t blocks = share_of(images, pixels, 0, vectors, step).blocks();
  return step * std::clamp(blocks / kEnough, int64_t{1}, kMost);
}

template <int V>
using Vectors = std::integral_constant<int, V>;

// Calls launch(Vectors<V>, first channel, number of vectors): for all channels that make whole
// vectors, if `fit`, and for the rest one by one.
template <class T, class Launch>
void for_channels(int64_t c, bool fit, Launch launch) {
  const int64_t whole = fit ? c / kVector<T> * kVector<T> : 0;
  if constexpr (kVector<T> > 1) {
    if (whole > 0) launch(Vectors<kVector<T>>{}, int64_t{0}, whole / kVector<T>);
  } else {
    if (whole > 0) launch(Vectors<1>{}, int64_t{0}, whole);
  }
  if (whole < c) launch(Vectors<1>{}, whole, c - whole);
}

// ---- Launches ----------------------------------------------------------------------------------

template <class T>
struct Type {
  using type = T;
};

[[noreturn]] inline void unknown_dtype(const char* op, int32_t dtype, const char* known) {
  throw std::invalid_argument(std::string(op) + ": no kernel for the dtype with code " +
                              std::to_string(dtype) + ", only for " + known);
}

// Calls f(Type<T>) with the storage type of a dtype code.
template <class F>
void with_dtype(const char* op, int32_t dtype, F f) {
  switch (dtype) {
    case kFloat16:
      return f(Type<float16>{});
    case kBFloat16:
      return f(Type<bfloat16>{});
    case kFloat32:
      return f(Type<float>{});
    case kFloat64:
      return f(Type<double>{});
    default:
      unknown_dtype(op, dtype, "fp16 (0), bf16 (1), fp32 (2), fp64 (3)");
  }
}

// The same for numbers that are in high precision always.
template <class F>
void with_high(const char* op, int32_t dtype, F f) {
  switch (dtype) {
    case kFloat32:
      return f(Type<float>{});
    case kFloat64:
      return f(Type<double>{});
    default:
      unknown_dtype(op, dtype, "fp32 (2), fp64 (3)");
  }
}

// Raises: a grid is larger than a device takes.
inline unsigned checked_grid(const char* op, int64_t blocks) {
  if (blocks > 0x7fffffff) {
    throw std::invalid_argument(std::string(op) + ": " + std::to_string(blocks) +
                                " blocks are more than a launch may have: split the batch");
  }
  return static_cast<unsigned>(blocks);
}

#ifdef VF_CUDA_ON_CPU

inline void check_device(const char*, const void*) {}

template <class... Params>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, void*,
            const std::common_type_t<Params>&... params) {
  cuda_on_cpu::run(op, grid, block, [&] { kernel(params...); });
}

#else

inline void check(const char* op, cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + what + ": " + cudaGetErrorName(status) + " (" +
                           cudaGetErrorString(status) + ")");
}

// Raises: the current device is not the one where `pointer` lies.
inline void check_device(const char* op, const void* pointer) {
  int device;
  cudaPointerAttributes found;
  check(op, cudaGetDevice(&device), "no current device");
  check(op, cudaPointerGetAttributes(&found, pointer), "cannot tell where the output lies");
  if (found.type != cudaMemoryTypeDevice && found.type != cudaMemoryTypeManaged) {
    throw std::invalid_argument(std::string(op) + ": the output is not in the memory of a GPU");
  }
  if (found.type == cudaMemoryTypeDevice && found.device != device) {
    throw std::invalid_argument(std::string(op) + ": the output is on device " +
                                std::to_string(found.device) + ", the current device is " +
                                std::to_string(device) + ": call it under torch.cuda.device(" +
                                std::to_string(found.device) + ")");
  }
}

inline std::string words(dim3 size) {
  return std::to_string(size.x) + " x " + std::to_string(size.y) + " x " + std::to_string(size.z);
}

// Runs a kernel on a stream, and does not wait for it. Raises: it cannot be launched.
template <class... Params>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, void* stream,
            const std::common_type_t<Params>&... params) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(params...);
  check(op, cudaGetLastError(),
        "cannot launch a grid of " + words(grid) + " blocks of " + words(block) + " threads");
}

#endif

}  // namespace cuda
}  // namespace vovnet_fast
