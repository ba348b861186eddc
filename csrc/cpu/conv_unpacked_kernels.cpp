// Convolutions and gradients of their inputs by weights as they are (conv_unpacked.h).
#if defined(__AVX2__) || defined(__aarch64__)

#include <utility>

#include "conv_store.h"
#include "conv_unpacked_rows.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace unpacked {
namespace {

constexpr int64_t kTile = conv::kTileChannels;

// What store_block() reads of a layer, or of a gradient.
template <class Params>
ConvParams storing_params(const Params& p, int64_t height, int64_t width, int64_t channels) {
  ConvParams to{};
  to.out = p.out;
  to.add = p.add;
  to.mask = p.mask;
  to.n = p.n;
  to.out_height = height;
  to.out_width = width;
  to.c_out = channels;
  to.add_c = p.add_c;
  to.mask_c = p.mask_c;
  return to;
}

// Sums of 16 channels, [image][pixel][16], into the slot.
template <class T>
void store_tile(const ConvParams& to, const float* sums, int64_t channel, float* pool) {
  conv::Plan plan{};
  plan.width = to.out_width;
  const int64_t pixels = to.out_height * to.out_width;
  for (int64_t image = 0; image < to.n; ++image) {
    float* partials = pool == nullptr ? nullptr : pool + image * to.c_out;
    if (partials != nullptr) zero(partials + channel, least(kTile, to.c_out - channel));
    conv::store_block<Storing, T, 1>(to, plan, sums + image * pixels * kTile,
                                     {0, static_cast<int>(pixels)}, conv::Rows<T>(to, image, 0),
                                     channel, partials);
  }
}

// ---- Forward -----------------------------------------------------------------------------------

// out[q][r] = sum over k of row r times pixel q, for kRows rows and kCount pixels.
template <int kCount>
void multiply_rows(const float* const* rows, const float* pixels, int64_t step, int64_t size,
                   float* out) {
  Vector<float> sum[kRows][kCount] = {};
  const auto add = [&](int64_t k, auto span) VF_LAMBDA {
    Vector<float> row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = load(rows[r] + k, span);
#pragma GCC unroll 8
    for (int q = 0; q < kCount; ++q) {
      const auto pixel = load(pixels + q * step + k, Full{});
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][q] = multiply_add(row[r], pixel, sum[r][q]);
    }
  };
  for_channels<float>(size, add);
#pragma GCC unroll 8
  for (int q = 0; q < kCount; ++q) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) out[q * kTile + r] = sum_of(sum[r][q]);
  }
}

template <int... kCounts>
VF_HD void multiply_some_rows(int64_t count, const float* const* rows, const float* pixels,
                              int64_t step, int64_t size, float* out,
                              std::integer_sequence<int, kCounts...>) {
  using Multiply = void (*)(const float* const*, const float*, int64_t, int64_t, float*);
  static constexpr Multiply kByCount[] = {multiply_rows<kCounts + 1>...};
  kByCount[count - 1](rows, pixels, step, size, out);
}

template <class T>
void forward(const ConvUnpackedParams& p, int threads) {
  const Shape s = shape_of(p);
  const int64_t copied = needs_copy(p) ? room(s.c_out * s.size) : 0;
  const int64_t sums_of_tile = room(s.pixels * kTile), tiles = ceil_div(s.c_out, kTile);
  const int64_t gathered = s.pixels * s.step;
  float* memory = memory_of(copied + gathered + tiles * sums_of_tile);
  const Filter filter = filter_of(p, s, memory, threads);
  float *pixels = memory + copied, *sums = pixels + gathered;
  gather<T>(p.x, s, filter.taps_inside, pixels, threads);

  ConvParams to = storing_params(p, s.out_height, s.out_width, s.c_out);
  to.scale = p.scale;
  to.shift = p.shift;
  to.relu = p.relu;
  auto* pool = static_cast<float*>(p.pool_partials);
  const int64_t block = evenly(s.pixels, kPixels);
  share(tiles, s.pixels * s.size * s.c_out, threads, [&](int64_t tile) {
    float* const own = sums + tile * sums_of_tile;
    for (int64_t first = 0; first < kTile; first += kRows) {
      const float* rows[kRows];
      for (int r = 0; r < kRows; ++r) {  // Behind the last one, that one again, for nobody.
        rows[r] = filter.row(least(tile * kTile + first + r, s.c_out - 1));
      }
      for (int64_t i = 0; i < s.pixels; i += block) {
        multiply_some_rows(least(block, s.pixels - i), rows, pixels + i * s.step, s.step, s.size,
                           own + i * kTile + first, std::make_integer_sequence<int, kPixels>{});
      }
    }
    store_tile<T>(to, own, tile * kTile, pool);
  });
}

// ---- The gradient of the input -----------------------------------------------------------------

// out[q][k] = sum over o of g[o][q] * row o [k], for a panel of kVectors vectors.
template <int kVectors, int kCount, class Span>
void multiply_panel(const float* rows, int64_t row_step, int64_t count, const float* g, float* out,
                    int64_t step, Span span) {
  constexpr int64_t kAhead = 16;
  Vector<float> sum[kCount][kVectors] = {};
  for (int64_t o = 0; o < count; ++o, rows += row_step, g += kCount) {
    Vector<float> row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      if (o + kAhead < count) __builtin_prefetch(rows + kAhead * row_step + v * kLanes<float>);
      row[v] = load(rows + v * kLanes<float>, span);
    }
#pragma GCC unroll 8
    for (int q = 0; q < kCount; ++q) {
      const auto gradient = same(g[q]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[q][v] = multiply_add(gradient, row[v], sum[q][v]);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < kCount; ++q) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      store(out + q * step + v * kLanes<float>, sum[q][v], Full{});
    }
  }
}

// All pixels' gradients of inputs at some places of a row.
struct Products {
  const float* g;  // [block][c_out][block's pixels]
  float* out;      // [pixel][step]
  int64_t block;   // pixels of a block, but for the last one
};

template <int kVectors, class Span, int... kCounts>
VF_HD void multiply_panels(const Shape& s, const Filter& filter, const Products& products,
                           int64_t k, Span span, std::integer_sequence<int, kCounts...>) {
  using Multiply = void (*)(const float*, int64_t, int64_t, const float*, float*, int64_t, Span);
  static constexpr Multiply kByCount[] = {multiply_panel<kVectors, kCounts + 1, Span>...};
  for (int64_t i = 0; i < s.pixels; i += products.block) {
    const int64_t count = least(products.block, s.pixels - i);
    kByCount[count - 1](filter.rows + k, filter.step, s.c_out, products.g + i * s.c_out,
                        products.out + i * s.step + k, s.step, span);
  }
}

// Gradients of outputs, times a scale, in the order in which panels read them.
template <class T>
void order_gradients(const ConvUnpackedInputGradParams& p, const Shape& s, int64_t block, float* to,
                     int threads) {
  const auto* scale = static_cast<const float*>(p.scale);
  const int64_t image_pixels = s.out_height * s.out_width;
  parallel(ceil_div(s.pixels, block), s.pixels * s.c_out, threads, [&](int64_t b) {
    const int64_t first = b * block, count = least(block, s.pixels - first);
    for (int64_t q = 0; q < count; ++q) {
      const int64_t image = (first + q) / image_pixels, at = (first + q) % image_pixels;
      const Pixel pixel{at / s.out_width, at % s.out_width};
      const T* from = vovnet_fast::VF_ISA::at<const T>(p.g, image, pixel);
      float* each = to + first * s.c_out + q;
      for (int64_t o = 0; o < s.c_out; ++o) {
        each[o * count] = widen(from[o]) * (scale == nullptr ? 1.0f : scale[o]);
      }
    }
  });
}

// Sums over taps of what outputs have for an input, 16 channels of all pixels.
void scatter_tile(const Shape& s, const float* products, bool taps_inside, int64_t channel,
                  float* sums) {
  const int64_t pad = s.kernel / 2, channels = least(kTile, s.c_in - channel);
  for (int64_t i = 0; i < s.n * s.height * s.width; ++i, sums += kTile) {
    const int64_t image = i / (s.height * s.width), at = i % (s.height * s.width);
    const Pixel pixel{at / s.width, at % s.width};
    for (int64_t c = 0; c < kTile; ++c) sums[c] = 0;
    for (int64_t tap = 0; tap < s.taps; ++tap) {
      const int64_t h = pixel.h + pad - tap / s.kernel, w = pixel.w + pad - tap % s.kernel;
      if (h < 0 || w < 0 || h % s.stride != 0 || w % s.stride != 0) continue;
      if (h / s.stride >= s.out_height || w / s.stride >= s.out_width) continue;
      const int64_t output = (image * s.out_height + h / s.stride) * s.out_width + w / s.stride;
      const float* from = products + output * s.step;
      if (taps_inside) {
        from += channel * s.taps + tap;
        for (int64_t c = 0; c < channels; ++c) sums[c] += from[c * s.taps];
      } else {
        from += tap * s.c_in + channel;
        for_channels<float>(channels, [&](int64_t c, auto span) VF_LAMBDA {
          store(sums + c, load(sums + c, Full{}) + load(from + c, span), Full{});
        });
      }
    }
  }
}

template <class T>
void input_grad(const ConvUnpackedInputGradParams& p, int threads) {
  const Shape s = shape_of(p);
  const int64_t copied = needs_copy(p) ? room(s.c_out * s.size) : 0;
  const int64_t inputs = s.n * s.height * s.width, tiles = ceil_div(s.c_in, kTile);
  const int64_t gradients = room(s.pixels * s.c_out), products = s.pixels * s.step;
  const int64_t sums_of_tile = room(inputs * kTile);
  float* memory = memory_of(copied + gradients + products + tiles * sums_of_tile);
  const Filter filter = filter_of(p, s, memory, threads);
  float *ordered = memory + copied, *found = ordered + gradients, *sums = found + products;
  const int64_t block = evenly(s.pixels, kGradients);
  order_gradients<T>(p, s, block, ordered, threads);

  constexpr int64_t kLaneCount = kLanes<float>, kWidth = kPanel * kLaneCount;
  constexpr std::make_integer_sequence<int, kGradients> kCounts;
  const Products to_do{ordered, found, block};
  share(ceil_div(s.size, kWidth), s.pixels * s.size * s.c_out, threads, [&](int64_t panel) {
    int64_t k = panel * kWidth;
    if (k + kWidth <= s.size) {
      return multiply_panels<kPanel>(s, filter, to_do, k, Full{}, kCounts);
    }
    for (; k + kLaneCount <= s.size; k += kLaneCount) {
      multiply_panels<1>(s, filter, to_do, k, Full{}, kCounts);
    }
    if (k < s.size) {
      multiply_panels<1>(s, filter, to_do, k, Part{static_cast<int>(s.size - k)}, kCounts);
    }
  });

  const ConvParams to = storing_params(p, s.height, s.width, s.c_in);
  parallel(tiles, inputs * s.size, threads, [&](int64_t tile) {
    float* const own = sums + tile * sums_of_tile;
    scatter_tile(s, found, filter.taps_inside, tile * kTile, own);
    store_tile<T>(to, own, tile * kTile, nullptr);
  });
}

}  // namespace
}  // namespace unpacked

void conv_unpacked(const ConvUnpackedParams& p, int threads) {
  with_float(p.dtype, [&](auto number) { unpacked::forward<decltype(number)>(p, threads); });
}

void conv_unpacked_input_grad(const ConvUnpackedInputGradParams& p, int threads) {
  with_float(p.dtype, [&](auto number) { unpacked::input_grad<decltype(number)>(p, threads); });
}

}  // namespace VF_ISA
}  // namespace vovnet_fast

#endif
