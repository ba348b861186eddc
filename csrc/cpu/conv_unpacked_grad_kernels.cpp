// Gradients of weights that are read and written as they are (conv_unpacked.h).
#if defined(__AVX2__) || defined(__aarch64__)

#include <utility>

#include "conv_unpacked_rows.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace unpacked {
namespace {

// Gradients that are not to take the caches from what is read next.
constexpr int64_t kLargeBytes = 1 << 20;

// sum[r][v] = sums over pixels of g[pixel][r] * x[pixel][k], for vectors of a row from some place
// on; then body(r, v, sum).
template <int kVectors, class Body>
VF_HD void sum_products(const float* x, int64_t step, const float* g, int64_t g_step,
                        int64_t pixels, Body body) {
  Vector<float> sum[kSumRows][kVectors] = {};
  for (int64_t i = 0; i < pixels; ++i, x += step, g += g_step) {
    Vector<float> pixel[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) pixel[v] = load(x + v * kLanes<float>, Full{});
#pragma GCC unroll 8
    for (int r = 0; r < kSumRows; ++r) {
      const auto gradient = same(g[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(gradient, pixel[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kSumRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) body(r, v, sum[r][v]);
  }
}

// Past the caches, where gradients are too many for them to be found there again.
VF_HD void store_for_later(float* to, Vector<float> y, Full) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, y);
#elif defined(__aarch64__)
  store(to, y, Full{});
#else
  _mm256_stream_ps(to, y);
#endif
}

VF_HD void store_for_later(float* to, Vector<float> y, Part part) { store(to, y, part); }

// What was stored so is there for other threads from here on.
VF_HD void finish_stores() {
#ifndef __aarch64__
  _mm_sfence();
#endif
}

// kSumRows rows of the weight, and where their gradients go.
struct RowTask {
  const float* weight[kSumRows];
  float* out[kSumRows];
  float scale[kSumRows];
  double dscale[kSumRows];
  int count;  // of those that there are
  bool scaled, later;
};

// A panel of these rows: their gradients, and what they give to that of the scale. Panels are
// short, so that sums in fp32 within one are exact enough.
template <int kVectors, class Span>
void panel_of_rows(const float* x, int64_t step, const float* g, int64_t g_step, int64_t pixels,
                   int64_t k, RowTask& task, Span span) {
  Vector<float> dots[kSumRows] = {};
  if (task.scaled) {
    for (int r = 0; r < task.count; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        __builtin_prefetch(task.weight[r] + k + (kVectors + v) * kLanes<float>);
      }
    }
  }
  sum_products<kVectors>(x + k, step, g, g_step, pixels,
                         [&](int r, int v, Vector<float> sum) VF_LAMBDA {
                           if (r >= task.count) return;
                           const int64_t at = k + v * kLanes<float>;
                           if (task.scaled) {
                             dots[r] = multiply_add(load(task.weight[r] + at, span), sum, dots[r]);
                             sum *= same(task.scale[r]);
                           }
                           if (task.later) {
                             store_for_later(task.out[r] + at, sum, span);
                           } else {
                             store(task.out[r] + at, sum, span);
                           }
                         });
  for (int r = 0; r < task.count; ++r) task.dscale[r] += static_cast<double>(sum_of(dots[r]));
}

// The gradients of rows that lie elsewhere in the weight.
void spread(const ConvUnpackedWeightGradParams& p, const Shape& s, const float* row, int64_t o) {
  float* to = static_cast<float*>(p.dweight) + o * p.stride_o;
  for (int64_t tap = 0; tap < s.taps; ++tap) {
    for (int64_t c = 0; c < s.c_in; ++c) to[place(p, tap, c)] = *row++;
  }
}

template <class T>
void widen_gradients(const ConvUnpackedWeightGradParams& p, const Shape& s, int64_t step, float* to,
                     int threads) {
  const int64_t image_pixels = s.out_height * s.out_width;
  parallel(s.pixels, s.pixels * s.c_out, threads, [&](int64_t i) {
    const Pixel pixel{i % image_pixels / s.out_width, i % image_pixels % s.out_width};
    const T* from = vovnet_fast::VF_ISA::at<const T>(p.g, i / image_pixels, pixel);
    float* row = to + i * step;
    for_channels<T>(s.c_out, [&](int64_t c, auto span)
                                 VF_LAMBDA { store(row + c, load(from + c, span), Full{}); });
  });
}

// One output channel's sum over pixels of its gradients.
VF_HD float shift_of(const float* g, int64_t step, int64_t pixels) {
  double sum = 0;
  for (int64_t i = 0; i < pixels; ++i) sum += static_cast<double>(g[i * step]);
  return static_cast<float>(sum);
}

template <class T>
void weight_grad(const ConvUnpackedWeightGradParams& p, int threads) {
  const Shape s = shape_of(p);
  const bool scaled = p.scale != nullptr, elsewhere = needs_copy(p);
  const int64_t copied = scaled && elsewhere ? room(s.c_out * s.size) : 0;
  const int64_t g_step = room(s.c_out + kSumRows), gathered = s.pixels * s.step;
  const int64_t tasks = ceil_div(s.c_out, kSumRows);
  const int64_t own_rows = elsewhere ? tasks * kSumRows * s.step : 0;
  float* memory = memory_of(copied + gathered + s.pixels * g_step + own_rows);
  Filter filter{nullptr, 0, elsewhere, !by_channels(p)};
  if (scaled) filter = filter_of(p, s, memory, threads);
  float *x = memory + copied, *g = x + gathered, *rows = g + s.pixels * g_step;
  gather<T>(p.x, s, !elsewhere && filter.taps_inside, x, threads);
  widen_gradients<T>(p, s, g_step, g, threads);

  const bool lines =
      (reinterpret_cast<uintptr_t>(p.dweight) | static_cast<uintptr_t>(p.stride_o * 4)) %
          kVectorBytes ==
      0;
  const bool later = !elsewhere && lines && s.c_out * s.size * 4 >= kLargeBytes;
  constexpr int64_t kLaneCount = kLanes<float>, kWidth = kSums * kLaneCount;
  share(tasks, s.pixels * s.size * s.c_out, threads, [&](int64_t i) {
    const int64_t first = i * kSumRows;
    RowTask task{};
    task.count = static_cast<int>(least<int64_t>(kSumRows, s.c_out - first));
    task.scaled = scaled;
    task.later = later;
    for (int r = 0; r < task.count; ++r) {
      const int64_t o = first + r;
      task.out[r] = elsewhere ? rows + o * s.step : static_cast<float*>(p.dweight) + o * p.stride_o;
      if (!scaled) continue;
      task.weight[r] = filter.row(o);
      task.scale[r] = static_cast<const float*>(p.scale)[o];
    }
    int64_t k = 0;
    for (; k + kWidth <= s.size; k += kWidth) {
      panel_of_rows<kSums>(x, s.step, g + first, g_step, s.pixels, k, task, Full{});
    }
    for (; k + kLaneCount <= s.size; k += kLaneCount) {
      panel_of_rows<1>(x, s.step, g + first, g_step, s.pixels, k, task, Full{});
    }
    if (k < s.size) {
      const Part rest{static_cast<int>(s.size - k)};
      panel_of_rows<1>(x, s.step, g + first, g_step, s.pixels, k, task, rest);
    }
    if (later) finish_stores();
    for (int r = 0; r < task.count; ++r) {
      const int64_t o = first + r;
      if (elsewhere) spread(p, s, task.out[r], o);
      if (scaled) static_cast<float*>(p.dscale)[o] = static_cast<float>(task.dscale[r]);
      static_cast<float*>(p.dshift)[o] = shift_of(g + o, g_step, s.pixels);
    }
  });
}

}  // namespace
}  // namespace unpacked

void conv_unpacked_weight_grad(const ConvUnpackedWeightGradParams& p, int threads) {
  with_float(p.dtype, [&](auto number) { unpacked::weight_grad<decltype(number)>(p, threads); });
}

}  // namespace VF_ISA
}  // namespace vovnet_fast

#endif
