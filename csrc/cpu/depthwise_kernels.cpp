// Depthwise 3x3 convolution and its gradients.
#include "../ops.h"
#include "depthwise_rows.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

constexpr int kTaps = kDepthwiseTaps;

// body(first, count) for the rows of a share, or what it has of them.
template <class Body>
VF_HD void for_rows(const Share& share, int64_t width, Body body) {
  Pixel first{share.first / width, share.first % width};
  for (int64_t left = share.last - share.first; left > 0;) {
    const int64_t count = least(left, width - first.w);
    body(first, count);
    left -= count;
    first = {first.h + 1, 0};
  }
}

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
  for_shares(p.n, p.out_height * p.out_width, pass_pixels(p.c), p.c, threads, run);
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
  for_shares(p.n, p.height * p.width, pass_pixels(p.c), p.c, threads, run);
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
  for_shares(p.n, p.height * p.width, pass_pixels(p.c), p.c, threads, run);
}

// Adds the products of some output pixels with the inputs at one tap to its sums.
template <class T, int kCount>
VF_HD void add_tap(const DepthwiseWeightGradParams& p, int64_t image, const Pixel* pixels, int tap,
                   High<T>* sums) {
  const T* x[kCount];
  const T* g[kCount];
  int count = 0;
  for (int i = 0; i < kCount; ++i) {
    const int64_t h = window_start(pixels[i].h, p.stride, 1) + tap / 3;
    const int64_t w = window_start(pixels[i].w, p.stride, 1) + tap % 3;
    if (h < 0 || h >= p.height || w < 0 || w >= p.width) continue;
    x[count] = at<const T>(p.x, image, Pixel{h, w});
    g[count++] = at<const T>(p.g, image, pixels[i]);
  }
  for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
    Vector<T> sum{};
    for (int i = 0; i < count; ++i) sum += load(x[i] + c, span) * load(g[i] + c, span);
    store(sums + c, load(sums + c, span) + sum, span);
  });
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
    for_pixels(share, p.out_width, [&](const Pixel* block, auto count) {
      for (int tap = 0; tap < kTaps; ++tap) {
        add_tap<T, count.value>(p, share.image, block, tap, sums + tap * p.c);
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
