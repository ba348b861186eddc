// Outputs of a depthwise 3x3 convolution, a row at a time, for whoever takes them.
#pragma once

#include "windows.h"

namespace vovnet_fast {
inline namespace VF_ISA {

constexpr int kDepthwiseTaps = 9;

// One image, and the weight of all channels, [3, 3, c] packed, or from its last tap on in reverse.
template <class T>
struct DepthwiseInput {
  const T* x;
  int64_t stride_h, stride_w;  // of x, in elements
  int64_t height, width, c;
  const T* weight;
  int64_t stride;    // of the convolution, 1 or 2
  int64_t tap_step;  // from the weights of a tap to those of the next

  VF_HD const T* at(int64_t h, int64_t w) const { return x + h * stride_h + w * stride_w; }
};

// The products that a pixel is the sum of: pixels of an input, each with the weights of a tap.
template <class T>
struct Products {
  int count = 0;
  const T* x[kDepthwiseTaps];
  const T* weight[kDepthwiseTaps];

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

// Those from `o` on that lie side by side. Every one is summed in the order of its taps, as one
// alone is. kEdges: some of their columns may lie outside.
template <class T, int kStride, bool kEdges, class Put>
VF_HD void depthwise_side_by_side(const DepthwiseInput<T>& in, Pixel o, Put put) {
  const int64_t h = window_start(o.h, kStride, 1), w = window_start(o.w, kStride, 1);
  const Taps rows = taps_inside(h, in.height);
  const Taps columns = kEdges ? columns_inside<kStride>(w, in.width) : Taps{};
  const T* x = in.at(h + rows.first, w + columns.first);
  const T* taps = in.weight + 3 * rows.first * in.tap_step;
  const int count = rows.last - rows.first;
  for_channels<T>(in.c, [&](int64_t c, auto span) VF_LAMBDA {
    Vector<T> sums[kAtOnce] = {};
    const T *row = x + c, *weight = taps + c;
    for (int i = 0; i < count; ++i, row += in.stride_h, weight += 3 * in.tap_step) {
      const Vector<T> weights[3] = {load(weight, span), load(weight + in.tap_step, span),
                                    load(weight + 2 * in.tap_step, span)};
      take_columns<T, kStride, kEdges>(row, in.stride_w, columns, span,
                                       [&](int output, int tap, auto values)
                                           VF_LAMBDA { sums[output] += values * weights[tap]; });
    }
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) put(i, c, sums[i], span);
  });
}

// One output, wherever it lies.
template <class T, class Put>
VF_HD void depthwise_alone(const DepthwiseInput<T>& in, Pixel o, Put put) {
  const int64_t h = window_start(o.h, in.stride, 1), w = window_start(o.w, in.stride, 1);
  const Taps rows = taps_inside(h, in.height), columns = taps_inside(w, in.width);
  Products<T> products;
  for (int i = rows.first; i < rows.last; ++i) {
    for (int j = columns.first; j < columns.last; ++j) {
      products.add(in.at(h + i, w + j), in.weight + (3 * i + j) * in.tap_step);
    }
  }
  for_channels<T>(in.c,
                  [&](int64_t c, auto span) VF_LAMBDA { put(0, c, products.sum(c, span), span); });
}

// put(i, channel, outputs, span) for the vectors of `count` pixels from `o` on, which lie in a row;
// i counts them. Each is put once.
template <class T, class Put>
VF_HD void depthwise_row(const DepthwiseInput<T>& in, Pixel o, int64_t count, Put put) {
  const int64_t columns = in.stride == 1 ? kColumns<1> : kColumns<2>;
  for (int64_t first = 0; first < count;) {
    const Pixel at{o.h, o.w + first};
    const int64_t w = window_start(at.w, in.stride, 1);
    const bool inside = w >= 0 && w + columns <= in.width;
    const bool several = count - first >= kAtOnce && (inside || in.stride == 1);
    const auto to = [&](int64_t i, int64_t c, auto y, auto span)
                        VF_LAMBDA { put(first + i, c, y, span); };
    if (!several) {
      depthwise_alone<T>(in, at, to);
    } else if (in.stride != 1) {
      depthwise_side_by_side<T, 2, false>(in, at, to);
    } else if (inside) {
      depthwise_side_by_side<T, 1, false>(in, at, to);
    } else {
      depthwise_side_by_side<T, 1, true>(in, at, to);
    }
    first += several ? kAtOnce : 1;
  }
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
