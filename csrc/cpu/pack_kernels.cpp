// Weights of convolutions: scaled, rounded, rearranged; and the gradients of that.
#include "../ops.h"
#include "loops.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

template <class T, class Weight>
VF_HD T scaled(Weight weight, High<T> scale) {
  return narrow<T>(static_cast<High<T>>(widen(weight)) * scale);
}

template <class T, class Weight>
void run_pack(const PackParams& p, int threads) {
  const int64_t taps = p.kernel * p.kernel;
  parallel(p.c_out, p.c_out * taps * p.c_in, threads, [&](int64_t o) {
    const auto* weight = static_cast<const Weight*>(p.weight.data) + o * p.stride_o;
    const High<T> scale = element_or(p.scale, o, High<T>(1));
    T* out = static_cast<T*>(p.out) + o * taps * p.c_in;
    for (int64_t tap = 0; tap < taps; ++tap, out += p.c_in) {
      const Weight* from = weight + tap / p.kernel * p.stride_h + tap % p.kernel * p.stride_w;
      for (int64_t i = 0; i < p.c_in; ++i) out[i] = scaled<T>(from[i * p.stride_i], scale);
    }
  });
}

// Tiles of a tap are scaled and rounded as they lie, and written out in the other direction.
constexpr int64_t kTile = 32;

template <class T, class Weight>
void transpose_tile(const PackParams& p, int64_t tap, int64_t first_o, int64_t first_i) {
  const int64_t taps = p.kernel * p.kernel;
  const int64_t outputs = least(kTile, p.c_out - first_o), inputs = least(kTile, p.c_in - first_i);
  T tile[kTile][kTile];
  for (int64_t o = 0; o < outputs; ++o) {
    const High<T> scale = element_or(p.scale, first_o + o, High<T>(1));
    const auto* from = static_cast<const Weight*>(p.weight.data) + (first_o + o) * p.stride_o +
                       tap / p.kernel * p.stride_h + tap % p.kernel * p.stride_w +
                       first_i * p.stride_i;
    for (int64_t i = 0; i < inputs; ++i) tile[o][i] = scaled<T>(from[i * p.stride_i], scale);
  }
  for (int64_t i = 0; i < inputs; ++i) {
    T* out = static_cast<T*>(p.out) + ((first_i + i) * taps + taps - 1 - tap) * p.c_out + first_o;
    for (int64_t o = 0; o < outputs; ++o) out[o] = tile[o][i];
  }
}

template <class T, class Weight>
void run_pack_transposed(const PackParams& p, int threads) {
  const int64_t taps = p.kernel * p.kernel;
  parallel(ceil_div(p.c_in, kTile), p.c_out * taps * p.c_in, threads, [&](int64_t block) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t o = 0; o < p.c_out; o += kTile) {
        transpose_tile<T, Weight>(p, tap, o, block * kTile);
      }
    }
  });
}

// One tap of an output channel: stores the products' multiples, and returns the sum of weight times
// products.
template <class Number, class Product, class Weight>
VF_HD double scale_products(const Product* products, int64_t stride, const Weight* weight,
                            Number scale, Number* out, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const auto product = static_cast<Number>(widen(products[i * stride]));
    out[i] = product * scale;
    sum += static_cast<double>(widen(weight[i])) * static_cast<double>(product);
  }
  return sum;
}

template <class Number, class Product, class Weight>
void run_pack_backward(const PackBackwardParams& p, int threads) {
  const int64_t taps = p.kernel * p.kernel;
  const auto* scales = static_cast<const Number*>(p.scale);
  parallel(p.c_out, p.c_out * taps * p.c_in, threads, [&](int64_t o) {
    const auto* products = static_cast<const Product*>(p.products.data) + o * p.stride_o;
    double dscale = 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t row = (o * taps + tap) * p.c_in;
      const auto* from = products + tap / p.kernel * p.stride_h + tap % p.kernel * p.stride_w;
      Number* out = static_cast<Number*>(p.dweight) + row;
      if (scales == nullptr) {
        for (int64_t i = 0; i < p.c_in; ++i) {
          out[i] = static_cast<Number>(widen(from[i * p.stride_i]));
        }
        continue;
      }
      const auto* weight = static_cast<const Weight*>(p.weight.data) + row;
      dscale += p.stride_i == 1 ? scale_products(from, 1, weight, scales[o], out, p.c_in)
                                : scale_products(from, p.stride_i, weight, scales[o], out, p.c_in);
    }
    if (scales != nullptr) static_cast<Number*>(p.dscale)[o] = static_cast<Number>(dscale);
  });
}

}  // namespace

void pack(const PackParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) {
    with_dtype(p.weight.dtype,
               [&](auto weight) { run_pack<decltype(type), decltype(weight)>(p, threads); });
  });
}

void pack_transposed(const PackParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) {
    with_dtype(p.weight.dtype, [&](auto weight) {
      run_pack_transposed<decltype(type), decltype(weight)>(p, threads);
    });
  });
}

void pack_backward(const PackBackwardParams& p, int threads) {
  with_high(p.dtype, [&](auto number) {
    with_dtype(p.products.dtype, [&](auto product) {
      with_dtype(p.weight.data == nullptr ? p.dtype : p.weight.dtype, [&](auto weight) {
        run_pack_backward<decltype(number), decltype(product), decltype(weight)>(p, threads);
      });
    });
  });
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
