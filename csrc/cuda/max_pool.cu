// 3x3 max pool with stride 2, from a slot into a slot, and its backward.
//
// Backward, a thread makes squares of 2x2 input pixels. With t = h + pad the rows of a square are
// t = 2a and 2a + 1: window a reaches both, window a - 1 only the first, and no other window any of
// them. So four windows hold all that flows into a square, and nothing is added atomically.
#include "../ops.h"
#include "common.cuh"

namespace vovnet_fast {
namespace cuda {
namespace {

constexpr int kStride = 2;

template <class T, int V>
VF_KERNEL max_pool_kernel(const MaxPoolParams p, const Share share, const Size size) {
  const Job job = job_of<V>(share, size.pixels(), blockIdx.x);
  if (!job.active) return;
  const T* x = image<T>(p.x, job.n, job.c);
  for (int index = job.first + threadIdx.y; index < job.last; index += blockDim.y) {
    const Pixel at = pixel_at(size, index);
    const int h = static_cast<int>(window_start(at.h, kStride, p.pad));
    const int w = static_cast<int>(window_start(at.w, kStride, p.pad));
    const Taps rows = taps_inside(h, p.height), columns = taps_inside(w, p.width);
    Raw<T, V> raw[9];
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      // Outside the image the window's first pixel is taken again, which exceeds nothing.
      const int row = min(max(tap / 3, rows.first), rows.last - 1);
      const int column = min(max(tap % 3, columns.first), columns.last - 1);
      raw[tap] = load<V>(x + offset(p.x, h + row, w + column));
    }
    Raw<T, V> best;
    Raw<uint8_t, V> winner;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      // Where nothing exceeds -inf, the first tap inside the image wins, as in torch.
      High<T> most = -INFINITY;
      int won = 3 * rows.first + columns.first;
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        const bool here = tap / 3 >= rows.first && tap / 3 < rows.last &&
                          tap % 3 >= columns.first && tap % 3 < columns.last;
        const High<T> y = widen(raw[tap].element[i]);
        if (here && exceeds(y, most)) {
          most = y;
          won = tap;
        }
      }
      best.element[i] = narrow<T>(most);
      winner.element[i] = static_cast<uint8_t>(won);
    }
    store(image<T>(p.out, job.n, job.c) + offset(p.out, at.h, at.w), best);
    if (p.argmax != nullptr) {
      store(p.argmax + (job.n * size.pixels() + index) * p.c + job.c, winner);
    }
  }
}

// Gradients of a window's output, and where in the window they go.
template <class T, int V>
struct Window {
  Raw<T, V> g;
  Raw<uint8_t, V> tap;
};

template <class T, int V>
VF_DEVICE Window<T, V> window(const MaxPoolBackwardParams& p, const Job& job, int h, int w) {
  Window<T, V> found = {zeros<T, V>(), {}};
  if (h < 0 || w < 0 || h >= p.out_height || w >= p.out_width) return found;
  const int64_t pixel = (job.n * p.out_height + h) * p.out_width + w;
  found.g = load<V>(image<T>(p.dout, job.n, job.c) + offset(p.dout, h, w));
  found.tap = load<V>(p.argmax + pixel * p.c + job.c);
  return found;
}

template <class T, int V>
VF_KERNEL max_pool_backward_kernel(const MaxPoolBackwardParams p, const Share share,
                                   const Size squares) {
  const Job job = job_of<V>(share, squares.pixels(), blockIdx.x);
  if (!job.active) return;
  for (int index = job.first + threadIdx.y; index < job.last; index += blockDim.y) {
    const Pixel square = pixel_at(squares, index);
    Window<T, V> windows[2][2];  // The second ones are the square's own.
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      windows[k / 2][k % 2] = window<T, V>(p, job, square.h - 1 + k / 2, square.w - 1 + k % 2);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int row = k / 2, column = k % 2;
      const int h = kStride * square.h - p.pad + row, w = kStride * square.w - p.pad + column;
      if (h < 0 || w < 0 || h >= p.height || w >= p.width) continue;
      High<T> sum[V] = {};
#pragma unroll
      for (int a = row; a < 2; ++a) {  // The window before reaches the first row only.
#pragma unroll
        for (int b = column; b < 2; ++b) {
          const int tap = 3 * (a == 0 ? 2 : row) + (b == 0 ? 2 : column);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (windows[a][b].tap.element[i] == tap) sum[i] += widen(windows[a][b].g.element[i]);
          }
        }
      }
      store_narrow(image<T>(p.out, job.n, job.c) + offset(p.out, h, w), sum);
    }
  }
}

// Whether argmax allows vectors too: in its own, smaller, measure.
template <class T>
bool argmax_fits(const void* argmax, int64_t c) {
  return argmax == nullptr ||
         (c % kVector<T> == 0 && reinterpret_cast<uintptr_t>(argmax) % kVector<T> == 0);
}

}  // namespace

void max_pool(const MaxPoolParams& p, void* stream) {
  const char* name = "max_pool";
  if (p.n * p.out_height * p.out_width * p.c == 0) return;
  check_device(name, p.out.data);
  checked_size(name, p.height, p.width);
  const Size size = checked_size(name, p.out_height, p.out_width);
  with_dtype(name, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto vector, int64_t first, int64_t vectors) {
      const dim3 block = block_for(vectors);
      const Share share = share_of(p.n, size.pixels(), first, vectors, block.y);
      launch(name, max_pool_kernel<T, decltype(vector)::value>, checked_grid(name, share.blocks()),
             block, stream, p, share, size);
    };
    for_channels<T>(p.c, vectors_fit<T>({p.x, p.out}) && argmax_fits<T>(p.argmax, p.c), run);
  });
}

void max_pool_backward(const MaxPoolBackwardParams& p, void* stream) {
  const char* name = "max_pool_backward";
  if (p.n * p.height * p.width * p.c == 0) return;
  check_device(name, p.out.data);
  checked_size(name, p.height, p.width);
  const Size squares =
      checked_size(name, ceil_div(p.height + p.pad, kStride), ceil_div(p.width + p.pad, kStride));
  with_dtype(name, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto vector, int64_t first, int64_t vectors) {
      const dim3 block = block_for(vectors);
      const Share share = share_of(p.n, squares.pixels(), first, vectors, block.y);
      launch(name, max_pool_backward_kernel<T, decltype(vector)::value>,
             checked_grid(name, share.blocks()), block, stream, p, share, squares);
    };
    for_channels<T>(p.c, vectors_fit<T>({p.dout, p.out}) && argmax_fits<T>(p.argmax, p.c), run);
  });
}

}  // namespace cuda
}  // namespace vovnet_fast
