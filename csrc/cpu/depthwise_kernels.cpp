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
                               p.stride};
    Pixel o{share.first / p.out_width, share.first % p.out_width};
    for (int64_t left = share.last - share.first; left > 0;) {
      const int64_t count = least(left, p.out_width - o.w);
      T* out = at<T>(p.out, share.image, o);
      depthwise_row<T>(in, o, count, [&](int64_t i, int64_t c, auto y, auto span) VF_LAMBDA {
        store(out + i * p.out.stride_w + c, y, span);
      });
      left -= count;
      o = {o.h + 1, 0};
    }
  };
  for_shares(p.n, p.out_height * p.out_width, pass_pixels(p.c), p.c, threads, run);
}

template <class T>
void run_input_grad(const DepthwiseInputGradParams& p, int threads) {
  const auto* weight = static_cast<const T*>(p.weight);
  const bool added = p.add.data != nullptr, masked = p.mask.data != nullptr;
  const auto run = [&](const Share& share) {
    for_each_pixel(share, p.width, [&](Pixel pixel) {
      Products<T> products;
      for (int tap = 0; tap < kTaps; ++tap) {
        const int64_t h = window_of(pixel.h, tap / 3, p.stride, 1, p.out_height);
        const int64_t w = window_of(pixel.w, tap % 3, p.stride, 1, p.out_width);
        if (h < 0 || w < 0) continue;
        products.add(at<const T>(p.g, share.image, Pixel{h, w}), weight + tap * p.c);
      }
      T* out = at<T>(p.out, share.image, pixel);
      const T* add = added ? at<const T>(p.add, share.image, pixel) : nullptr;
      const T* mask = masked ? at<const T>(p.mask, share.image, pixel) : nullptr;
      for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
        auto y = products.sum(c, span);
        if (added) y += load(add + c, span);
        if (masked) y = relu_gradient(y, load(mask + c, span));
        store(out + c, y, span);
      });
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
