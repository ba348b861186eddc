// Every formula once, for host and device.
//
// Templates that take T compute on numbers, and on the host on vectors of numbers (GCC's vector
// extension) as well, whose comparisons give masks that ?: selects by. So a formula has no branches
// on values, and no constants but T{}, which is zero.
//
// Files of csrc/cpu are compiled once per instruction set, with VF_ISA naming it. All that is here
// lies in a namespace of that name, lest the linker takes the form of one for that of another.
//
// This folder must not be an include directory (-I), where it would hide the system's <math.h>:
// include its files by their relative path, or with -iquote.
#pragma once

#include <math.h>

#include <cstdint>

#ifdef __CUDACC__
#define VF_HD __host__ __device__ __forceinline__
#else
#define VF_HD inline __attribute__((always_inline))
#endif

#ifndef VF_ISA
#define VF_ISA generic
#endif

namespace vovnet_fast {
inline namespace VF_ISA {

// ---- Activations -------------------------------------------------------------------------------

// max(y, 0), NaN for NaN.
template <class T>
VF_HD T relu(T y) {
  return y <= T{} ? T{} : y;
}

// The epilogue of every convolution.
template <class T>
VF_HD T scale_shift(T y, T scale, T shift) {
  return y * scale + shift;
}

template <class T>
VF_HD T scale_shift_relu(T y, T scale, T shift) {
  return relu(scale_shift(y, scale, shift));
}

// Gradient g where the ReLU that put out y let it pass, which it does at NaN; else 0.
template <class T>
VF_HD T relu_gradient(T g, T y) {
  return y <= T{} ? T{} : g;
}

// ---- Gates (numbers only) ----------------------------------------------------------------------

VF_HD float exponential(float x) { return ::expf(x); }
VF_HD double exponential(double x) { return ::exp(x); }

// relu6(z + 3) / 6, NaN for NaN.
template <class T>
VF_HD T hard_sigmoid(T z) {
  const T y = relu(z + T(3));
  return (y > T(6) ? T(6) : y) / T(6);
}

template <class T>
VF_HD T sigmoid(T z) {
  return T(1) / (T(1) + exponential(-z));
}

// Gradients of what a gate takes, from that of the gate and the gate itself. Where the hard sigmoid
// is flat nothing passes, not even NaN.
template <class T>
VF_HD T hard_sigmoid_gradient(T dgate, T gate) {
  return gate <= T(0) || gate >= T(1) ? T(0) : dgate / T(6);
}

template <class T>
VF_HD T sigmoid_gradient(T dgate, T gate) {
  return dgate * (gate * (T(1) - gate));
}

// ---- Batch norm --------------------------------------------------------------------------------

template <class T>
VF_HD T normalize(T z, T mean, T rstd) {
  return (z - mean) * rstd;
}

// Gradient of z, where scale = gamma * rstd, and g_mean and slope are the means over all pixels of
// g and of g * normalised z.
template <class T>
VF_HD T batch_norm_input_gradient(T g, T z, T mean, T rstd, T scale, T g_mean, T slope) {
  return scale * (g - g_mean - normalize(z, mean, rstd) * slope);
}

// What squared deviations gain when two sets with these counts and sums become one (Chan, Golub and
// LeVeque, 1979). Unlike a sum of squares it loses nothing where means are large. No count is 0.
template <class Count, class T>
VF_HD T deviations_between(Count count_a, T sum_a, Count count_b, T sum_b) {
  const T crossed = sum_b * count_a - sum_a * count_b;
  // In this order: its square could overflow.
  return crossed * (crossed / (count_a * count_b * (count_a + count_b)));
}

// Count, sum, and sum of squared deviations from the mean.
template <class T>
struct Statistics {
  T count, sum, m2;
};

// Statistics of two sets together; an empty one is ignored, whatever its other numbers are.
template <class T>
VF_HD Statistics<T> merge(const Statistics<T>& a, const Statistics<T>& b) {
  const auto has_a = a.count > T{};
  const auto has_b = b.count > T{};
  const T between = deviations_between(a.count, a.sum, b.count, b.sum);
  return {a.count + b.count, (has_a ? a.sum : T{}) + (has_b ? b.sum : T{}),
          (has_a ? a.m2 : T{}) + (has_b ? b.m2 : T{}) + (has_a & has_b ? between : T{})};
}

// The rows of a batch norm (kNormRows), of High as they are stored.
template <class High>
struct Norm {
  High mean, rstd, scale, shift, variance, count;
};

template <class High>
VF_HD Norm<High> finish_norm(const Statistics<double>& s, double gamma, double beta, double eps) {
  const double mean = s.sum / s.count;
  const double rstd = 1.0 / ::sqrt(s.m2 / s.count + eps);
  // The shift is that of the scale as it is stored: with a large mean its rounding would not
  // cancel.
  const High scale = static_cast<High>(gamma * rstd);
  const double shift = beta - mean * static_cast<double>(scale);
  return {static_cast<High>(mean),
          static_cast<High>(rstd),
          scale,
          static_cast<High>(shift),
          static_cast<High>(s.m2 / (s.count - 1.0)),
          static_cast<High>(s.count)};
}

// ---- Windows -----------------------------------------------------------------------------------

// Whether x takes the place of the maximum so far: a NaN does, and nothing exceeds it.
template <class T>
VF_HD auto exceeds(T x, T best) {
  return (x > best) | (x != x);
}

// The part of a window of three that lies inside [0, size): taps [first, last) of it.
struct Taps {
  int first, last;
};

// start: where the window's first tap lies, may be negative.
VF_HD Taps taps_inside(int64_t start, int64_t size) {
  const int64_t last = size - start;
  return {start < 0 ? static_cast<int>(-start) : 0, last < 3 ? static_cast<int>(last) : 3};
}

// Where the first tap of the window of output `o` lies.
VF_HD int64_t window_start(int64_t o, int64_t stride, int64_t pad) { return o * stride - pad; }

// The output whose window has input `i` at `tap`, or -1.
VF_HD int64_t window_of(int64_t i, int tap, int64_t stride, int64_t pad, int64_t outputs) {
  const int64_t start = i + pad - tap;
  if (start < 0 || start % stride != 0) return -1;
  const int64_t o = start / stride;
  return o < outputs ? o : -1;
}

// a / b, rounded up.
VF_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace VF_ISA
}  // namespace vovnet_fast
