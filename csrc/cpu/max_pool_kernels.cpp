// 3x3 max pool with stride 2, and its backward.
#include "../ops.h"
#include "max_pool.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

constexpr int kStride = pool::kStride;
constexpr int kTaps = pool::kTaps;

template <class T>
void run_max_pool(const MaxPoolParams& p, int threads) {
  for_pass(p.n, p.out_height * p.out_width, kStride * kStride * p.c, threads,
           [&](const Share& share) { pool::run<T>(p, share); });
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
  for_pass(p.n, p.height * p.width, p.c, threads,
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
