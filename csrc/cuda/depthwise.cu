// Depthwise 3x3 convolution and its gradients, from a slot into a slot.
#include "../ops.h"
#include "reduce.cuh"

namespace vovnet_fast {
namespace cuda {
namespace {

constexpr int kStrip =
    4;  // Neighbours in a row that a thread makes: they share most of their loads.
constexpr int kGradInFlight = 2;

// Strips of the pixels of an image.
Size strips_of(Size size) { return {size.height, static_cast<int>(ceil_div(size.width, kStrip))}; }

// Whether rows of the weights are aligned as vectors are.
template <class T>
bool weights_fit(const void* weight, int64_t c) {
  return c % kVector<T> == 0 && reinterpret_cast<uintptr_t>(weight) % 16 == 0;
}

// The three weights of a row of taps.
template <class T, int V>
VF_DEVICE void load_weights(Raw<T, V> (&weights)[3], const void* weight, int row, const Job& job,
                            int64_t c, bool vectors) {
  const T* from = static_cast<const T*>(weight) + 3 * row * c + job.c;
#pragma unroll
  for (int tap = 0; tap < 3; ++tap) {
    if (vectors) {
      weights[tap] = load<V>(from + tap * c);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) weights[tap].element[i] = from[tap * c + i];
    }
  }
}

// The pixels of a row from column `first` on; zeros outside the image.
template <int Count, class T, int V>
VF_DEVICE void load_pixels(Raw<T, V> (&pixels)[Count], const T* from, const View& view, int h,
                           int first, int64_t width) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const bool inside = first + i >= 0 && first + i < width;
    pixels[i] = inside ? load<V>(from + offset(view, h, first + i)) : zeros<T, V>();
  }
}

// sum += x * weight.
template <class T, int V>
VF_DEVICE void multiply(High<T> (&sum)[V], const Raw<T, V>& x, const Raw<T, V>& weight) {
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] += widen(x.element[i]) * widen(weight.element[i]);
}

// A thread makes a strip of output pixels.
template <class T, int V, int Stride>
VF_KERNEL depthwise_kernel(const DepthwiseParams p, const Share share, const Size strips,
                           const bool weight_vectors) {
  constexpr int kReach = (kStrip - 1) * Stride + 3;
  const Job job = job_of<V>(share, strips.pixels(), blockIdx.x);
  const int index = job.first + static_cast<int>(threadIdx.y);
  if (!job.active || index >= job.last) return;
  const Pixel strip = pixel_at(strips, index);
  const int first = strip.w * kStrip;
  const T* x = image<T>(p.x, job.n, job.c);
  High<T> sums[kStrip][V] = {};
#pragma unroll 1  // Loads of all rows at once would take too many registers.
  for (int row = 0; row < 3; ++row) {
    const int h = static_cast<int>(window_start(strip.h, Stride, 1)) + row;
    if (h < 0 || h >= p.height) continue;
    Raw<T, V> weights[3], pixels[kReach];
    load_weights(weights, p.weight, row, job, p.c, weight_vectors);
    load_pixels(pixels, x, p.x, h, static_cast<int>(window_start(first, Stride, 1)), p.width);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
#pragma unroll
      for (int tap = 0; tap < 3; ++tap) multiply(sums[i], pixels[i * Stride + tap], weights[tap]);
    }
  }
  T* out = image<T>(p.out, job.n, job.c);
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    if (first + i < p.out_width) store_narrow(out + offset(p.out, strip.h, first + i), sums[i]);
  }
}

// A thread makes a strip of input pixels.
template <class T, int V, int Stride>
VF_KERNEL depthwise_input_grad_kernel(const DepthwiseInputGradParams p, const Share share,
                                      const Size strips, const bool weight_vectors) {
  // Columns of the output whose windows hold pixels of the strip.
  constexpr int kBefore = Stride == 1 ? 1 : 0;
  constexpr int kReach = kBefore + kStrip / Stride + 1;
  const Job job = job_of<V>(share, strips.pixels(), blockIdx.x);
  const int index = job.first + static_cast<int>(threadIdx.y);
  if (!job.active || index >= job.last) return;
  const Pixel strip = pixel_at(strips, index);
  const int first = strip.w * kStrip;
  const T* g = image<T>(p.g, job.n, job.c);
  High<T> sums[kStrip][V] = {};
#pragma unroll 1
  for (int row = 0; row < 3; ++row) {
    const int h = static_cast<int>(window_of(strip.h, row, Stride, 1, p.out_height));
    if (h < 0) continue;
    Raw<T, V> weights[3], pixels[kReach];
    load_weights(weights, p.weight, row, job, p.c, weight_vectors);
    load_pixels(pixels, g, p.g, h, first / Stride - kBefore, p.out_width);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
#pragma unroll
      for (int tap = 0; tap < 3; ++tap) {
        const int column = i + 1 - tap + Stride * kBefore;  // times the stride
        if (column % Stride == 0) multiply(sums[i], pixels[column / Stride], weights[tap]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    if (first + i >= p.width) break;
    High<T> other[V];
    if (p.add.data != nullptr) {
      unpack(other, load<V>(image<T>(p.add, job.n, job.c) + offset(p.add, strip.h, first + i)));
#pragma unroll
      for (int j = 0; j < V; ++j) sums[i][j] += other[j];
    }
    if (p.mask.data != nullptr) {
      unpack(other, load<V>(image<T>(p.mask, job.n, job.c) + offset(p.mask, strip.h, first + i)));
#pragma unroll
      for (int j = 0; j < V; ++j) sums[i][j] = relu_gradient(sums[i][j], other[j]);
    }
    store_narrow(image<T>(p.out, job.n, job.c) + offset(p.out, strip.h, first + i), sums[i]);
  }
}

// A block makes the three taps of a row. The rows of one share are neighbours: the second finds the
// gradient in L2.
template <class T, int V>
VF_KERNEL depthwise_weight_grad_kernel(const DepthwiseWeightGradParams p, const Share share,
                                       const Size size) {
  const int row = static_cast<int>(blockIdx.x % 3);
  const Job job = job_of<V>(share, size.pixels(), blockIdx.x / 3);
  High<T> sums[3][V] = {};
  if (job.active) {
    const T* g = image<T>(p.g, job.n, job.c);
    const T* x = image<T>(p.x, job.n, job.c);
    const int step = blockDim.y;
    for (int first = job.first + threadIdx.y; first < job.last; first += kGradInFlight * step) {
      Raw<T, V> raw_g[kGradInFlight], raw_x[kGradInFlight][3];
      bool here[kGradInFlight][3];
#pragma unroll
      for (int u = 0; u < kGradInFlight; ++u) {
        const bool present = first + u * step < job.last;
        const Pixel at = pixel_at(size, first + u * step);
        const int h = static_cast<int>(window_start(at.h, p.stride, 1)) + row;
        const int w = static_cast<int>(window_start(at.w, p.stride, 1));
        raw_g[u] = present ? load<V>(g + offset(p.g, at.h, at.w)) : zeros<T, V>();
#pragma unroll
        for (int tap = 0; tap < 3; ++tap) {
          here[u][tap] = present && h >= 0 && h < p.height && w + tap >= 0 && w + tap < p.width;
          raw_x[u][tap] = here[u][tap] ? load<V>(x + offset(p.x, h, w + tap)) : zeros<T, V>();
        }
      }
#pragma unroll
      for (int u = 0; u < kGradInFlight; ++u) {
#pragma unroll
        for (int tap = 0; tap < 3; ++tap) {
          // Outside the image there is no product, which could be that of zero and infinity.
          if (here[u][tap]) multiply(sums[tap], raw_x[u][tap], raw_g[u]);
        }
      }
    }
  }
  High<T>* to = static_cast<High<T>*>(p.partials) +
                ((job.n * share.tiles + job.tile) * 9 + 3 * row) * p.c + first_channel<V>(job);
#pragma unroll
  for (int tap = 0; tap < 3; ++tap) {
    store_sums(sums[tap], to + tap * p.c, vectors_left<V>(share, job));
  }
}

// Calls f(integral constant) with the stride. Raises: there is no kernel for it.
template <class F>
void with_stride(const char* name, int32_t stride, F f) {
  if (stride == 1) return f(std::integral_constant<int, 1>{});
  if (stride == 2) return f(std::integral_constant<int, 2>{});
  throw std::invalid_argument(std::string(name) + ": stride must be 1 or 2, got " +
                              std::to_string(stride));
}

}  // namespace

void depthwise(const DepthwiseParams& p, void* stream) {
  const char* name = "depthwise";
  if (p.n * p.out_height * p.out_width * p.c == 0) return;
  check_device(name, p.out.data);
  checked_size(name, p.height, p.width);
  const Size strips = strips_of(checked_size(name, p.out_height, p.out_width));
  with_dtype(name, p.dtype, [&](auto type) {
    with_stride(name, p.stride, [&](auto taken) {
      using T = typename decltype(type)::type;
      const auto run = [&](auto vector, int64_t first, int64_t vectors) {
        const dim3 block = block_for(vectors);
        const Share share = share_of(p.n, strips.pixels(), first, vectors, block.y);
        launch(name, depthwise_kernel<T, decltype(vector)::value, decltype(taken)::value>,
               checked_grid(name, share.blocks()), block, stream, p, share, strips,
               weights_fit<T>(p.weight, p.c));
      };
      for_channels<T>(p.c, vectors_fit<T>({p.x, p.out}), run);
    });
  });
}

void depthwise_input_grad(const DepthwiseInputGradParams& p, void* stream) {
  const char* name = "depthwise_input_grad";
  if (p.n * p.height * p.width * p.c == 0) return;
  check_device(name, p.out.data);
  const Size strips = strips_of(checked_size(name, p.height, p.width));
  with_dtype(name, p.dtype, [&](auto type) {
    with_stride(name, p.stride, [&](auto taken) {
      using T = typename decltype(type)::type;
      const auto run = [&](auto vector, int64_t first, int64_t vectors) {
        const dim3 block = block_for(vectors);
        const Share share = share_of(p.n, strips.pixels(), first, vectors, block.y);
        launch(name,
               depthwise_input_grad_kernel<T, decltype(vector)::value, decltype(taken)::value>,
               checked_grid(name, share.blocks()), block, stream, p, share, strips,
               weights_fit<T>(p.weight, p.c));
      };
      for_channels<T>(p.c, vectors_fit<T>({p.g, p.out, p.add, p.mask}), run);
    });
  });
}

void depthwise_weight_grad(const DepthwiseWeightGradParams& p, void* stream) {
  const char* name = "depthwise_weight_grad";
  if (p.c == 0) return;
  check_device(name, p.out);
  checked_size(name, p.height, p.width);
  const Size size = checked_size(name, p.out_height, p.out_width);
  const int64_t tile = tile_of_parts(name, size, p.parts);
  with_dtype(name, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto vector, int64_t first, int64_t vectors) {
      const Share share = share_of(p.n, size.pixels(), first, vectors, tile);
      launch(name, depthwise_weight_grad_kernel<T, decltype(vector)::value>,
             checked_grid(name, 3 * share.blocks()), block_for(vectors), stream, p, share, size);
    };
    if (p.n * tile > 0) for_channels<T>(p.c, vectors_fit<T>({p.x, p.g}), run);
    sum_rows<High<T>>(name, p.partials, 1, p.n * parts_of(size, tile), 9 * p.c, 1, p.out, stream);
  });
}

}  // namespace cuda
}  // namespace vovnet_fast
