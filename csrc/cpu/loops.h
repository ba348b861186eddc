// How kernels go over images, and over dtypes.
//
// Work is divided into shares of pixels whose size does not depend on the number of threads, so
// neither does any sum.
#pragma once

#include <cstdint>

#include "threads.h"
#include "vector.h"

namespace vovnet_fast {

namespace cpu {
[[noreturn]] void refuse_dtype(int32_t dtype);
}

inline namespace VF_ISA {

// Below so many elements other threads cost more than they help.
constexpr int64_t kGrain = 1 << 15;

// Pixels that a kernel has in hand at a time: few enough streams for the prefetchers, and sums in
// two levels.
constexpr int kBlock = 4;

template <class T>
VF_HD T least(T a, T b) {
  return a < b ? a : b;
}

// body(i) for i in [0, count), shared among threads; `elements` is how many there are in all.
template <class Body>
VF_HD void parallel(int64_t count, int64_t elements, int threads, Body body) {
  if (threads <= 1 || elements < kGrain) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  on_threads(threads, [&](int index, int team) {
    for (int64_t share = index; share < threads; share += team) {
      const int64_t last = count * (share + 1) / threads;
      for (int64_t i = count * share / threads; i < last; ++i) body(i);
    }
  });
}

// body(T{}) with the storage type that a code stands for, of those that are computed with in fp32.
template <class Body>
VF_HD void with_float(int32_t dtype, Body body) {
  switch (dtype) {
    case kFloat16:
      return body(float16{});
    case kBFloat16:
      return body(bfloat16{});
    case kFloat32:
      return body(float{});
    default:
      cpu::refuse_dtype(dtype);
  }
}

// The same with any storage type.
template <class Body>
VF_HD void with_dtype(int32_t dtype, Body body) {
  dtype == kFloat64 ? body(double{}) : with_float(dtype, body);
}

// The same for sums, which are in fp32 or fp64.
template <class Body>
VF_HD void with_high(int32_t dtype, Body body) {
  switch (dtype) {
    case kFloat32:
      return body(float{});
    case kFloat64:
      return body(double{});
    default:
      cpu::refuse_dtype(dtype);
  }
}

// A range of the pixels of one image.
struct Share {
  int64_t image, index, first, last;
};

// body(share) for all shares of `size` pixels of n images.
template <class Body>
VF_HD void for_shares(int64_t n, int64_t pixels, int64_t size, int64_t c, int threads, Body body) {
  const int64_t shares = ceil_div(pixels, size);
  parallel(n * shares, n * pixels * c, threads, [&](int64_t i) {
    const int64_t first = i % shares * size;
    body(Share{i / shares, i % shares, first, least(first + size, pixels)});
  });
}

// body(share) for all pixels of n images, in an op that only passes over them: as many for every
// thread, and in ops that follow each other the same part of the images. `each`: numbers that come
// or go with a pixel.
template <class Body>
VF_HD void for_pass(int64_t n, int64_t pixels, int64_t each, int threads, Body body) {
  const int64_t all = n * pixels, parts = threads < 1 || all * each < kGrain ? 1 : threads;
  parallel(parts, all * each, threads, [&](int64_t i) {
    const int64_t end = all * (i + 1) / parts;
    for (int64_t next = all * i / parts; next < end;) {
      const int64_t image = next / pixels, first = image * pixels;
      const int64_t last = least(end, first + pixels);
      body(Share{image, i, next - first, last - first});
      next = last;
    }
  });
}

struct Pixel {
  int64_t h, w;
};

template <int kCount>
struct Fixed {
  static constexpr int value = kCount;
};

// body(pixels, Fixed<P>) for all pixels of a share in order, P = kBlock of them at a time; the last
// few one by one.
template <class Body>
VF_HD void for_pixels(const Share& share, int64_t width, Body body) {
  Pixel block[kBlock];
  Pixel next{share.first / width, share.first % width};
  int64_t left = share.last - share.first;
  while (left > 0) {
    const int count = static_cast<int>(least<int64_t>(left, kBlock));
    for (int i = 0; i < count; ++i) {
      block[i] = next;
      if (++next.w == width) next = {next.h + 1, 0};
    }
    if (count == kBlock) {
      body(block, Fixed<kBlock>{});
    } else {
      for (int i = 0; i < count; ++i) body(block + i, Fixed<1>{});
    }
    left -= count;
  }
}

// body(pixel) for all pixels of a share in order.
template <class Body>
VF_HD void for_each_pixel(const Share& share, int64_t width, Body body) {
  Pixel next{share.first / width, share.first % width};
  for (int64_t i = share.first; i < share.last; ++i) {
    body(next);
    if (++next.w == width) next = {next.h + 1, 0};
  }
}

// body(first, count) for the rows of a share, or what it has of them.
template <class Body>
VF_HD void for_rows(const Share& share, int64_t width, Body body) {
  Pixel first{share.first / width, share.first % width};
  for (int64_t left = share.last - share.first; left > 0;) {
    const int64_t count = least(left, width - first.w);
    body(first, count);
    left -= count;
    first = {first.h + 1, 0};
  }
}

// Pointer to the first channel of a pixel.
template <class T>
VF_HD T* at(const View& view, int64_t n, Pixel pixel) {
  return static_cast<T*>(view.data) + n * view.stride_n + pixel.h * view.stride_h +
         pixel.w * view.stride_w;
}

// Pointers to the first channels of several pixels.
template <class T, int kCount>
struct Pointers {
  T* to[kCount];
  VF_HD Pointers(const View& view, int64_t n, const Pixel* pixels) {
    for (int i = 0; i < kCount; ++i) to[i] = at<T>(view, n, pixels[i]);
  }
  VF_HD T* operator[](int i) const { return to[i]; }
};

// out[k] = sum over rows r of rows[r, k] / divisor, summed in fp64, for `columns` of them that lie
// `stride` apart.
template <class Number>
VF_HD void sum_rows(const Number* rows, int64_t count, int64_t stride, int64_t columns,
                    double divisor, Number* out) {
  for_channels<double>(columns, [&](int64_t k, auto span) VF_LAMBDA {
    Vector<double> sum{};
    for (int64_t r = 0; r < count; ++r) sum += load_double(rows + r * stride + k, span);
    store_double(out + k, sum / broadcast<double>(divisor), span);
  });
}

// The sums of packed rows, on several threads, each with some of the columns.
template <class Number>
VF_HD void sum_packed_rows(const Number* rows, int64_t count, int64_t columns, int threads,
                           Number* out) {
  constexpr int64_t kColumns = 64;
  parallel(ceil_div(columns, kColumns), count * columns, threads, [&](int64_t i) {
    const int64_t first = i * kColumns;
    sum_rows(rows + first, count, columns, least(kColumns, columns - first), 1.0, out + first);
  });
}

// An op without outputs, or with sums over nothing.
template <class Number>
VF_HD void zero(Number* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = 0;
}

// Memory for a while. (std::vector's functions have one name for all instruction sets.)
template <class Number>
class Scratch {
 public:
  explicit VF_HD Scratch(int64_t count) : data_(new Number[count]) {}
  VF_HD ~Scratch() { delete[] data_; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  VF_HD Number* data() const { return data_; }

 private:
  Number* data_;
};

}  // namespace VF_ISA
}  // namespace vovnet_fast
