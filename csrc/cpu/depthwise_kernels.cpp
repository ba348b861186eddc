// Depthwise 3x3 convolution and its gradients.
#include "../ops.h"
#include "depthwise_rows.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

constexpr int kTaps = kDepthwiseTaps;

template <class T>
void run_depthwise(const DepthwiseParams& p, int threads) {
  const auto run = [&](const Share& share) {
    const DepthwiseInput<T> in{at<const T>(p.x, share.image, Pixel{0, 0}),
                               p.x.stride_h,
                               p.x.stride_w,
                               p.height,
                               p.width,
                               p.c,
                               static_cast<const T*>(p.weight),
                               p.stride,
                               p.c};
    for_rows(share, p.out_width, [&](Pixel first, int64_t count) VF_LAMBDA {
      T* out = at<T>(p.out, share.image, first);
      depthwise_row<T>(in, first, count, [&](int64_t i, int64_t c, auto y, auto span) VF_LAMBDA {
        store(out + i * p.out.stride_w + c, y, span);
      });
    });
  };
  for_pass(p.n, p.out_height * p.out_width, p.c, threads, run);
}

// What becomes of a gradient, and where it goes.
template <class T>
struct GradientEnd {
  const DepthwiseInputGradParams& p;
  int64_t image;

  template <class Span>
  VF_HD void put(Pixel pixel, int64_t c, Vector<T> y, Span span) const {
    if (p.add.data != nullptr) y += load(at<const T>(p.add, image, pixel) + c, span);
    if (p.mask.data != nullptr) {
      y = relu_gradient(y, load(at<const T>(p.mask, image, pixel) + c, span));
    }
    store(at<T>(p.out, image, pixel) + c, y, span);
  }
};

// With a stride of 1 it is a convolution of the gradient, the taps of which come in reverse.
template <class T>
void run_input_grad_of_one(const DepthwiseInputGradParams& p, int threads) {
  const T* last_tap = static_cast<const T*>(p.weight) + (kTaps - 1) * p.c;
  const auto run = [&](const Share& share) {
    const DepthwiseInput<T> in{at<const T>(p.g, share.image, Pixel{0, 0}),
                               p.g.stride_h,
                               p.g.stride_w,
                               p.height,
                               p.width,
                               p.c,
                               last_tap,
                               1,
                               -p.c};
    const GradientEnd<T> end{p, share.image};
    for_rows(share, p.width, [&](Pixel first, int64_t count) VF_LAMBDA {
      depthwise_row<T>(in, first, count, [&](int64_t i, int64_t c, auto y, auto span) VF_LAMBDA {
        end.put(Pixel{first.h, first.w + i}, c, y, span);
      });
    });
  };
  for_pass(p.n, p.height * p.width, p.c, threads, run);
}

template <class T>
void run_input_grad(const DepthwiseInputGradParams& p, int threads) {
  if (p.stride == 1) return run_input_grad_of_one<T>(p, threads);
  const auto* weight = static_cast<const T*>(p.weight);
  const auto run = [&](const Share& share) {
    const GradientEnd<T> end{p, share.image};
    for_each_pixel(share, p.width, [&](Pixel pixel) {
      Products<T> products;
      for (int tap = 0; tap < kTaps; ++tap) {
        const int64_t h = window_of(pixel.h, tap / 3, p.stride, 1, p.out_height);
        const int64_t w = window_of(pixel.w, tap % 3, p.stride, 1, p.out_width);
        if (h < 0 || w < 0) continue;
        products.add(at<const T>(p.g, share.image, Pixel{h, w}), weight + tap * p.c);
      }
      for_channels<T>(p.c, [&](int64_t c, auto span)
                               VF_LAMBDA { end.put(pixel, c, products.sum(c, span), span); });
    });
  };
  for_pass(p.n, p.height * p.width, p.c, threads, run);
}

// Adds the products of one output pixel with the inputs at its taps to their sums.
template <class T>
VF_HD void add_pixel(const DepthwiseWeightGradParams& p, int64_t image, Pixel o, High<T>* sums) {
  const int64_t h = window_start(o.h, p.stride, 1), w = window_start(o.w, p.stride, 1);
  const Taps rows = taps_inside(h, p.height), columns = taps_inside(w, p.width);
  const T* g = at<const T>(p.g, image, o);
  for (int i = rows.first; i < rows.last; ++i) {
    for (int j = columns.first; j < columns.last; ++j) {
      const T* x = at<const T>(p.x, image, Pixel{h + i, w + j});
      High<T>* sum = sums + (3 * i + j) * p.c;
      for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
        store(sum + c, load(sum + c, span) + load(x + c, span) * load(g + c, span), span);
      });
    }
  }
}

// Sums of the taps of a row, each in two parts, so that additions do not wait for each other.
template <class T>
using RowSums = Vector<T>[3][2];

// Adds the products of outputs that lie side by side with a row of their inputs, of which x is the
// first inside.
template <class T, int kStride, bool kEdges, class Span>
VF_HD void add_side_by_side(const T* x, int64_t x_step, const T* g, int64_t g_step, Taps inside,
                            Span span, RowSums<T>& sums) {
  Vector<T> gradient[kAtOnce];
#pragma GCC unroll 4
  for (int i = 0; i < kAtOnce; ++i) gradient[i] = load(g + i * g_step, span);
  take_columns<T, kStride, kEdges>(x, x_step, inside, span,
                                   [&](int output, int tap, auto values) VF_LAMBDA {
                                     sums[tap][output % 2] += values * gradient[output];
                                   });
}

// The same of a row of outputs, or a part of one, of all of their inputs, but for those that are
// left when all others are taken side by side.
template <class T, int kStride>
VF_HD void add_row(const DepthwiseWeightGradParams& p, int64_t image, Pixel o, int64_t groups,
                   High<T>* sums) {
  const int64_t h = window_start(o.h, kStride, 1), w = window_start(o.w, kStride, 1);
  const Taps rows = taps_inside(h, p.height);
  const T* g = at<const T>(p.g, image, o);
  const int64_t x_step = p.x.stride_w, g_step = p.g.stride_w;
  for (int i = rows.first; i < rows.last; ++i) {
    const T* row = at<const T>(p.x, image, Pixel{h + i, 0});
    High<T>* all = sums + 3 * i * p.c;
    for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
      RowSums<T> found = {};
      for (int64_t k = 0; k < groups; ++k) {
        const int64_t begin = w + k * kAtOnce * kStride;
        const Taps inside = columns_inside<kStride>(begin, p.width);
        const T* x = row + (begin + inside.first) * x_step + c;
        const T* gradient = g + k * kAtOnce * g_step + c;
        if (inside.last - inside.first == kColumns<kStride>) {
          add_side_by_side<T, kStride, false>(x, x_step, gradient, g_step, inside, span, found);
        } else {
          add_side_by_side<T, kStride, true>(x, x_step, gradient, g_step, inside, span, found);
        }
      }
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        High<T>* sum = all + j * p.c + c;
        store(sum, load(sum, span) + (found[j][0] + found[j][1]), span);
      }
    });
  }
}

template <class T>
void run_weight_grad(const DepthwiseWeightGradParams& p, int threads) {
  auto* partials = static_cast<High<T>*>(p.partials);
  auto* out = static_cast<High<T>*>(p.out);
  const int64_t pixels = p.out_height * p.out_width;
  if (p.n * pixels == 0) return zero(out, kTaps * p.c);
  const auto run = [&](const Share& share) {
    High<T>* sums = partials + (share.image * p.parts + share.index) * kTaps * p.c;
    zero(sums, kTaps * p.c);
    for_rows(share, p.out_width, [&](Pixel first, int64_t count) VF_LAMBDA {
      const int64_t groups = count / kAtOnce;
      if (groups > 0) {
        if (p.stride == 1) {
          add_row<T, 1>(p, share.image, first, groups, sums);
        } else {
          add_row<T, 2>(p, share.image, first, groups, sums);
        }
      }
      for (int64_t i = groups * kAtOnce; i < count; ++i) {
        add_pixel<T>(p, share.image, Pixel{first.h, first.w + i}, sums);
      }
    });
  };
  for_shares(p.n, pixels, ceil_div(pixels, p.parts), p.c, threads, run);
  sum_packed_rows(partials, p.n * p.parts, kTaps * p.c, threads, out);
}

}  // namespace

void depthwise(const DepthwiseParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) { run_depthwise<decltype(type)>(p, threads); });
}

void depthwise_input_grad(const DepthwiseInputGradParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) { run_input_grad<decltype(type)>(p, threads); });
}

void depthwise_weight_grad(const DepthwiseWeightGradParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) { run_weight_grad<decltype(type)>(p, threads); });
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
