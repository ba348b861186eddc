// 3x3 max pool with stride 2, and its backward.
#include "../ops.h"
#include "loops.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

constexpr int kStride = 2;
constexpr int kTaps = 9;

template <class T, bool kArgmax>
void max_pool_share(const MaxPoolParams& p, const Share& share) {
  for_each_pixel(share, p.out_width, [&](Pixel o) {
    const int64_t h = window_start(o.h, kStride, p.pad), w = window_start(o.w, kStride, p.pad);
    const Taps rows = taps_inside(h, p.height), columns = taps_inside(w, p.width);
    const T* x[kTaps];
    int taps[kTaps];
    int count = 0;
    for (int i = rows.first; i < rows.last; ++i) {
      for (int j = columns.first; j < columns.last; ++j) {
        x[count] = at<const T>(p.x, share.image, Pixel{h + i, w + j});
        taps[count++] = 3 * i + j;
      }
    }
    T* out = at<T>(p.out, share.image, o);
    const int64_t pixel = (share.image * p.out_height + o.h) * p.out_width + o.w;
    for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
      // Where nothing exceeds -inf, the first tap inside the image wins, as in torch.
      auto best = broadcast<T>(-__builtin_inf());
      auto winner = Integers<T>{} + taps[0];
      for (int i = 0; i < count; ++i) {
        const auto value = load(x[i] + c, span);
        const auto better = exceeds(value, best);
        best = better ? value : best;
        if (kArgmax) winner = better ? Integers<T>{} + taps[i] : winner;
      }
      store(out + c, best, span);
      if (kArgmax) store_bytes<High<T>>(p.argmax + pixel * p.c + c, winner, span);
    });
  });
}

template <class T>
void run_max_pool(const MaxPoolParams& p, int threads) {
  const auto pool = p.argmax != nullptr ? max_pool_share<T, true> : max_pool_share<T, false>;
  for_shares(p.n, p.out_height * p.out_width, pass_pixels(p.c), p.c, threads,
             [&](const Share& share) { pool(p, share); });
}

template <class T>
void backward_share(const MaxPoolBackwardParams& p, const Share& share) {
  for_each_pixel(share, p.width, [&](Pixel pixel) {
    // The windows that hold the pixel, at most four, from the first to the last.
    const T* dout[4];
    const uint8_t* argmax[4];
    int taps[4];
    int count = 0;
    for (int tap = kTaps - 1; tap >= 0; --tap) {
      const int64_t h = window_of(pixel.h, tap / 3, kStride, p.pad, p.out_height);
      const int64_t w = window_of(pixel.w, tap % 3, kStride, p.pad, p.out_width);
      if (h < 0 || w < 0) continue;
      dout[count] = at<const T>(p.dout, share.image, Pixel{h, w});
      argmax[count] = p.argmax + ((share.image * p.out_height + h) * p.out_width + w) * p.c;
      taps[count++] = tap;
    }
    T* out = at<T>(p.out, share.image, pixel);
    for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
      Vector<T> dx{};
      for (int i = 0; i < count; ++i) {
        const auto chosen = load_bytes<High<T>>(argmax[i] + c, span) == taps[i];
        dx += chosen ? load(dout[i] + c, span) : Vector<T>{};
      }
      store(out + c, dx, span);
    });
  });
}

template <class T>
void run_backward(const MaxPoolBackwardParams& p, int threads) {
  for_shares(p.n, p.height * p.width, pass_pixels(p.c), p.c, threads,
             [&](const Share& share) { backward_share<T>(p, share); });
}

}  // namespace

void max_pool(const MaxPoolParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) { run_max_pool<decltype(type)>(p, threads); });
}

void max_pool_backward(const MaxPoolBackwardParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) { run_backward<decltype(type)>(p, threads); });
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
