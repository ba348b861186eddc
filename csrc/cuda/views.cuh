// Views on the device: their elements, whether vectors fit, and how pixels are counted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../params.h"
#include "platform.cuh"
#include "vectors.cuh"

namespace vovnet_fast {
namespace cuda {

// The elements of channel `c` of image `n` of a view.
template <class T>
VF_DEVICE T* image(const View& view, int64_t n, int64_t c) {
  return static_cast<T*>(view.data) + n * view.stride_n + c;
}

VF_DEVICE int64_t offset(const View& view, int h, int w) {
  return h * view.stride_h + w * view.stride_w;
}

// Whether vectors of `bytes` may be read, or written, at every V-th channel of every pixel. An
// absent view has no say.
inline bool vectors_fit(const View& view, int vector, int64_t bytes) {
  if (view.data == nullptr) return true;
  return reinterpret_cast<uintptr_t>(view.data) % bytes == 0 && view.stride_n % vector == 0 &&
         view.stride_h % vector == 0 && view.stride_w % vector == 0;
}

template <class T>
bool vectors_fit(std::initializer_list<View> views) {
  return std::all_of(views.begin(), views.end(), [](const View& view) {
    return vectors_fit(view, kVector<T>, kVector<T> * sizeof(T));
  });
}

// Height and width of an image, by which pixels are counted.
struct Size {
  int height, width;

  VF_HD int pixels() const { return height * width; }
};

// Raises: an image has more pixels than are counted.
inline Size checked_size(const char* op, int64_t height, int64_t width) {
  // With room for a border, and for the numbers of threads that find no pixel left.
  if ((height + 2) * (width + 2) > int64_t{1} << 30) {
    throw std::invalid_argument(std::string(op) + ": images may have up to 2^30 pixels, got " +
                                std::to_string(height) + " x " + std::to_string(width) +
                                ": cut them into tiles");
  }
  return {static_cast<int>(height), static_cast<int>(width)};
}

// The size of images whose pixels nothing but a stride tells apart, if every view allows it: one
// row, whose pixels need no division.
inline Size collapsed(Size size, std::initializer_list<View> views) {
  const bool raster = std::all_of(views.begin(), views.end(), [&](const View& view) {
    return view.data == nullptr || size.height == 1 || view.stride_h == size.width * view.stride_w;
  });
  return raster ? Size{1, size.pixels()} : size;
}

// Row and column of a pixel.
struct Pixel {
  int h, w;
};

VF_DEVICE Pixel pixel_at(const Size& size, int index) {
  if (size.height == 1) return {0, index};
  const int h = static_cast<int>(static_cast<unsigned>(index) / static_cast<unsigned>(size.width));
  return {h, index - h * size.width};
}

}  // namespace cuda
}  // namespace vovnet_fast
