// 3x3 max pool with stride 2, some outputs at a time.
#pragma once

#include "windows.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace pool {

constexpr int kStride = 2;
constexpr int kTaps = 9;

// Whether outputs are made side by side: vectors of a cache line take 0.75 to 1 of the time so,
// those of half a line 1.1 to 1.3 times as long (two cores of a Zen 5).
constexpr bool kSideBySide = kLanes<float> * sizeof(float) >= 64;

// Where winners of an output are counted.
VF_HD uint8_t* argmax_of(const MaxPoolParams& p, int64_t image, Pixel o) {
  return p.argmax + ((image * p.out_height + o.h) * p.out_width + o.w) * p.c;
}

// Outputs from `o` on that lie side by side. Where nothing exceeds -inf, the first tap inside the
// image wins, as in torch. kEdges: some of their columns may lie outside.
template <class T, bool kArgmax, bool kEdges>
VF_HD void side_by_side(const MaxPoolParams& p, int64_t image, Pixel o) {
  const int64_t h = window_start(o.h, kStride, p.pad), w = window_start(o.w, kStride, p.pad);
  const Taps rows = taps_inside(h, p.height);
  const Taps columns = kEdges ? columns_inside<kStride>(w, p.width) : Taps{};
  const T* x = at<const T>(p.x, image, Pixel{h + rows.first, w + columns.first});
  T* out = at<T>(p.out, image, o);
  for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
    Vector<T> best[kAtOnce];
    Integers<T> winner[kAtOnce];
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) {
      const int first = columns.first - i * kStride;
      best[i] = broadcast<T>(-__builtin_inf());
      winner[i] = Integers<T>{} + (3 * rows.first + (first > 0 ? first : 0));
    }
    const T* row = x + c;
    for (int i = rows.first; i < rows.last; ++i, row += p.x.stride_h) {
      take_columns<T, kStride, kEdges>(
          row, p.x.stride_w, columns, span, [&](int output, int tap, auto values) VF_LAMBDA {
            const auto better = exceeds(values, best[output]);
            best[output] = better ? values : best[output];
            if (kArgmax) winner[output] = better ? Integers<T>{} + (3 * i + tap) : winner[output];
          });
    }
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) {
      store(out + i * p.out.stride_w + c, best[i], span);
      if (kArgmax) {
        store_bytes<High<T>>(argmax_of(p, image, Pixel{o.h, o.w + i}) + c, winner[i], span);
      }
    }
  });
}

// One output, wherever it lies.
template <class T, bool kArgmax>
VF_HD void alone(const MaxPoolParams& p, int64_t image, Pixel o) {
  const int64_t h = window_start(o.h, kStride, p.pad), w = window_start(o.w, kStride, p.pad);
  const Taps rows = taps_inside(h, p.height), columns = taps_inside(w, p.width);
  const T* x[kTaps];
  int taps[kTaps];
  int count = 0;
  for (int i = rows.first; i < rows.last; ++i) {
    for (int j = columns.first; j < columns.last; ++j) {
      x[count] = at<const T>(p.x, image, Pixel{h + i, w + j});
      taps[count++] = 3 * i + j;
    }
  }
  T* out = at<T>(p.out, image, o);
  for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
    auto best = broadcast<T>(-__builtin_inf());
    auto winner = Integers<T>{} + taps[0];
    for (int i = 0; i < count; ++i) {
      const auto value = load(x[i] + c, span);
      const auto better = exceeds(value, best);
      best = better ? value : best;
      if (kArgmax) winner = better ? Integers<T>{} + taps[i] : winner;
    }
    store(out + c, best, span);
    if (kArgmax) store_bytes<High<T>>(argmax_of(p, image, o) + c, winner, span);
  });
}

template <class T, bool kArgmax>
VF_HD void run_share(const MaxPoolParams& p, const Share& share) {
  for_rows(share, p.out_width, [&](Pixel o, int64_t count) VF_LAMBDA {
    for (const int64_t end = o.w + count; o.w < end;) {
      if (!kSideBySide || end - o.w < kAtOnce) {
        alone<T, kArgmax>(p, share.image, o);
        ++o.w;
        continue;
      }
      const int64_t w = window_start(o.w, kStride, p.pad);
      if (w >= 0 && w + kColumns<kStride> <= p.width) {
        side_by_side<T, kArgmax, false>(p, share.image, o);
      } else {
        side_by_side<T, kArgmax, true>(p, share.image, o);
      }
      o.w += kAtOnce;
    }
  });
}

template <class T>
VF_HD void run(const MaxPoolParams& p, const Share& share) {
  p.argmax != nullptr ? run_share<T, true>(p, share) : run_share<T, false>(p, share);
}

}  // namespace pool
}  // namespace VF_ISA
}  // namespace vovnet_fast
