// Effective Squeeze-Excitation, forward and backward.
#include "../ops.h"
#include "apply_gates.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

// Sum of weight[i] * x[i].
template <class Weight, class Number>
Number dot(const Weight* weight, const Number* x, int64_t count) {
  if constexpr (Same<High<Weight>, Number>::value) {
    Vector<Number> sum{};
    for_channels<Number>(count, [&](int64_t c, auto span) VF_LAMBDA {
      sum += load(weight + c, span) * load(x + c, span);
    });
    return sum_of_lanes<Number>(sum);
  } else {
    Number sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<Number>(widen(weight[i])) * x[i];
    return sum;
  }
}

template <class Number, class Weight>
void run_gates(const GatesParams& p, int threads) {
  const auto* partials = static_cast<const Number*>(p.partials);
  const auto* weight = static_cast<const Weight*>(p.fc_weight.data);
  auto* mean = static_cast<Number*>(p.mean);
  auto* out = static_cast<Number*>(p.out);
  parallel(p.n, p.n * p.tiles * p.c, threads, [&](int64_t n) {
    sum_rows(partials + n * p.tiles * p.c, p.tiles, p.c, p.c, static_cast<double>(p.num_pixels),
             mean + n * p.c);
  });
  parallel(p.n * p.c, p.n * p.c * p.c, threads, [&](int64_t i) {
    const int64_t oc = i % p.c;
    const Number z = dot(weight + oc * p.c, mean + (i - oc), p.c) + element<Number>(p.fc_bias, oc);
    out[i] = p.kind == kHardSigmoid ? hard_sigmoid(z) : sigmoid(z);
  });
}

// Gradient of what the gates' nonlinearity takes.
template <class Number>
VF_HD Number gate_gradient(const GatesBackwardParams& p, int64_t i) {
  const Number dgate = static_cast<const Number*>(p.dgates)[i];
  const Number gate = static_cast<const Number*>(p.gates)[i];
  return p.kind == kHardSigmoid ? hard_sigmoid_gradient(dgate, gate)
                                : sigmoid_gradient(dgate, gate);
}

// Of one image, for `columns` input channels from `first` on.
template <class Number, class Weight>
void pixel_gradient(const GatesBackwardParams& p, int64_t n, int64_t first, int64_t columns) {
  const auto* weight = static_cast<const Weight*>(p.fc_weight.data) + first;
  double sums[kLanes<float> * 4] = {};
  for (int64_t oc = 0; oc < p.c; ++oc) {
    const double d = gate_gradient<Number>(p, n * p.c + oc);
    for (int64_t i = 0; i < columns; ++i) sums[i] += d * widen(weight[oc * p.c + i]);
  }
  auto* out = static_cast<Number*>(p.dpixel) + n * p.c + first;
  for (int64_t i = 0; i < columns; ++i) out[i] = static_cast<Number>(sums[i] / p.num_pixels);
}

// Of one output channel, summed over the images one by one.
template <class Number>
void weight_gradient(const GatesBackwardParams& p, int64_t oc) {
  const auto* mean = static_cast<const Number*>(p.mean);
  auto* out = static_cast<Number*>(p.dfc_weight) + oc * p.c;
  Number bias = 0;
  zero(out, p.c);
  for (int64_t n = 0; n < p.n; ++n) {
    const Number d = gate_gradient<Number>(p, n * p.c + oc);
    bias += d;
    for_channels<Number>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
      store(out + c, load(out + c, span) + load(mean + n * p.c + c, span) * d, span);
    });
  }
  static_cast<Number*>(p.dfc_bias)[oc] = bias;
}

template <class Number, class Weight>
void run_gates_backward(const GatesBackwardParams& p, int threads) {
  constexpr int64_t kColumns = kLanes<float> * 4;
  const int64_t groups = ceil_div(p.c, kColumns), products = p.n * p.c * p.c;
  parallel(p.n * groups, products, threads, [&](int64_t i) {
    const int64_t first = i % groups * kColumns;
    pixel_gradient<Number, Weight>(p, i / groups, first, least(kColumns, p.c - first));
  });
  parallel(p.c, products, threads, [&](int64_t oc) { weight_gradient<Number>(p, oc); });
}

template <class T>
void run_apply_gates(const ApplyGatesParams& p, int threads) {
  for_pass(p.n, p.height * p.width, p.c, threads,
           [&](const Share& share) { gating::run<T>(p, share); });
}

template <class T, bool kGated>
void apply_backward_share(const ApplyGatesBackwardParams& p, const Share& share) {
  const int64_t image = kGated ? share.image * p.c : 0;
  const auto* gates = static_cast<const High<T>*>(p.gates) + image;
  const auto* dpixel = static_cast<const High<T>*>(p.dpixel) + image;
  for_pixels(share, p.width, [&](const Pixel* pixels, auto count) {
    constexpr int kCount = count.value;
    const Pointers<const T, kCount> dout(p.dout, share.image, pixels);
    const Pointers<const T, kCount> y(p.y, share.image, pixels);
    const Pointers<T, kCount> out(p.out, share.image, pixels);
    for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
      Vector<T> gate{}, more{};
      if (kGated) {
        gate = load(gates + c, span);
        more = load(dpixel + c, span);
      }
      for (int i = 0; i < kCount; ++i) {
        auto dz = load(dout[i] + c, span);
        if (kGated) dz = dz * gate + more;
        store(out[i] + c, relu_gradient(dz, load(y[i] + c, span)), span);
      }
    });
  });
}

template <class T>
void run_apply_gates_backward(const ApplyGatesBackwardParams& p, int threads) {
  const auto apply =
      p.gates != nullptr ? apply_backward_share<T, true> : apply_backward_share<T, false>;
  for_pass(p.n, p.height * p.width, p.c, threads, [&](const Share& share) { apply(p, share); });
}

template <class T>
void gate_sums_share(const GateSumsParams& p, const Share& share, High<T>* sums) {
  zero(sums, p.c);
  for_pixels(share, p.width, [&](const Pixel* pixels, auto count) {
    constexpr int kCount = count.value;
    const Pointers<const T, kCount> dout(p.dout, share.image, pixels);
    const Pointers<const T, kCount> y(p.y, share.image, pixels);
    for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
      Vector<T> sum{};
      for (int i = 0; i < kCount; ++i) sum += load(dout[i] + c, span) * load(y[i] + c, span);
      store(sums + c, load(sums + c, span) + sum, span);
    });
  });
}

template <class T>
void run_gate_sums(const GateSumsParams& p, int threads) {
  auto* partials = static_cast<High<T>*>(p.partials);
  auto* out = static_cast<High<T>*>(p.out);
  const int64_t pixels = p.height * p.width;
  if (pixels == 0) return zero(out, p.n * p.c);
  for_shares(p.n, pixels, ceil_div(pixels, p.parts), p.c, threads, [&](const Share& share) {
    gate_sums_share<T>(p, share, partials + (share.image * p.parts + share.index) * p.c);
  });
  parallel(p.n, p.n * p.parts * p.c, threads, [&](int64_t n) {
    sum_rows(partials + n * p.parts * p.c, p.parts, p.c, p.c, 1.0, out + n * p.c);
  });
}

}  // namespace

void gates(const GatesParams& p, int threads) {
  with_high(p.dtype, [&](auto number) {
    with_dtype(p.fc_weight.dtype,
               [&](auto weight) { run_gates<decltype(number), decltype(weight)>(p, threads); });
  });
}

void gates_backward(const GatesBackwardParams& p, int threads) {
  with_high(p.dtype, [&](auto number) {
    with_dtype(p.fc_weight.dtype, [&](auto weight) {
      run_gates_backward<decltype(number), decltype(weight)>(p, threads);
    });
  });
}

void apply_gates(const ApplyGatesParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) { run_apply_gates<decltype(type)>(p, threads); });
}

void apply_gates_backward(const ApplyGatesBackwardParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) { run_apply_gates_backward<decltype(type)>(p, threads); });
}

void gate_sums(const GateSumsParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) { run_gate_sums<decltype(type)>(p, threads); });
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
