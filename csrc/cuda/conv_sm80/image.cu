// The first layer and the gradient of images, of the convolution for sm_80 and newer.
#include "../common.cuh"
#include "image.cuh"
#include "image_grad_params.h"
#include "launch.h"

namespace vovnet_fast {
namespace conv_sm80 {

Kernel image_kernel_of(int32_t dtype) {
  switch (dtype) {
    case kFloat16:
      return image_kernel<float16>;
    case kFloat32:
      return image_kernel<float>;
#if VF_EVERY_DTYPE
    case kBFloat16:
      return image_kernel<bfloat16>;
#endif
    default:
      cuda::unknown_dtype("conv_sm80", dtype, "fp16 (0), bf16 (1), fp32 (2)");
  }
}

}  // namespace conv_sm80

namespace cuda {
namespace {

constexpr int kChannels = conv_sm80::kImageChannels;

// A thread makes a pixel: it meets up to nine pixels of g, with all of their channels. Images
// seldom have a gradient: there are no tensor cores here.
template <class T>
VF_KERNEL image_grad_kernel(const ConvSm80ImageGradParams p) {
  constexpr int V = kVector<T>;
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= p.n * p.height * p.width) return;
  const int64_t n = pixel / (p.height * p.width), of_image = pixel - n * (p.height * p.width);
  const int64_t h = of_image / p.width, w = of_image - h * p.width;
  const T* g = static_cast<const T*>(p.g.data) + n * p.g.stride_n;
  float sums[kChannels] = {};
#pragma unroll 1
  for (int tap = 0; tap < 9; ++tap) {  // Of flipped filters: the first one meets the line before.
    const int64_t down = h + tap / 3 - 1, across = w + tap % 3 - 1;
    if (down < 0 || across < 0 || down % p.stride != 0 || across % p.stride != 0) continue;
    const int64_t line = down / p.stride, column = across / p.stride;
    if (line >= p.out_height || column >= p.out_width) continue;
    const T* from = g + line * p.g.stride_h + column * p.g.stride_w;
    const T* filter = static_cast<const T*>(p.weight) + tap * p.c_out;
#pragma unroll 2
    for (int64_t first = 0; first < p.c_out; first += V) {
      const Raw<T, V> met = load<V>(from + first);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const Raw<T, V> weight = load<V>(filter + c * 9 * p.c_out + first);
#pragma unroll
        for (int i = 0; i < V; ++i) sums[c] += widen(met.element[i]) * widen(weight.element[i]);
      }
    }
  }
  const auto at = [&](const View& view) {
    return static_cast<T*>(view.data) + n * view.stride_n + h * view.stride_h + w * view.stride_w;
  };
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    float y = sums[c];
    if (c < p.add_c) y += widen(at(p.add)[c]);
    const int64_t of_mask = c - (kChannels - p.mask_c);
    if (of_mask >= 0) y = relu_gradient(y, widen(at(p.mask)[of_mask]));
    at(p.out)[c] = narrow<T>(y);
  }
}

template <class T>
void launch_image_grad(const char* name, const ConvSm80ImageGradParams& p, void* stream) {
  const int64_t unit = kVector<T>;
  const bool fits = reinterpret_cast<uintptr_t>(p.g.data) % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 && p.c_out % unit == 0 &&
                    p.g.stride_n % unit == 0 && p.g.stride_h % unit == 0 &&
                    p.g.stride_w % unit == 0;
  if (!fits) {
    throw std::invalid_argument(std::string(name) +
                                ": addresses, strides and channels of g and weight must be "
                                "multiples of 16 bytes (copy the tensor, or take another engine)");
  }
  const unsigned grid = checked_grid(name, ceil_div(p.n * p.height * p.width, kThreads));
  launch(name, image_grad_kernel<T>, grid, dim3(kThreads), stream, p);
}

}  // namespace

void conv_sm80_image_grad(const ConvSm80ImageGradParams& params, void* stream) {
  const char* name = "conv_sm80_image_grad";
  if (params.n == 0 || params.height == 0 || params.width == 0) return;
  check_device(name, params.out.data);
  switch (params.dtype) {
    case kFloat16:
      return launch_image_grad<float16>(name, params, stream);
    case kFloat32:
      return launch_image_grad<float>(name, params, stream);
#if VF_EVERY_DTYPE
    case kBFloat16:
      return launch_image_grad<bfloat16>(name, params, stream);
#endif
    default:
      unknown_dtype(name, params.dtype, "fp16 (0), bf16 (1), fp32 (2)");
  }
}

}  // namespace cuda
}  // namespace vovnet_fast
