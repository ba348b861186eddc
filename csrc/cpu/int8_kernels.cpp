// Ops in eight bits beside convolutions (int8_conv*): images, depthwise, pool, gates.
#include "../ops.h"
#include "integers.h"
#include "loops.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

// ---- Images ------------------------------------------------------------------------------------

// `count` numbers that lie side by side, as integers.
VF_HD void quantize_run(const float* from, int64_t count, Floats factor, Floats limit,
                        int32_t* to) {
  for_channels<float>(count, [&](int64_t i, auto span) VF_LAMBDA {
    const Floats scaled = load(from + i, span) * factor;
    store(to + i, to_nearest(bounded(scaled, -limit, limit)), span);
  });
}

template <class T>
VF_HD void quantize_row(const Int8ImageParams& p, const float* x, T* out) {
  constexpr int64_t kRun = 256;
  const Floats factor = broadcast<float>(static_cast<float>(p.factor));
  const Floats limit = broadcast<float>(static_cast<float>(p.limit));
  int32_t run[kRun];
  float values[kRun];
  if (p.x_stride_c == 1 && p.x.stride_w == p.c) {  // Channels last: a row is one run.
    for (int64_t i = 0; i < p.width * p.c; i += kRun) {
      const int64_t count = least(kRun, p.width * p.c - i);
      quantize_run(x + i, count, factor, limit, run);
      for (int64_t k = 0; k < count; ++k) out[i + k] = static_cast<T>(run[k]);
    }
    return;
  }
  for (int64_t c = 0; c < p.c; ++c) {
    for (int64_t w = 0; w < p.width; w += kRun) {
      const float* from = x + c * p.x_stride_c + w * p.x.stride_w;
      const int64_t count = least(kRun, p.width - w);
      if (p.x.stride_w != 1) {
        for (int64_t k = 0; k < count; ++k) values[k] = from[k * p.x.stride_w];
        from = values;
      }
      quantize_run(from, count, factor, limit, run);
      for (int64_t k = 0; k < count; ++k) out[(w + k) * p.c + c] = static_cast<T>(run[k]);
    }
  }
}

template <class T>
void run_image(const Int8ImageParams& p, int threads) {
  parallel(p.n * p.height, p.n * p.height * p.width * p.c, threads, [&](int64_t i) {
    const float* x = static_cast<const float*>(p.x.data) + i / p.height * p.x.stride_n +
                     i % p.height * p.x.stride_h;
    quantize_row(p, x, static_cast<T*>(p.out) + i * p.width * p.c);
  });
}

// ---- Depthwise ---------------------------------------------------------------------------------

// Some channels of a row of the output. A column of the window is loaded once for all pixels that
// have it in their windows, its upper two taps as pairs.
template <class Span>
VF_HD void depthwise_row(const Int8DepthwiseParams& p, int64_t image, int64_t row, int64_t c,
                         Span span) {
  const auto* weight = static_cast<const int8_t*>(p.weight) + c;
  Ints weights[3][2];
  for (int j = 0; j < 3; ++j) {
    const auto tap = [&](int i) VF_LAMBDA { return load_signed(weight + (3 * i + j) * p.c, span); };
    weights[j][0] = in_pairs(tap(0), tap(1));
    weights[j][1] = tap(2);
  }
  const Floats multiplier = load(static_cast<const float*>(p.multiplier) + c, span);
  const Ints zero = load_bytes<float>(static_cast<const uint8_t*>(p.zero) + c, span);
  const Floats low = -to_floats(zero), high = low + static_cast<float>(p.levels);
  const int64_t first = window_start(row, p.stride, 1);
  const uint8_t* rows[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t h = first + i;
    rows[i] = h < 0 || h >= p.height ? nullptr : at<const uint8_t>(p.x, image, Pixel{h, 0}) + c;
  }
  const auto column = [&](int64_t w, Ints(&to)[2]) VF_LAMBDA {
    const bool inside = w >= 0 && w < p.width;
    const auto tap = [&](int i) VF_LAMBDA {
      if (!inside || rows[i] == nullptr) return Ints{};
      return load_bytes<float>(rows[i] + w * p.x.stride_w, span);
    };
    to[0] = in_pairs(tap(0), tap(1));
    to[1] = tap(2);
  };
  Ints left[2], middle[2], right[2];
  uint8_t* out = at<uint8_t>(p.out, image, Pixel{row, 0}) + c;
  for (int64_t w = 0; w < p.out_width; ++w, out += p.out.stride_w) {
    const int64_t start = window_start(w, p.stride, 1);
    if (w == 0 || p.stride == 2) {
      if (w == 0) column(start, left);
      column(start + 1, middle);
    }
    column(start + 2, right);
    Ints acc{};
    for (int i = 0; i < 2; ++i) {
      acc += sums_of_pairs(left[i], weights[0][i]) + sums_of_pairs(middle[i], weights[1][i]) +
             sums_of_pairs(right[i], weights[2][i]);
      left[i] = p.stride == 1 ? middle[i] : right[i];
      middle[i] = right[i];
    }
    store_bytes<float>(out, requantized(acc, multiplier, low, high) + zero, span);
  }
}

// ---- Pool --------------------------------------------------------------------------------------

template <int kBytes>
VF_HD void largest(const uint8_t* const* x, int count, int64_t c, uint8_t* out) {
  typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
  Bytes best, value;
  memcpy(&best, x[0] + c, kBytes);
  for (int i = 1; i < count; ++i) {
    memcpy(&value, x[i] + c, kBytes);
    best = value > best ? value : best;
  }
  memcpy(out + c, &best, kBytes);
}

void max_pool_share(const Int8MaxPoolParams& p, const Share& share) {
  for_each_pixel(share, p.out_width, [&](Pixel o) {
    const int64_t h = window_start(o.h, 2, p.pad), w = window_start(o.w, 2, p.pad);
    const Taps rows = taps_inside(h, p.height), columns = taps_inside(w, p.width);
    const uint8_t* x[9];
    int count = 0;
    for (int i = rows.first; i < rows.last; ++i) {
      for (int j = columns.first; j < columns.last; ++j) {
        x[count++] = at<const uint8_t>(p.x, share.image, Pixel{h + i, w + j});
      }
    }
    uint8_t* out = at<uint8_t>(p.out, share.image, o);
    int64_t c = 0;
    for (; c + kVectorBytes <= p.c; c += kVectorBytes) largest<kVectorBytes>(x, count, c, out);
    for (; c + 8 <= p.c; c += 8) largest<8>(x, count, c, out);
    for (; c < p.c; ++c) {
      out[c] = x[0][c];
      for (int i = 1; i < count; ++i) out[c] = x[i][c] > out[c] ? x[i][c] : out[c];
    }
  });
}

// ---- Gates -------------------------------------------------------------------------------------

VF_HD int32_t rounded(float y, float most) {
  y = y > 0 ? y : 0;  // NaN, too, is no index of a table.
  return static_cast<int32_t>(__builtin_lrintf(y > most ? most : y));
}

// The mean of an image over its pixels.
VF_HD void mean_of(const Int8GatesParams& p, int64_t image) {
  const auto* partials = static_cast<const int32_t*>(p.partials) + image * p.tiles * p.c;
  auto* mean = static_cast<int16_t*>(p.mean) + image * p.c;
  const auto factor = static_cast<float>(p.mean_factor);
  for (int64_t c = 0; c < p.c; ++c) {
    int32_t sum = 0;
    for (int64_t t = 0; t < p.tiles; ++t) sum += partials[t * p.c + c];
    mean[c] = static_cast<int16_t>(__builtin_lrintf(static_cast<float>(sum) * factor));
  }
}

// Compilers make pairs of products of this loop.
VF_HD int32_t product(const int16_t* x, const int16_t* y, int64_t count) {
  int32_t sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += x[k] * y[k];
  return sum;
}

// ---- Gates and identity ------------------------------------------------------------------------

void apply_share(const Int8ApplyGatesParams& p, const Share& share) {
  const auto* gates = static_cast<const int32_t*>(p.gates);
  if (gates != nullptr) gates += share.image * p.c;
  const Ints factor = Ints{} + p.identity_gate, gate = Ints{} + p.gate;
  const Floats rescale = broadcast<float>(static_cast<float>(p.rescale));
  const Floats step = broadcast<float>(static_cast<float>(p.step));
  const Floats low{}, high = broadcast<float>(static_cast<float>(p.levels));
  for_each_pixel(share, p.width, [&](Pixel pixel) {
    const auto of = [&](const View& view, auto* none) VF_LAMBDA {
      using T = std::remove_pointer_t<decltype(none)>;
      return view.data == nullptr ? nullptr : at<T>(view, share.image, pixel);
    };
    constexpr uint8_t* kBytes = nullptr;
    constexpr float* kFloats = nullptr;
    const uint8_t *z = of(p.z, kBytes), *identity = of(p.identity, kBytes);
    uint8_t* out = of(p.out, kBytes);
    float* feature = of(p.feature, kFloats);
    for_channels<float>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
      const Ints x = identity == nullptr ? Ints{} : load_bytes<float>(identity + c, span);
      const Ints y = gates == nullptr ? gate : load(gates + c, span);
      const Ints pairs = in_pairs(load_bytes<float>(z + c, span), x);
      const Ints acc = sums_of_pairs(pairs, in_pairs(y, factor));
      if (out != nullptr) store_bytes<float>(out + c, requantized(acc, rescale, low, high), span);
      if (feature != nullptr) store(feature + c, to_floats(acc) * step, span);
    });
  });
}

}  // namespace

void int8_image(const Int8ImageParams& p, int threads) {
  p.kind == kWords ? run_image<int16_t>(p, threads) : run_image<int8_t>(p, threads);
}

void int8_depthwise(const Int8DepthwiseParams& p, int threads) {
  const int64_t pixels = p.n * p.out_height * p.out_width;
  parallel(p.n * p.out_height, pixels * p.c, threads, [&](int64_t i) {
    for_channels<float>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
      depthwise_row(p, i / p.out_height, i % p.out_height, c, span);
    });
  });
}

void int8_max_pool(const Int8MaxPoolParams& p, int threads) {
  for_pass(p.n, p.out_height * p.out_width, 4 * p.c, threads,
           [&](const Share& share) { max_pool_share(p, share); });
}

void int8_gates(const Int8GatesParams& p, int threads) {
  for (int64_t n = 0; n < p.n; ++n) mean_of(p, n);
  const auto* weight = static_cast<const int16_t*>(p.fc_weight);
  const auto* mean = static_cast<const int16_t*>(p.mean);
  const auto* table = static_cast<const int32_t*>(p.table);
  parallel(p.c, p.c * p.c, threads, [&](int64_t o) {
    const int32_t bias = static_cast<const int32_t*>(p.fc_bias)[o];
    const float multiplier = static_cast<const float*>(p.multiplier)[o];
    for (int64_t n = 0; n < p.n; ++n) {
      const int32_t acc = product(weight + o * p.c, mean + n * p.c, p.c) + bias;
      const int32_t gate =
          rounded(static_cast<float>(acc) * multiplier, static_cast<float>(p.most));
      static_cast<int32_t*>(p.out)[n * p.c + o] = table == nullptr ? gate : table[gate];
    }
  });
}

void int8_apply_gates(const Int8ApplyGatesParams& p, int threads) {
  for_pass(p.n, p.height * p.width, p.c, threads,
           [&](const Share& share) { apply_share(p, share); });
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
