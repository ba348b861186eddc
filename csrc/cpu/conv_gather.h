// The input of a strip, gathered (conv_plan.h).
#pragma once

#include <cstring>
#include <type_traits>

#include "conv_plan.h"
#include "depthwise_rows.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

// A number as it is multiplied.
template <class Packed, class T>
VF_HD Packed convert(T y) {
  if constexpr (sizeof(T) == sizeof(Packed)) {
    return y;
  } else if constexpr (std::is_integral_v<Packed>) {
    return static_cast<Packed>(y);
  } else {
    return widen(y);
  }
}

// A chunk of channels, or, with fewer `channels` than that, the last of a pixel.
template <class T, class Packed>
VF_HD void gather_chunk(const T* from, int64_t channels, char* to) {
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(Packed));
  if (channels < kChunk) {
    alignas(kChunkBytes) Packed tail[kChunk] = {};
    int64_t k = 0;
    if constexpr (sizeof(T) == 1 && sizeof(Packed) == 1) {  // Most channels are multiples of 16.
      for (; k + 16 <= channels; k += 16) memcpy(tail + k, from + k, 16);
    }
    for (; k < channels; ++k) tail[k] = convert<Packed>(from[k]);
    memcpy(to, tail, kChunkBytes);
  } else if constexpr (sizeof(T) == sizeof(Packed)) {
    memcpy(to, from, kChunkBytes);
  } else if constexpr (std::is_integral_v<Packed>) {
    for (int k = 0; k < kChunk; ++k) {
      const Packed wide = from[k];
      memcpy(to + k * sizeof wide, &wide, sizeof wide);
    }
  } else {
    for (int k = 0; k < kChunk; k += kLanes<T>) {
      const auto wide = load(from + k, Full{});
      memcpy(to + k * 4, &wide, sizeof wide);
    }
  }
}

// Channels of pixels that lie `stride` elements apart, into chunks that lie `step` bytes apart.
template <class T, class Packed>
VF_HD void gather_pixels(const T* from, int64_t stride, int64_t pixels, int64_t channels, char* to,
                         int64_t step) {
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(Packed));
  constexpr int64_t kGroup = 16;  // So many streams to read, and runs of 1 KiB to write.
  for (int64_t first = 0; first < pixels; first += kGroup) {
    const int64_t last = least(first + kGroup, pixels);
    for (int64_t c = 0; c < channels; c += kChunk) {
      for (int64_t i = first; i < last; ++i) {
        gather_chunk<T, Packed>(from + i * stride + c, channels - c,
                                to + i * kChunkBytes + c / kChunk * step);
      }
    }
  }
}

VF_HD void clear_pixels(int64_t first, int64_t last, int64_t chunks, char* row, int64_t step) {
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t i = first; i < last; ++i) memset(row + i * kChunkBytes + c * step, 0, kChunkBytes);
  }
}

// One row of one plane: columns `stride` apart, of which the first lies at `column`.
template <class T, class Packed, class Params>
VF_HD void gather_row(const Params& p, const Plan& plan, const T* x, int64_t row, int64_t column,
                      char* to) {
  const int64_t step = plan.pixels * kChunkBytes, stride = plan.stride;
  int64_t first = plan.width, last = plan.width;  // Those inside the image.
  if (row >= 0 && row < p.height) {
    first = least(plan.width, ceil_div(-column, stride));
    if (column >= 0) first = 0;
    last = least(plan.width, ceil_div(p.width - column, stride));
  }
  clear_pixels(0, first, plan.chunks, to, step);
  if (last > first) {
    const T* from = x + row * p.x.stride_h + (column + first * stride) * p.x.stride_w;
    gather_pixels<T, Packed>(from, stride * p.x.stride_w, last - first, p.c_in,
                             to + first * kChunkBytes, step);
  }
  clear_pixels(last, plan.width, plan.chunks, to, step);
}

// All taps of one pixel of the output, whose first tap lies at (row, column).
template <class T, class Packed, class Params>
VF_HD void unfold_pixel(const Params& p, const T* x, int64_t row, int64_t column, Packed* taps) {
  // Where pixels lie side by side, so do the taps of a row.
  const bool together = p.x.stride_w == p.c_in && column >= 0 && column + p.kernel <= p.width;
  const int64_t runs = together ? 1 : p.kernel, run = together ? p.kernel * p.c_in : p.c_in;
  for (int64_t h = row; h < row + p.kernel; ++h) {
    for (int64_t i = 0; i < runs; ++i, taps += run) {
      const int64_t w = column + i;
      const bool inside = h >= 0 && h < p.height && (together || (w >= 0 && w < p.width));
      const T* from = x + h * p.x.stride_h + w * p.x.stride_w;
      int64_t c = 0;
      if constexpr (std::is_integral_v<Packed>) {  // A vector of eight, for compilers to see.
        for (; inside && c + 8 <= run; c += 8) {
          for (int k = 0; k < 8; ++k) taps[c + k] = convert<Packed>(from[c + k]);
        }
      }
      for (; c < run; ++c) taps[c] = inside ? convert<Packed>(from[c]) : Packed{};
    }
  }
}

// The depthwise 3x3 that comes before a 1x1, of one image.
template <class T>
VF_HD DepthwiseInput<T> depthwise_input(const ConvParams& p, int64_t image) {
  return {static_cast<const T*>(p.x.data) + image * p.x.stride_n,
          p.x.stride_h,
          p.x.stride_w,
          p.height,
          p.width,
          p.c_in,
          static_cast<const T*>(p.taps),
          p.stride,
          p.c_in};
}

// As if it had been stored between the two.
template <class T>
VF_HD Vector<float> rounded(Vector<float> y) {
  if constexpr (std::is_same_v<T, float>) {
    return y;
  } else {
    T stored[kLanes<float>];
    store(stored, y, Full{});
    return load(stored, Full{});
  }
}

// Its outputs, in place of pixels that are gathered.
template <class T, class Packed>
VF_HD void gather_depthwise(const ConvParams& p, const Plan& plan, int64_t image, int64_t row,
                            int64_t rows, char* to) {
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(Packed));
  const auto in = depthwise_input<T>(p, image);
  const int64_t step = plan.pixels * kChunkBytes;
  char* last = to + (plan.chunks - 1) * step;
  if (p.c_in % kChunk != 0) memset(last, 0, rows * plan.width * kChunkBytes);
  for (int64_t h = 0; h < rows; ++h, to += plan.width * kChunkBytes) {
    const Pixel o{row + h, 0};
    depthwise_row<T>(in, o, p.out_width, [&](int64_t i, int64_t c, auto y, auto span) VF_LAMBDA {
      char* at = to + c / kChunk * step + i * kChunkBytes;
      store(reinterpret_cast<Packed*>(at) + c % kChunk, rounded<T>(y), span);
    });
  }
}

// `rows` output rows of one image from `row` on.
template <class T, class Packed, class Params>
VF_HD void gather(const Params& p, const Plan& plan, int64_t image, int64_t row, int64_t rows,
                  char* to) {
  if constexpr (std::is_same_v<Params, ConvParams>) {
    if (p.taps != nullptr) return gather_depthwise<T, Packed>(p, plan, image, row, rows, to);
  }
  const T* x = static_cast<const T*>(p.x.data) + image * p.x.stride_n;
  const int64_t pad = p.kernel / 2;
  if (plan.unfolded) {
    Packed taps[2 * kChunkBytes / sizeof(Packed)] = {};
    for (int64_t i = 0; i < rows * plan.width; ++i) {
      unfold_pixel<T, Packed>(p, x, (row + i / plan.width) * p.stride - pad,
                              i % plan.width * p.stride - pad, taps);
      for (int64_t c = 0; c < plan.chunks; ++c) {
        memcpy(to + (c * plan.pixels + i) * kChunkBytes,
               reinterpret_cast<const char*>(taps) + c * kChunkBytes, kChunkBytes);
      }
    }
    return;
  }
  for (int64_t plane = 0; plane < plan.planes * plan.planes; ++plane) {
    const int64_t h = row * plan.stride + plane / plan.planes - pad;
    for (int64_t i = 0; i < rows + plan.extra; ++i) {
      gather_row<T, Packed>(p, plan, x, h + i * plan.stride, plane % plan.planes - pad,
                            to + (plane * plan.plane_pixels + i * plan.width) * kChunkBytes);
    }
  }
}

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
