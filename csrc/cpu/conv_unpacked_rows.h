// What convolutions have in common that take a weight as its module has it (conv_unpacked.h).
#pragma once

#include <new>

#include "conv_strips.h"
#include "fma.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace unpacked {

using conv::Workspace;

constexpr int64_t kRowFloats = 16;  // Rows of gathered pixels begin at a line of a cache.

// Vectors that a product has in registers: of a row of the weight, and of pixels or of rows that it
// is multiplied by. All of them together with their products fit the registers.
#if defined(__AVX512F__)
constexpr int kRows = 4, kPixels = 6;      // forward, [rows][pixels]
constexpr int kPanel = 4, kGradients = 6;  // of the input gradient, [pixels][panel]
constexpr int kSumRows = 4, kSums = 6;     // of the weight gradient, [rows][sums]
#elif defined(__aarch64__)
constexpr int kRows = 4, kPixels = 5;
constexpr int kPanel = 4, kGradients = 6;
constexpr int kSumRows = 4, kSums = 5;
#else
constexpr int kRows = 4, kPixels = 2;
constexpr int kPanel = 2, kGradients = 6;
constexpr int kSumRows = 4, kSums = 3;
#endif

// The geometry of a convolution, from the parameters of any of its passes.
struct Shape {
  int64_t n, height, width, out_height, out_width, c_in, c_out, kernel, stride, taps;
  int64_t size;    // of a row: numbers that an output channel sums
  int64_t step;    // from a gathered pixel to the next one
  int64_t pixels;  // of all outputs
};

template <class Params>
VF_HD Shape shape_of(const Params& p) {
  Shape s{p.n,    p.height, p.width,  p.out_height, p.out_width,
          p.c_in, p.c_out,  p.kernel, p.stride,     p.kernel * p.kernel,
          0,      0,        0};
  s.size = s.taps * s.c_in;
  s.step = ceil_div(s.size, kRowFloats) * kRowFloats;
  s.pixels = s.n * s.out_height * s.out_width;
  return s;
}

// A weight as rows of fp32, [C_out][size]: where it lies, or copied.
struct Filter {
  const float* rows;
  int64_t step;
  bool copied;
  bool taps_inside;  // the taps of a channel lie side by side, as nn.Conv2d has them by default
  VF_HD const float* row(int64_t o) const { return rows + o * step; }
};

// A row lies in one piece, with the channels of a tap side by side, or the taps of a channel.
template <class Params>
VF_HD bool by_channels(const Params& p) {
  const bool whole = p.kernel == 1 || (p.stride_w == p.c_in && p.stride_h == p.kernel * p.c_in);
  return (p.stride_i == 1 || p.c_in == 1) && whole;
}

template <class Params>
VF_HD bool by_taps(const Params& p) {
  return p.kernel == 3 && p.stride_w == 1 && p.stride_h == 3 && p.stride_i == 9;
}

template <class Params>
VF_HD bool needs_copy(const Params& p) {
  return p.weight.dtype != kFloat32 || !(by_channels(p) || by_taps(p));
}

// Where a number of a row lies in the weight.
template <class Params>
VF_HD int64_t place(const Params& p, int64_t tap, int64_t channel) {
  return tap / p.kernel * p.stride_h + tap % p.kernel * p.stride_w + channel * p.stride_i;
}

// Rows of a weight; those that must be copied go to `memory`, [C_out][size].
template <class Params>
Filter filter_of(const Params& p, const Shape& s, float* memory, int threads) {
  if (!needs_copy(p)) {
    return {static_cast<const float*>(p.weight.data), p.stride_o, false, !by_channels(p)};
  }
  with_dtype(p.weight.dtype, [&](auto number) {
    using W = decltype(number);
    parallel(s.c_out, s.c_out * s.size, threads, [&](int64_t o) {
      const auto* from = static_cast<const W*>(p.weight.data) + o * p.stride_o;
      float* to = memory + o * s.size;
      for (int64_t tap = 0; tap < s.taps; ++tap) {
        for (int64_t c = 0; c < s.c_in; ++c) {
          *to++ = static_cast<float>(widen(from[place(p, tap, c)]));
        }
      }
    });
  });
  return {memory, s.size, true, false};
}

// The inputs of all outputs, [pixel][step], in the order of a filter's rows; zeros for the padding
// and behind a row.
template <class T>
void gather(const View& x, const Shape& s, bool taps_inside, float* to, int threads) {
  const int64_t pad = s.kernel / 2;
  parallel(s.pixels, s.pixels * s.size, threads, [&](int64_t i) {
    const int64_t image = i / (s.out_height * s.out_width), at = i % (s.out_height * s.out_width);
    const int64_t first_h = at / s.out_width * s.stride - pad;
    const int64_t first_w = at % s.out_width * s.stride - pad;
    float* row = to + i * s.step;
    for (int64_t k = s.size; k < s.step; ++k) row[k] = 0;
    for (int64_t tap = 0; tap < s.taps; ++tap) {
      const int64_t h = first_h + tap / s.kernel, w = first_w + tap % s.kernel;
      const bool inside = h >= 0 && h < s.height && w >= 0 && w < s.width;
      const T* from = inside ? vovnet_fast::VF_ISA::at<const T>(x, image, Pixel{h, w}) : nullptr;
      if (taps_inside) {
        float* each = row + tap;
        for (int64_t c = 0; c < s.c_in; ++c) each[c * s.taps] = inside ? widen(from[c]) : 0.0f;
        continue;
      }
      float* part = row + tap * s.c_in;
      for_channels<T>(s.c_in, [&](int64_t c, auto span) VF_LAMBDA {
        store(part + c, inside ? load(from + c, span) : broadcast<float>(0), span);
      });
    }
  });
}

#ifndef __aarch64__
VF_HD float sum_of(__m256 eight) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
#endif

#if defined(__AVX512F__)
VF_HD float sum_of(Vector<float> y) {
  // Masked by ones: other forms make GCC warn of what they leave undefined.
  const __m512d both = _mm512_castps_pd(y);
  const __m256d low = _mm512_maskz_extractf64x4_pd(0xff, both, 0);
  const __m256d high = _mm512_maskz_extractf64x4_pd(0xff, both, 1);
  return sum_of(_mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high)));
}
#elif defined(__aarch64__)
VF_HD float sum_of(Vector<float> y) { return vaddvq_f32(y); }
#endif

// body(i) for i in [0, count), whoever is free: rows come from main memory, at their own pace.
template <class Body>
VF_HD void share(int64_t count, int64_t products, int threads, Body body) {
  if (threads <= 1 || products < kGrain) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  Tasks tasks(count, threads);
  on_threads(threads, [&](int mine, int) {
    for (int64_t i = 0; tasks.next(&mine, &i);) body(i);
  });
}

// Memory of the calling thread, which others of the call read and write.
inline float* memory_of(int64_t floats) {
  static thread_local Workspace workspace;
  char* found = workspace.get(floats * static_cast<int64_t>(sizeof(float)));
  if (found == nullptr) throw std::bad_alloc();
  return reinterpret_cast<float*>(found);
}

// Floats that `count` numbers take up, to the end of a line.
VF_HD int64_t room(int64_t count) { return ceil_div(count, kRowFloats) * kRowFloats; }

// How many of at most `most` to take at a time, so that all times are alike.
VF_HD int64_t evenly(int64_t count, int64_t most) {
  return count == 0 ? 1 : ceil_div(count, ceil_div(count, most));
}

struct Storing {
  template <class T, class Span>
  static VF_HD void store(T* to, Vector<float> y, Span span) {
    VF_ISA::store(to, y, span);
  }
};

}  // namespace unpacked
}  // namespace VF_ISA
}  // namespace vovnet_fast
