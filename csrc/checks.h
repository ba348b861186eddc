// What the fields of the structs of params.h must hold before anything follows their pointers.
//
// The functions throw std::invalid_argument, or std::overflow_error for numbers beyond what memory
// can have, and name the field, what was expected and what came. How much memory lies behind a
// pointer nobody here can know: whoever calls answers for it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "fields.h"
#include "math.h"

namespace vovnet_fast {
namespace checks {

using Extents = std::initializer_list<int64_t>;

constexpr int64_t kSizeLimit = int64_t{1} << 40;   // of an extent
constexpr int64_t kCountLimit = int64_t{1} << 50;  // of elements: a few times as many fit 64 bits
constexpr int64_t kBytesLimit = int64_t{1} << 47;  // from the first byte of a tensor to its last
constexpr uintptr_t kFirstPage = 4096;             // never mapped: a null pointer and an offset
constexpr int kMaxThreads = 4096;
constexpr int64_t kTilesAlignment = 64;  // of packed weights
constexpr bool kOptional = true;

[[noreturn]] inline void refuse(const std::string& name, const std::string& expected,
                                const std::string& got) {
  throw std::invalid_argument(name + " must be " + expected + ", got " + got);
}

[[noreturn]] inline void overflow(const std::string& name, Extents sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  throw std::overflow_error(name + " must be a tensor that memory has room for, got extents (" +
                            text + ")");
}

inline void same(const char* name, int64_t value, int64_t expected) {
  if (value != expected) refuse(name, std::to_string(expected), std::to_string(value));
}

inline void choice(const char* name, int64_t value, Extents known) {
  std::string text;
  for (const int64_t one : known) {
    if (value == one) return;
  }
  for (const int64_t one : known) text += (text.empty() ? "" : ", ") + std::to_string(one);
  refuse(name, "one of " + text, std::to_string(value));
}

inline void extent(const char* name, int64_t value) {
  if (value < 0) refuse(name, "at least 0", std::to_string(value));
  if (value >= kSizeLimit) {
    throw std::overflow_error(std::string(name) + " must be less than 2^40, got " +
                              std::to_string(value));
  }
}

inline void threads(int count) {
  if (count < 1 || count > kMaxThreads) {
    refuse("threads", "from 1 to " + std::to_string(kMaxThreads), std::to_string(count));
  }
}

// How many elements, of extents that were looked at. That of others must not overflow if one is 0.
inline int64_t count(const char* name, Extents sizes) {
  int64_t all = 1;
  bool empty = false;
  for (const int64_t size : sizes) {
    empty |= size == 0;
    if (size != 0 && (__builtin_mul_overflow(all, size, &all) || all >= kCountLimit)) {
      overflow(name, sizes);
    }
  }
  return empty ? 0 : all;
}

// Bytes of an element.
inline int64_t bytes_of(const char* name, int32_t dtype) {
  switch (dtype) {
    case kFloat16:
    case kBFloat16:
      return 2;
    case kFloat32:
      return 4;
    case kFloat64:
      return 8;
    default:
      refuse(name, "the code of a dtype, from 0 to 3", std::to_string(dtype));
  }
}

// Bytes of an element of sums.
inline int64_t high_bytes(int64_t bytes) { return bytes == 8 ? 8 : 4; }

inline void address(const char* name, const void* data, int64_t alignment) {
  const auto first = reinterpret_cast<uintptr_t>(data);
  if (first == 0) refuse(name, "the address of a tensor", "None or 0");
  if (first < kFirstPage) refuse(name, "the address of a tensor", std::to_string(first));
  if (first % static_cast<uintptr_t>(alignment) != 0) {
    refuse(name, "an address that is a multiple of " + std::to_string(alignment),
           std::to_string(first));
  }
}

inline void memory(const char* name, const void* data, int64_t bytes, Extents sizes) {
  if (bytes > kBytesLimit ||
      reinterpret_cast<uintptr_t>(data) > UINTPTR_MAX - static_cast<uintptr_t>(bytes)) {
    overflow(name, sizes);
  }
}

// A packed tensor whose elements have `bytes` each, which is absent, or may be, where it has none.
inline void packed(const char* name, const void* data, int64_t bytes, Extents sizes,
                   bool optional = false, int64_t alignment = 1) {
  const int64_t elements = count(name, sizes);
  if (elements == 0 || (optional && data == nullptr)) return;
  address(name, data, alignment > bytes ? alignment : bytes);
  memory(name, data, elements * bytes, sizes);
}

inline void array(const char* name, const Array& array, Extents sizes, bool optional = false) {
  if (optional && array.data == nullptr) return;
  packed(name, array.data, bytes_of(name, array.dtype), sizes);
}

// Any four extents with their strides; strides of axes with one element do not matter.
inline void strided(const char* name, const void* data, int64_t bytes, Extents sizes,
                    Extents strides, bool optional = false) {
  const int64_t elements = count(name, sizes);
  if (elements == 0 || (optional && data == nullptr)) return;
  address(name, data, bytes);
  int64_t last = bytes;
  const int64_t* stride = strides.begin();
  for (const int64_t size : sizes) {
    int64_t step = 0;
    if (size > 1 && *stride < 0) {
      refuse(name, "a view whose strides are at least 0", std::to_string(*stride));
    }
    if (size > 1 && *stride >= kSizeLimit) {
      throw std::overflow_error(std::string(name) +
                                " must be a view whose strides are less than 2^40, got " +
                                std::to_string(*stride));
    }
    if (size > 1 && (__builtin_mul_overflow(*stride, (size - 1) * bytes, &step) ||
                     __builtin_add_overflow(last, step, &last))) {
      overflow(name, sizes);
    }
    ++stride;
  }
  memory(name, data, last, sizes);
}

struct Image {
  int64_t n, height, width, c;
};

inline void view(const char* name, const View& view, int64_t bytes, const Image& image,
                 bool optional = false) {
  strided(name, view.data, bytes, {image.n, image.height, image.width, image.c},
          {view.stride_n, view.stride_h, view.stride_w, 1}, optional);
}

// Pixels of the output of an op with padding, whose windows lie `stride` apart.
inline int64_t strided_size(int64_t size, int64_t stride) {
  return size == 0 ? 0 : (size - 1) / stride + 1;
}

// Output of windows that lie `stride` apart, padded so that the first pixel is in the middle.
template <class Params>
void strided_output(const Params& p) {
  choice("stride", p.stride, {1, 2});
  same("out_height", p.out_height, strided_size(p.height, p.stride));
  same("out_width", p.out_width, strided_size(p.width, p.stride));
}

template <class Params>
void pooled_output(const Params& p) {
  choice("pad", p.pad, {0, 1});
  same("out_height", p.out_height, p.pad == 0 ? p.height / 2 : strided_size(p.height, 2));
  same("out_width", p.out_width, p.pad == 0 ? p.width / 2 : strided_size(p.width, 2));
}

template <class Params>
Image input(const Params& p) {
  return {p.n, p.height, p.width, p.c};
}

template <class Params>
Image output(const Params& p) {
  return {p.n, p.out_height, p.out_width, p.c};
}

// Of a convolution, and as arguments of their own.
inline void filter_extents(int64_t c_out, int64_t kernel, int64_t c_in) {
  extent("c_out", c_out);
  extent("c_in", c_in);
  choice("kernel", kernel, {1, 3});
  count("weight", {c_out, kernel, kernel, c_in});
}

// Of a name in "a, b, c".
inline std::string name_at(const std::string& names, int index) {
  size_t first = 0;
  for (; index > 0; --index) first = names.find(", ", first) + 2;
  return names.substr(first, names.find(", ", first) - first);
}

// All extents, and strides that are fields of their own, whatever they belong to.
template <class Params>
void extents(Params& params) {
  Fields<Params>::visit(params, [](auto&... fields) {
    int index = 0;
    const auto each = [&](auto& field) {
      if constexpr (std::is_same_v<std::decay_t<decltype(field)>, int64_t>) {
        if (field < 0 || field >= kSizeLimit) {
          extent(name_at(Fields<Params>::kNames, index).c_str(), field);
        }
      }
      ++index;
    };
    (each(fields), ...);
  });
}

// Whether two pointers are given that belong together.
inline void together(const char* first, const void* a, const char* second, const void* b) {
  if ((a == nullptr) == (b == nullptr)) return;
  refuse(a == nullptr ? first : second,
         std::string("given where ") + (a == nullptr ? second : first) + " is", "None or 0");
}

// A layer's input, output and epilogue, which come in tiles, each with partials and statistics.
template <class Params>
void tiled_layer(const Params& p, int64_t bytes) {
  if (p.c_in < 1) refuse("c_in", "at least 1", std::to_string(p.c_in));
  for (const int32_t size : {p.tile_h, p.tile_w, p.block_out}) {
    if (size < 1 || size > 256) {
      refuse("tile_h, tile_w and block_out", "from 1 to 256", std::to_string(size));
    }
  }
  const Image out{p.n, p.out_height, p.out_width, p.c_out};
  const int64_t tiles = count("out", {ceil_div(out.height, static_cast<int64_t>(p.tile_h)),
                                      ceil_div(out.width, static_cast<int64_t>(p.tile_w))});
  together("scale", p.scale, "shift", p.shift);
  if (p.scale == nullptr && (p.pool_partials != nullptr || p.relu != 0)) {
    refuse("pool_partials and relu", "None and 0 where scale is None", "others");
  }
  view("x", p.x, bytes, {p.n, p.height, p.width, p.c_in});
  view("out", p.out, bytes, out);
  packed("scale", p.scale, 4, {p.c_out}, kOptional);
  packed("shift", p.shift, 4, {p.c_out}, kOptional);
  packed("pool_partials", p.pool_partials, 4, {p.n, tiles, p.c_out}, kOptional);
  packed("statistics", p.statistics, 4, {p.n, tiles, kStatisticsRows, p.c_out}, kOptional);
}

}  // namespace checks
}  // namespace vovnet_fast
