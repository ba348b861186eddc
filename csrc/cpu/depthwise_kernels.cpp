// Depthwise 3x3 convolution and its gradients.
#include "../ops.h"
#include "loops.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

constexpr int kTaps = 9;

// The products that a pixel is the sum of: pixels of an input, each with the weights of a tap.
template <class T>
struct Products {
  int count = 0;
  const T* x[kTaps];
  const T* weight[kTaps];

  VF_HD void add(const T* pixel, const T* tap) {
    x[count] = pixel;
    weight[count++] = tap;
  }

  template <class Span>
  VF_HD Vector<T> sum(int64_t c, Span span) const {
    Vector<T> y{};
    for (int i = 0; i < count; ++i) y += load(x[i] + c, span) * load(weight[i] + c, span);
    return y;
  }
};

// Outputs that lie side by side and have all their columns: inputs and weights are loaded once for
// all of them.
constexpr int kAtOnce = 4;

// Those from `o` on. Every one is summed in the order of its taps, as one alone is.
template <class T, int kStride>
VF_HD void run_side_by_side(const DepthwiseParams& p, int64_t image, Pixel o) {
  constexpr int kColumns = (kAtOnce - 1) * kStride + 3;
  const int64_t h = window_start(o.h, kStride, 1), w = window_start(o.w, kStride, 1);
  const Taps rows = taps_inside(h, p.height);
  const T* x = at<const T>(p.x, image, Pixel{h + rows.first, w});
  const T* taps = static_cast<const T*>(p.weight) + 3 * rows.first * p.c;
  const int count = rows.last - rows.first;
  T* out = at<T>(p.out, image, o);
  for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
    Vector<T> sums[kAtOnce] = {};
    const T *row = x + c, *weight = taps + c;
    for (int i = 0; i < count; ++i, row += p.x.stride_h, weight += 3 * p.c) {
      const Vector<T> tap[3] = {load(weight, span), load(weight + p.c, span),
                                load(weight + 2 * p.c, span)};
#pragma GCC unroll 16
      for (int column = 0; column < kColumns; ++column) {
        const auto value = load(row + column * p.x.stride_w, span);
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          const int output = (column - j) / kStride;
          if (column < j || (column - j) % kStride != 0 || output >= kAtOnce) continue;
          sums[output] += value * tap[j];
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) store(out + i * p.out.stride_w + c, sums[i], span);
  });
}

// One output, wherever it lies.
template <class T>
VF_HD void run_one(const DepthwiseParams& p, int64_t image, Pixel o) {
  const auto* weight = static_cast<const T*>(p.weight);
  const int64_t h = window_start(o.h, p.stride, 1), w = window_start(o.w, p.stride, 1);
  const Taps rows = taps_inside(h, p.height), columns = taps_inside(w, p.width);
  Products<T> products;
  for (int i = rows.first; i < rows.last; ++i) {
    for (int j = columns.first; j < columns.last; ++j) {
      const Pixel pixel{h + i, w + j};
      products.add(at<const T>(p.x, image, pixel), weight + (3 * i + j) * p.c);
    }
  }
  T* out = at<T>(p.out, image, o);
  for_channels<T>(
      p.c, [&](int64_t c, auto span) VF_LAMBDA { store(out + c, products.sum(c, span), span); });
}

template <class T>
void run_depthwise(const DepthwiseParams& p, int threads) {
  const int64_t columns = (kAtOnce - 1) * p.stride + 3;
  const auto run = [&](const Share& share) {
    Pixel o{share.first / p.out_width, share.first % p.out_width};
    for (int64_t left = share.last - share.first; left > 0;) {
      const int64_t w = window_start(o.w, p.stride, 1);
      const bool several = left >= kAtOnce && w >= 0 && w + columns <= p.width;
      if (!several) {
        run_one<T>(p, share.image, o);
      } else if (p.stride == 1) {
        run_side_by_side<T, 1>(p, share.image, o);
      } else {
        run_side_by_side<T, 2>(p, share.image, o);
      }
      left -= several ? kAtOnce : 1;
      o.w += several ? kAtOnce : 1;
      if (o.w == p.out_width) o = {o.h + 1, 0};
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
