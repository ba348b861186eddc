// What cpu_driver.cpp compares with: tensors that guard their surroundings, and numbers whose
// formats are written out again here, from IEEE 754 and not from csrc.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "../../csrc/cpu/conv_engines.h"
#include "../../csrc/cpu/conv_unpacked.h"
#include "../../csrc/cpu/conv_winograd.h"
#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/ops.h"

namespace driver {

using vovnet_fast::Array;
using vovnet_fast::View;
using Values = std::vector<double>;

constexpr int32_t kHalf = vovnet_fast::kFloat16, kBrain = vovnet_fast::kBFloat16;
constexpr int32_t kSingle = vovnet_fast::kFloat32, kDouble = vovnet_fast::kFloat64;

// ---- Formats -----------------------------------------------------------------------------------

struct Format {
  const char* name;
  int bytes, mantissa, lowest, highest;  // bits behind the point, exponents of normal numbers
};

inline const Format& format(int32_t dtype) {
  static const Format formats[] = {{"fp16", 2, 10, -14, 15},
                                   {"bf16", 2, 7, -126, 127},
                                   {"fp32", 4, 23, -126, 127},
                                   {"fp64", 8, 52, -1022, 1023}};
  return formats[dtype];
}

inline int32_t high(int32_t dtype) { return dtype == kDouble ? kDouble : kSingle; }

// To nearest, ties to even, beyond the largest to Inf.
inline double rounded(int32_t dtype, double y) {
  if (dtype == kDouble || y == 0 || !std::isfinite(y)) return y;
  const Format& f = format(dtype);
  const int exponent = std::max(std::ilogb(y), f.lowest);
  const double found =
      std::ldexp(std::nearbyint(std::ldexp(y, f.mantissa - exponent)), exponent - f.mantissa);
  const double largest = std::ldexp(2 - std::ldexp(1.0, -f.mantissa), f.highest);
  return std::fabs(found) > largest ? std::copysign(INFINITY, y) : found;
}

inline double decode(int32_t dtype, const unsigned char* from) {
  if (dtype == kDouble) {
    double y;
    memcpy(&y, from, 8);
    return y;
  }
  if (dtype == kSingle) {
    float y;
    memcpy(&y, from, 4);
    return y;
  }
  uint16_t bits;
  memcpy(&bits, from, 2);
  const Format& f = format(dtype);
  const int exponents = 15 - f.mantissa, exponent = (bits & 0x7fff) >> f.mantissa;
  const int fraction = bits & ((1 << f.mantissa) - 1);
  double y;
  if (exponent == (1 << exponents) - 1) {
    y = fraction != 0 ? NAN : INFINITY;
  } else if (exponent == 0) {
    y = std::ldexp(fraction, f.lowest - f.mantissa);
  } else {
    y = std::ldexp(fraction + (1 << f.mantissa), exponent + f.lowest - 1 - f.mantissa);
  }
  return (bits & 0x8000) != 0 ? -y : y;
}

// `y` is one of the dtype's numbers.
inline void encode(int32_t dtype, double y, unsigned char* to) {
  if (dtype == kDouble) {
    memcpy(to, &y, 8);
    return;
  }
  if (dtype == kSingle) {
    const auto single = static_cast<float>(y);
    memcpy(to, &single, 4);
    return;
  }
  const Format& f = format(dtype);
  int bits = std::signbit(y) ? 0x8000 : 0;
  const double size = std::fabs(y);
  if (std::isnan(y)) {
    bits |= 0x7fff;
  } else if (std::isinf(y)) {
    bits |= 0x7fff >> f.mantissa << f.mantissa;
  } else if (size < std::ldexp(1.0, f.lowest)) {
    bits |= static_cast<int>(std::ldexp(size, f.mantissa - f.lowest));
  } else {
    const int exponent = std::ilogb(size);
    bits |= (exponent - f.lowest) << f.mantissa;  // The leading one adds what is missing.
    bits += static_cast<int>(std::ldexp(size, f.mantissa - exponent));
  }
  const auto half = static_cast<uint16_t>(bits);
  memcpy(to, &half, 2);
}

// ---- Tensors -----------------------------------------------------------------------------------

// Where random numbers are. Each kind of check sets it to 1: how many a kind draws depends on the
// engines that a processor has.
inline uint64_t& random_state() {
  static uint64_t state = 1;
  return state;
}

inline double uniform() {
  uint64_t& state = random_state();
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 11) * 0x1p-53;
}

struct Shape {
  int64_t n, h, w, c;
  int64_t pixels() const { return n * h * w; }
  int64_t count() const { return pixels() * c; }
};

// Elements [N, H, W, C] amid bytes of 0xff, which are NaN in every dtype.
class Tensor {
 public:
  // A slot: channels, columns and rows lie apart, and it begins at no round address.
  static Tensor slot(int32_t dtype, const Shape& s) {
    const int64_t w = s.c + 13, h = s.w * w + 5;
    return Tensor(dtype, s, {s.h * h + 3, h, w}, 7);
  }
  static Tensor packed(int32_t dtype, const Shape& s) {
    return Tensor(dtype, s, {s.h * s.w * s.c, s.w * s.c, s.c}, 8);
  }
  static Tensor packed(int32_t dtype, int64_t count) { return packed(dtype, {1, 1, 1, count}); }

  View view() { return {data(), strides_[0], strides_[1], strides_[2]}; }
  Array array() { return {data(), dtype_}; }
  void* data() { return memory_.data() + first_ * format(dtype_).bytes; }
  int32_t dtype() const { return dtype_; }
  int64_t count() const { return shape_.count(); }
  double get(int64_t i) const { return decode(dtype_, memory_.data() + place(i)); }
  void set(int64_t i, double y) { encode(dtype_, rounded(dtype_, y), memory_.data() + place(i)); }
  double at(int64_t n, int64_t h, int64_t w, int64_t c) const {
    return get(((n * shape_.h + h) * shape_.w + w) * shape_.c + c);
  }

  Tensor& random(double low = -1, double high = 1) {
    for (int64_t i = 0; i < count(); ++i) set(i, low + (high - low) * uniform());
    return *this;
  }

  void write_before() { memory_[0] = 0; }

  // Whether nothing was written around the elements. It overwrites them.
  bool guarded() {
    for (int64_t i = 0; i < count(); ++i) {
      memset(memory_.data() + place(i), 0xff, format(dtype_).bytes);
    }
    for (const unsigned char byte : memory_) {
      if (byte != 0xff) return false;
    }
    return true;
  }

 private:
  Tensor(int32_t dtype, const Shape& shape, std::vector<int64_t> strides, int64_t first)
      : dtype_(dtype), shape_(shape), strides_(std::move(strides)), first_(first) {
    memory_.assign((first_ + shape_.n * strides_[0] + 64) * format(dtype_).bytes, 0xff);
  }

  int64_t place(int64_t i) const {
    const int64_t c = i % shape_.c, w = i / shape_.c % shape_.w;
    const int64_t h = i / shape_.c / shape_.w % shape_.h, n = i / shape_.c / shape_.w / shape_.h;
    return (first_ + n * strides_[0] + h * strides_[1] + w * strides_[2] + c) *
           format(dtype_).bytes;
  }

  int32_t dtype_;
  Shape shape_;
  std::vector<int64_t> strides_;
  int64_t first_;
  std::vector<unsigned char> memory_;
};

// ---- Verdicts ----------------------------------------------------------------------------------

struct Report {
  int threads = 1;
  bool spoil = false;  // Change a number of every output: each comparison must find that.
  int64_t compared = 0, wrong = 0;
  std::set<std::string> called;

  // Of an output that `expected` gives before it is rounded. Sums are in fp32, or in fp64.
  // `summand`: the largest of what is summed up, where little may be left of it.
  void compare(const std::string& what, Tensor& found, const Values& expected, double summand = 0) {
    const Format& f = format(found.dtype());
    const double unit = std::ldexp(1.0, -1 - f.mantissa);
    const double sums = found.dtype() == kDouble ? 1e-13 : 1e-5;
    double largest = summand, worst = 0;
    for (const double y : expected) largest = std::max(largest, std::fabs(y));
    if (spoil && found.count() > 0) {
      const int64_t last = found.count() - 1;
      found.set(last, found.get(last) + std::max(largest, 1.0));
    }
    bool right = static_cast<int64_t>(expected.size()) == found.count();
    for (int64_t i = 0; right && i < found.count(); ++i) {
      const double error = std::fabs(found.get(i) - expected[i]);
      const double share = error / (1.01 * unit * std::fabs(expected[i]) + sums * largest + 1e-300);
      worst = std::isnan(share) ? INFINITY : std::max(worst, share);
    }
    tell(what + ", " + f.name, right && worst <= 1, worst);
    around(what + ", " + f.name, found);
  }

  void around(const std::string& what, Tensor& found) {
    if (spoil) found.write_before();
    tell("around " + what, found.guarded(), 0);
  }

  void same(const std::string& what, bool equal) { tell(what, equal != spoil, 0); }

  void tell(const std::string& what, bool right, double worst) {
    ++compared;
    if (right) return;
    ++wrong;
    printf("wrong on %s with %d threads: %s (%.3g of what is allowed)\n",
           vovnet_fast::cpu::isa().c_str(), threads, what.c_str(), worst);
  }
};

inline std::string words(const Shape& s) {
  return std::to_string(s.n) + "x" + std::to_string(s.h) + "x" + std::to_string(s.w) + "x" +
         std::to_string(s.c);
}

inline constexpr int32_t kAll[] = {kHalf, kBrain, kSingle, kDouble};
// Numbers of channels that fill no vector, single rows and columns, odd sizes.
inline const Shape kShapes[] = {
    {2, 5, 7, 3}, {1, 9, 11, 33}, {2, 1, 5, 20}, {1, 8, 2, 17}, {1, 6, 6, 16}};

// In cpu_driver_passes.cpp.
void check_epilogue(Report& report);
void check_accumulate(Report& report);
void check_gates(Report& report);
void check_batch_norm(Report& report);
void check_pack(Report& report);

}  // namespace driver

// Calls an op, and notes that it was.
#define VF_CALL(op, params) \
  (report.called.insert(#op), vovnet_fast::cpu::op(params, report.threads))
