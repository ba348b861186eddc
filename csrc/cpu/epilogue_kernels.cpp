// What follows another library's convolution, and its input gradient.
#include "../ops.h"
#include "loops.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

template <class T, bool kRelu>
void scale_shift_share(const EpilogueParams& p, const Share& share, High<T>* sums) {
  const auto* scales = static_cast<const High<T>*>(p.scale);
  const auto* shifts = static_cast<const High<T>*>(p.shift);
  if (sums != nullptr) zero(sums, p.c);
  for_pixels(share, p.width, [&](const Pixel* pixels, auto count) {
    constexpr int kCount = count.value;
    const Pointers<const T, kCount> z(p.z, share.image, pixels);
    const Pointers<T, kCount> out(p.out, share.image, pixels);
    for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
      const auto scale = load(scales + c, span), shift = load(shifts + c, span);
      Vector<T> sum{};
      for (int i = 0; i < kCount; ++i) {
        auto y = scale_shift(load(z[i] + c, span), scale, shift);
        if (kRelu) y = relu(y);
        sum += y;
        store(out[i] + c, y, span);
      }
      if (sums != nullptr) store(sums + c, load(sums + c, span) + sum, span);
    });
  });
}

// Statistics of a block are those of numbers in registers; blocks are merged one after the other.
// Deviations are taken from numbers relative to the first pixel's: in sums of large ones the digits
// would be lost in which blocks differ.
template <class T, bool kStore>
void statistics_share(const EpilogueParams& p, const Share& share, High<T>* statistics) {
  High<T>*const counts = statistics, *const sums = statistics + p.c, *const m2s = sums + p.c;
  const Scratch<High<T>> scratch(2 * p.c);
  High<T>*const origins = scratch.data(), *const relative_sums = origins + p.c;
  const T* first = at<const T>(p.z, share.image, {share.first / p.width, share.first % p.width});
  zero(sums, 2 * p.c);
  zero(relative_sums, p.c);
  for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
    const auto z = load(first + c, span);
    store(origins + c, z - z == Vector<T>{} ? z : Vector<T>{}, span);  // Inf has no deviations.
    store(counts + c, broadcast<T>(share.last - share.first), span);
  });
  High<T> before = 0;
  for_pixels(share, p.width, [&](const Pixel* pixels, auto count) {
    constexpr int kCount = count.value;
    constexpr High<T> kPixels = kCount;
    const Pointers<const T, kCount> z(p.z, share.image, pixels);
    const Pointers<T, kCount> out(p.out, share.image, pixels);
    for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
      const auto origin = load(origins + c, span);
      Vector<T> y[kCount], sum{}, relative_sum{}, m2{};
      for (int i = 0; i < kCount; ++i) {
        y[i] = load(z[i] + c, span);
        if (kStore) store(out[i] + c, y[i], span);
        sum += y[i];
        y[i] -= origin;
        relative_sum += y[i];
      }
      const auto mean = relative_sum * (1 / kPixels);
      for (int i = 0; i < kCount; ++i) m2 += (y[i] - mean) * (y[i] - mean);
      const auto sum_before = load(relative_sums + c, span);
      if (before > 0) m2 += deviations_between(before, sum_before, kPixels, relative_sum);
      store(relative_sums + c, sum_before + relative_sum, span);
      store(sums + c, load(sums + c, span) + sum, span);
      store(m2s + c, load(m2s + c, span) + m2, span);
    });
    before += kPixels;
  });
}

template <class T>
void copy_share(const EpilogueParams& p, const Share& share) {
  for_pixels(share, p.width, [&](const Pixel* pixels, auto count) {
    for (int i = 0; i < count.value; ++i) {
      memcpy(at<T>(p.out, share.image, pixels[i]), at<T>(p.z, share.image, pixels[i]),
             p.c * sizeof(T));
    }
  });
}

template <class T>
void run_epilogue(const EpilogueParams& p, int threads) {
  auto* pool = static_cast<High<T>*>(p.pool_partials);
  auto* statistics = static_cast<High<T>*>(p.statistics);
  const bool in_place = p.z.data == p.out.data;
  const int64_t tiles = ceil_div(p.height * p.width, kTilePixels);
  const auto run = [&](const Share& share) {
    const int64_t tile = share.image * tiles + share.index;
    if (p.scale != nullptr) {
      High<T>* sums = pool == nullptr ? nullptr : pool + tile * p.c;
      (p.relu != 0 ? scale_shift_share<T, true> : scale_shift_share<T, false>)(p, share, sums);
    } else if (statistics != nullptr) {
      High<T>* part = statistics + tile * kStatisticsRows * p.c;
      (in_place ? statistics_share<T, false> : statistics_share<T, true>)(p, share, part);
    } else if (!in_place) {
      copy_share<T>(p, share);
    }
  };
  for_shares(p.n, p.height * p.width, kTilePixels, p.c, threads, run);
}

// One pixel. Of its channels the first `added` get what `add` points to, and those from `unmasked`
// on are masked.
template <class T>
struct AccumulatePixel {
  const T *z, *add, *mask;
  T* out;

  template <bool kAdd, bool kMask>
  void run(int64_t first, int64_t last) const {
    for_channels<T>(last - first, [&](int64_t i, auto span) VF_LAMBDA {
      const int64_t c = first + i;
      auto y = load(z + c, span);
      if (kAdd) y += load(add + c, span);
      if (kMask) y = relu_gradient(y, load(mask + c, span));
      store(out + c, y, span);
    });
  }

  void run(int64_t added, int64_t unmasked, int64_t channels) const {
    const int64_t low = least(added, unmasked), high = added + unmasked - low;
    run<true, false>(0, low);
    (added > unmasked ? run<true, true>(low, high) : run<false, false>(low, high));
    run<false, true>(high, channels);
  }
};

template <class T>
void run_accumulate(const AccumulateParams& p, int threads) {
  const int64_t added = p.add.data == nullptr ? 0 : p.add_c;
  const int64_t unmasked = p.mask.data == nullptr ? p.c : p.c - p.mask_c;
  const auto run = [&](const Share& share) {
    for_each_pixel(share, p.width, [&](Pixel pixel) {
      AccumulatePixel<T> work{at<const T>(p.z, share.image, pixel), nullptr, nullptr,
                              at<T>(p.out, share.image, pixel)};
      if (added > 0) work.add = at<const T>(p.add, share.image, pixel);
      if (unmasked < p.c) work.mask = at<const T>(p.mask, share.image, pixel) - unmasked;
      work.run(added, unmasked, p.c);
    });
  };
  for_pass(p.n, p.height * p.width, p.c, threads, run);
}

}  // namespace

void epilogue(const EpilogueParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) { run_epilogue<decltype(type)>(p, threads); });
}

void accumulate(const AccumulateParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) { run_accumulate<decltype(type)>(p, threads); });
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
