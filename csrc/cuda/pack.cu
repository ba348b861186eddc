// Weights of a convolution times its scale, packed for it or for its input gradient, and the
// backward of that.
#include "../ops.h"
#include "reduce.cuh"

namespace vovnet_fast {
namespace cuda {
namespace {

constexpr int kEdge = 32, kEdgeRows = 8;  // Of a tile that is transposed.

// Weights of one output channel: taps * c_in of them.
struct Filter {
  int taps, columns;
};

Filter filter_of(const char* name, int64_t kernel, int64_t c_in) {
  const int64_t columns = kernel * kernel * c_in;
  if (columns > 1 << 30) {
    throw std::invalid_argument(std::string(name) + ": a filter may have up to 2^30 weights, got " +
                                std::to_string(columns));
  }
  return {static_cast<int>(kernel * kernel), static_cast<int>(columns)};
}

// Where weight `column` of a packed filter is in one with the strides of p.
template <class Params>
VF_DEVICE int64_t strided(const Params& p, int64_t output, int column) {
  const int c_in = static_cast<int>(p.c_in), kernel = static_cast<int>(p.kernel);
  const int tap = column / c_in, input = column - tap * c_in;
  return output * p.stride_o + tap / kernel * p.stride_h + tap % kernel * p.stride_w +
         input * p.stride_i;
}

// A block makes kThreads weights of a filter.
template <class T>
VF_KERNEL pack_kernel(const PackParams p, const Filter filter) {
  const int64_t blocks = ceil_div(filter.columns, kThreads);
  const int64_t output = blockIdx.x / blocks;
  const int column = static_cast<int>(blockIdx.x % blocks) * kThreads + threadIdx.x;
  if (column >= filter.columns) return;
  const auto weight = element<High<T>>(p.weight, strided(p, output, column));
  const auto scale = element_or(p.scale, output, High<T>(1));
  static_cast<T*>(p.out)[output * filter.columns + column] = narrow<T>(weight * scale);
}

// A block makes kEdge by kEdge channels of a tap.
template <class T>
VF_KERNEL pack_transposed_kernel(const PackParams p, const Filter filter) {
  VF_SHARED(High<T>, tile, kEdge * (kEdge + 1));  // Lest a column of it is one bank.
  const int64_t across = ceil_div(p.c_in, kEdge), down = ceil_div(p.c_out, kEdge);
  const int64_t block = blockIdx.x / across;
  const int64_t first_input = blockIdx.x % across * kEdge, first_output = block % down * kEdge;
  const int tap = static_cast<int>(block / down), last_tap = filter.taps - 1;
  for (int row = threadIdx.y; row < kEdge; row += kEdgeRows) {
    const int64_t input = first_input + threadIdx.x, output = first_output + row;
    if (input >= p.c_in || output >= p.c_out) continue;
    const int64_t from = strided(p, output, tap * static_cast<int>(p.c_in)) + input * p.stride_i;
    tile[row * (kEdge + 1) + threadIdx.x] =
        element<High<T>>(p.weight, from) * element_or(p.scale, output, High<T>(1));
  }
  __syncthreads();
  for (int row = threadIdx.y; row < kEdge; row += kEdgeRows) {
    const int64_t input = first_input + row, output = first_output + threadIdx.x;
    if (input >= p.c_in || output >= p.c_out) continue;
    static_cast<T*>(p.out)[(input * filter.taps + last_tap - tap) * p.c_out + output] =
        narrow<T>(tile[threadIdx.x * (kEdge + 1) + row]);
  }
}

// A block makes the gradients of a filter and of its scale.
template <class Number>
VF_KERNEL pack_backward_kernel(const PackBackwardParams p, const Filter filter) {
  const int64_t output = blockIdx.x;
  const Number* scales = static_cast<const Number*>(p.scale);
  Number sum[1] = {};
  for (int column = threadIdx.y; column < filter.columns; column += kThreads) {
    const int64_t to = output * filter.columns + column;
    Number product = element<Number>(p.products, strided(p, output, column));
    if (scales != nullptr) {
      sum[0] += element<Number>(p.weight, to) * product;
      product *= scales[output];
    }
    static_cast<Number*>(p.dweight)[to] = product;
  }
  if (scales != nullptr) store_sums(sum, static_cast<Number*>(p.dscale) + output, 1);
}

}  // namespace

void pack(const PackParams& p, void* stream) {
  const char* name = "pack";
  if (p.c_out * p.kernel * p.c_in == 0) return;
  check_device(name, p.out);
  const Filter filter = filter_of(name, p.kernel, p.c_in);
  with_dtype(name, p.dtype, [&](auto type) {
    const unsigned grid = checked_grid(name, p.c_out * ceil_div(filter.columns, kThreads));
    launch(name, pack_kernel<typename decltype(type)::type>, grid, kThreads, stream, p, filter);
  });
}

void pack_transposed(const PackParams& p, void* stream) {
  const char* name = "pack_transposed";
  if (p.c_out * p.kernel * p.c_in == 0) return;
  check_device(name, p.out);
  const Filter filter = filter_of(name, p.kernel, p.c_in);
  with_dtype(name, p.dtype, [&](auto type) {
    const int64_t blocks = filter.taps * ceil_div(p.c_out, kEdge) * ceil_div(p.c_in, kEdge);
    launch(name, pack_transposed_kernel<typename decltype(type)::type>, checked_grid(name, blocks),
           dim3(kEdge, kEdgeRows), stream, p, filter);
  });
}

void pack_backward(const PackBackwardParams& p, void* stream) {
  const char* name = "pack_backward";
  if (p.c_out * p.kernel * p.c_in == 0) return;
  check_device(name, p.dweight);
  const Filter filter = filter_of(name, p.kernel, p.c_in);
  with_high(name, p.dtype, [&](auto type) {
    launch(name, pack_backward_kernel<typename decltype(type)::type>, checked_grid(name, p.c_out),
           dim3(1, kThreads), stream, p, filter);
  });
}

}  // namespace cuda
}  // namespace vovnet_fast
