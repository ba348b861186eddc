// Effective Squeeze-Excitation, where there are no pixels: the mean, the FC and the gate, and their
// backward.
#include "../ops.h"
#include "reduce.cuh"

namespace vovnet_fast {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kImages = 4;  // For which a weight is loaded once.
constexpr int kGradRows = 16;

template <class Number>
VF_DEVICE Number gate(Number z, int32_t kind) {
  return kind == kHardSigmoid ? hard_sigmoid(z) : sigmoid(z);
}

template <class Number>
VF_DEVICE Number gate_gradient(Number dgate, Number gate, int32_t kind) {
  return kind == kHardSigmoid ? hard_sigmoid_gradient(dgate, gate) : sigmoid_gradient(dgate, gate);
}

// Calls f(Type<T>) with the type of a weight: once, and not for every element.
template <class F>
VF_DEVICE void with_weights(int32_t dtype, F f) {
  switch (dtype) {
    case kFloat16:
      return f(Type<float16>{});
    case kBFloat16:
      return f(Type<bfloat16>{});
    case kFloat32:
      return f(Type<float>{});
    default:
      return f(Type<double>{});
  }
}

// The sum over the lanes of a warp, in every lane.
template <class Number>
VF_DEVICE Number warp_sum(Number sum) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  }
  return sum;
}

// A warp makes one gate of kImages images.
template <class Number>
VF_KERNEL fc_gate_kernel(const GatesParams p) {
  const int64_t blocks = ceil_div(p.c, kWarps);
  const int64_t first = blockIdx.x / blocks * kImages;
  const int64_t output = blockIdx.x % blocks * kWarps + threadIdx.y;
  const int images = static_cast<int>(p.n - first < kImages ? p.n - first : kImages);
  const Number* mean = static_cast<const Number*>(p.mean) + first * p.c;
  Number sums[kImages] = {};
  if (output < p.c) {
    with_weights(p.fc_weight.dtype, [&](auto type) {
      using Weight = typename decltype(type)::type;
      const Weight* weights = static_cast<const Weight*>(p.fc_weight.data) + output * p.c;
#pragma unroll 4
      for (int64_t c = threadIdx.x; c < p.c; c += kWarp) {
        const Number weight = static_cast<Number>(widen(weights[c]));
#pragma unroll
        for (int i = 0; i < kImages; ++i) {
          if (i < images) sums[i] += weight * mean[i * p.c + c];
        }
      }
    });
  }
#pragma unroll
  for (int i = 0; i < kImages; ++i) {
    const Number sum = warp_sum(sums[i]);
    if (threadIdx.x == 0 && output < p.c && i < images) {
      const Number bias = element<Number>(p.fc_bias, output);
      static_cast<Number*>(p.out)[(first + i) * p.c + output] = gate(sum + bias, p.kind);
    }
  }
}

// A block makes kWarp channels of dpixel of one image. Without a number of blocks ptxas may rather
// spill than have fewer of them on a processor.
template <class Number>
__global__ void __launch_bounds__(kWarp* kGradRows, kBlocksPerProcessor)
    fc_input_grad_kernel(const GatesBackwardParams p) {
  VF_SHARED(Number, sums, kWarp * kGradRows);
  const int64_t blocks = ceil_div(p.c, kWarp);
  const int64_t n = blockIdx.x / blocks;
  const int64_t input = blockIdx.x % blocks * kWarp + threadIdx.x;
  const Number* dgates = static_cast<const Number*>(p.dgates) + n * p.c;
  const Number* gates = static_cast<const Number*>(p.gates) + n * p.c;
  Number sum = 0;
  if (input < p.c) {
    with_weights(p.fc_weight.dtype, [&](auto type) {
      using Weight = typename decltype(type)::type;
      const Weight* weights = static_cast<const Weight*>(p.fc_weight.data) + input;
#pragma unroll 4
      for (int64_t output = threadIdx.y; output < p.c; output += kGradRows) {
        const Number weight = static_cast<Number>(widen(weights[output * p.c]));
        sum += weight * gate_gradient(dgates[output], gates[output], p.kind);
      }
    });
  }
  sums[threadIdx.y * kWarp + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || input >= p.c) return;
  sum = 0;
  for (int row = 0; row < kGradRows; ++row) sum += sums[row * kWarp + threadIdx.x];
  static_cast<Number*>(p.dpixel)[n * p.c + input] = sum / static_cast<Number>(p.num_pixels);
}

// A thread makes the gradient of one weight, and the first of a row that of the bias.
template <class Number>
VF_KERNEL fc_weight_grad_kernel(const GatesBackwardParams p) {
  const int64_t blocks = ceil_div(p.c, kWarp);
  const int64_t output = blockIdx.x / blocks * kWarps + threadIdx.y;
  const int64_t input = blockIdx.x % blocks * kWarp + threadIdx.x;
  if (output >= p.c || input >= p.c) return;
  const Number* dgates = static_cast<const Number*>(p.dgates) + output;
  const Number* gates = static_cast<const Number*>(p.gates) + output;
  const Number* mean = static_cast<const Number*>(p.mean) + input;
  Number dweight = 0, dbias = 0;
#pragma unroll 4
  for (int64_t n = 0; n < p.n; ++n) {
    const Number d = gate_gradient(dgates[n * p.c], gates[n * p.c], p.kind);
    dweight += d * mean[n * p.c];
    dbias += d;
  }
  static_cast<Number*>(p.dfc_weight)[output * p.c + input] = dweight;
  if (input == 0) static_cast<Number*>(p.dfc_bias)[output] = dbias;
}

}  // namespace

void gates(const GatesParams& p, void* stream) {
  const char* name = "gates";
  if (p.n * p.c == 0) return;
  check_device(name, p.out);
  with_high(name, p.dtype, [&](auto type) {
    using Number = typename decltype(type)::type;
    sum_rows<Number>(name, p.partials, p.n, p.tiles, p.c, p.num_pixels, p.mean, stream);
    const unsigned grid = checked_grid(name, ceil_div(p.n, kImages) * ceil_div(p.c, kWarps));
    launch(name, fc_gate_kernel<Number>, grid, dim3(kWarp, kWarps), stream, p);
  });
}

void gates_backward(const GatesBackwardParams& p, void* stream) {
  const char* name = "gates_backward";
  if (p.c == 0) return;
  check_device(name, p.dfc_bias);
  with_high(name, p.dtype, [&](auto type) {
    using Number = typename decltype(type)::type;
    const int64_t inputs = ceil_div(p.c, kWarp);
    if (p.n > 0) {
      launch(name, fc_input_grad_kernel<Number>, checked_grid(name, p.n * inputs),
             dim3(kWarp, kGradRows), stream, p);
    }
    launch(name, fc_weight_grad_kernel<Number>, checked_grid(name, ceil_div(p.c, kWarps) * inputs),
           dim3(kWarp, kWarps), stream, p);
  });
}

}  // namespace cuda
}  // namespace vovnet_fast
