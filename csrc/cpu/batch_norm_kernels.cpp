// Batch norm with the statistics of the batch, and sums over channels.
#include "../ops.h"
#include "loops.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

// Channels that a thread merges at a time.
constexpr int64_t kMergeChannels = 64;

// Statistics of all parts together, for the channels of a span, in fp64.
template <class Number, class Span>
VF_HD Statistics<Vector<double>> merge_parts(const void* partials, int64_t parts, int64_t channels,
                                             int64_t c, Span span) {
  Statistics<Vector<double>> all{};
  const Number* part = static_cast<const Number*>(partials) + c;
  for (int64_t r = 0; r < parts; ++r, part += kStatisticsRows * channels) {
    all = merge(
        all, Statistics<Vector<double>>{load_double(part, span), load_double(part + channels, span),
                                        load_double(part + 2 * channels, span)});
  }
  return all;
}

// body(c, span, statistics of these channels) for all of them.
template <class Number, class Body>
void for_merged(const void* partials, int64_t parts, int64_t channels, int threads, Body body) {
  const int64_t groups = ceil_div(channels, kMergeChannels);
  parallel(groups, parts * channels, threads, [&](int64_t group) {
    const int64_t first = group * kMergeChannels;
    for_channels<double>(least(kMergeChannels, channels - first),
                         [&](int64_t i, auto span) VF_LAMBDA {
                           const int64_t c = first + i;
                           body(c, span, merge_parts<Number>(partials, parts, channels, c, span));
                         });
  });
}

VF_HD int lanes(Full) { return kLanes<double>; }
VF_HD int lanes(Part part) { return part.count; }

template <class Number>
void run_merge(const BatchNormMergeParams& p, int threads) {
  auto* out = static_cast<Number*>(p.out);
  for_merged<Number>(p.partials, p.parts, p.c, threads, [&](int64_t c, auto span, const auto& all) {
    store_double(out + c, all.count, span);
    store_double(out + p.c + c, all.sum, span);
    store_double(out + 2 * p.c + c, all.m2, span);
  });
}

template <class Number>
void run_finish(const BatchNormFinishParams& p, int threads) {
  for_merged<Number>(p.partials, p.parts, p.c, threads, [&](int64_t c, auto span, const auto& all) {
    for (int i = 0; i < lanes(span); ++i) {
      const Norm<Number> norm = finish_norm<Number>(
          Statistics<double>{all.count[i], all.sum[i], all.m2[i]}, element_or(p.gamma, c + i, 1.0),
          element_or(p.beta, c + i, 0.0), p.eps);
      Number* out = static_cast<Number*>(p.out) + c + i;
      out[0] = norm.mean;
      out[p.c] = norm.rstd;
      out[2 * p.c] = norm.scale;
      out[3 * p.c] = norm.shift;
      out[4 * p.c] = norm.variance;
      out[5 * p.c] = norm.count;
    }
  });
}

template <class T>
void sums_share(const BatchNormSumsParams& p, const Share& share, High<T>* sums) {
  const auto* means = static_cast<const High<T>*>(p.norm);
  const auto* rstds = means + p.c;
  High<T>* products = sums + p.c;
  zero(sums, 2 * p.c);
  for_pixels(share, p.width, [&](const Pixel* pixels, auto count) {
    constexpr int kCount = count.value;
    const Pointers<const T, kCount> g(p.g, share.image, pixels);
    const Pointers<const T, kCount> z(p.z, share.image, pixels);
    for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
      const auto mean = load(means + c, span), rstd = load(rstds + c, span);
      Vector<T> sum{}, product{};
      for (int i = 0; i < kCount; ++i) {
        const auto gradient = load(g[i] + c, span);
        sum += gradient;
        product += gradient * normalize(load(z[i] + c, span), mean, rstd);
      }
      store(sums + c, load(sums + c, span) + sum, span);
      store(products + c, load(products + c, span) + product, span);
    });
  });
}

template <class T>
void run_sums(const BatchNormSumsParams& p, int threads) {
  auto* partials = static_cast<High<T>*>(p.partials);
  auto* out = static_cast<High<T>*>(p.out);
  const int64_t pixels = p.height * p.width;
  if (p.n * pixels == 0) return zero(out, 2 * p.c);
  for_shares(p.n, pixels, ceil_div(pixels, p.parts), p.c, threads, [&](const Share& share) {
    sums_share<T>(p, share, partials + (share.image * p.parts + share.index) * 2 * p.c);
  });
  sum_packed_rows(partials, p.n * p.parts, 2 * p.c, threads, out);
}

template <class T>
void channel_sums_share(const ChannelSumsParams& p, const Share& share, High<T>* sums) {
  zero(sums, p.c);
  for_pixels(share, p.width, [&](const Pixel* pixels, auto count) {
    constexpr int kCount = count.value;
    const Pointers<const T, kCount> g(p.g, share.image, pixels);
    for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
      Vector<T> sum{};
      for (int i = 0; i < kCount; ++i) sum += load(g[i] + c, span);
      store(sums + c, load(sums + c, span) + sum, span);
    });
  });
}

template <class T>
void run_channel_sums(const ChannelSumsParams& p, int threads) {
  auto* partials = static_cast<High<T>*>(p.partials);
  auto* out = static_cast<High<T>*>(p.out);
  const int64_t pixels = p.height * p.width;
  if (p.n * pixels == 0) return zero(out, p.c);
  for_shares(p.n, pixels, ceil_div(pixels, p.parts), p.c, threads, [&](const Share& share) {
    channel_sums_share<T>(p, share, partials + (share.image * p.parts + share.index) * p.c);
  });
  sum_packed_rows(partials, p.n * p.parts, p.c, threads, out);
}

// What every pixel of a channel takes: rows of [5, C].
template <class T>
void input_grad_vectors(const BatchNormInputGradParams& p, High<T>* vectors) {
  const auto* norm = static_cast<const High<T>*>(p.norm);
  const auto* sums = static_cast<const High<T>*>(p.sums);
  for (int64_t c = 0; c < p.c; ++c) {
    const High<T> rstd = norm[p.c + c], count = norm[(kNormRows - 1) * p.c + c];
    vectors[c] = norm[c];
    vectors[p.c + c] = rstd;
    vectors[2 * p.c + c] = rstd * element_or(p.gamma, c, High<T>(1));
    vectors[3 * p.c + c] = sums[c] / count;
    vectors[4 * p.c + c] = sums[p.c + c] / count;
  }
}

template <class T>
void input_grad_share(const BatchNormInputGradParams& p, const Share& share,
                      const High<T>* vectors) {
  for_pixels(share, p.width, [&](const Pixel* pixels, auto count) {
    constexpr int kCount = count.value;
    const Pointers<const T, kCount> g(p.g, share.image, pixels);
    const Pointers<const T, kCount> z(p.z, share.image, pixels);
    const Pointers<T, kCount> out(p.out, share.image, pixels);
    for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
      const auto mean = load(vectors + c, span), rstd = load(vectors + p.c + c, span);
      const auto scale = load(vectors + 2 * p.c + c, span);
      const auto g_mean = load(vectors + 3 * p.c + c, span);
      const auto slope = load(vectors + 4 * p.c + c, span);
      for (int i = 0; i < kCount; ++i) {
        const auto dz = batch_norm_input_gradient(load(g[i] + c, span), load(z[i] + c, span), mean,
                                                  rstd, scale, g_mean, slope);
        store(out[i] + c, dz, span);
      }
    });
  });
}

template <class T>
void run_input_grad(const BatchNormInputGradParams& p, int threads) {
  if (p.n * p.height * p.width * p.c == 0) return;
  const Scratch<High<T>> vectors(5 * p.c);
  input_grad_vectors<T>(p, vectors.data());
  for_pass(p.n, p.height * p.width, p.c, threads,
           [&](const Share& share) { input_grad_share<T>(p, share, vectors.data()); });
}

}  // namespace

void batch_norm_merge(const BatchNormMergeParams& p, int threads) {
  with_high(p.dtype, [&](auto number) { run_merge<decltype(number)>(p, threads); });
}

void batch_norm_finish(const BatchNormFinishParams& p, int threads) {
  with_high(p.dtype, [&](auto number) { run_finish<decltype(number)>(p, threads); });
}

void batch_norm_sums(const BatchNormSumsParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) { run_sums<decltype(type)>(p, threads); });
}

void batch_norm_input_grad(const BatchNormInputGradParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) { run_input_grad<decltype(type)>(p, threads); });
}

void channel_sums(const ChannelSumsParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) { run_channel_sums<decltype(type)>(p, threads); });
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
