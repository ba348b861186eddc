// Patches of an image: what a 3x3 filter meets of three channels, in a row of shared memory.
//
// Pixels of three channels are no whole units of 16 bytes, and nine taps of three channels each
// would leave most of a product empty. So the 27 numbers of an output pixel are gathered into one
// row, as those of a filter lie, with five zeros: the convolution is then one of a single tap and
// 32 channels. An image is read about seven times, but for the first time from L1.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../dtypes.h"
#include "device.cuh"
#include "layout.h"

namespace vovnet_fast {
namespace conv_sm80 {

constexpr int kImageChannels = 3;
constexpr int kPatch = 9 * kImageChannels;  // Numbers of a patch,
constexpr int kPatchChannels = 32;          // and with zeros.
constexpr int kPatches = 0;                 // What stands for a kernel of 3 on patches.

// Unit `unit` of the patch whose first tap is at line `top` and column `left`; zeros outside the
// image, and all zeros where the patch is not `wanted`.
template <class T>
VF_DEVICE void patch_unit(uint32_t (&words)[4], const char* image, const Pitches& pitch, int top,
                          int left, int height, int width, int unit, bool wanted) {
  constexpr int kEach = kUnitBytes / sizeof(T);
  T numbers[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int k = unit * kEach + i, tap = k / kImageChannels, channel = k - tap * kImageChannels;
    const int h = top + tap / 3, w = left + tap % 3;
    const bool inside = wanted && k < kPatch &&
                        static_cast<unsigned>(h) < static_cast<unsigned>(height) &&
                        static_cast<unsigned>(w) < static_cast<unsigned>(width);
    const char* at = image + h * pitch.h + w * pitch.w + channel * static_cast<int>(sizeof(T));
    numbers[i] = inside ? *reinterpret_cast<const T*>(at) : narrow<T>(0.f);
  }
  memcpy(words, numbers, sizeof words);
}

// The same of a row of weights, [C_out, 3, 3, 3] packed.
template <class T>
VF_DEVICE void filter_unit(uint32_t (&words)[4], const char* filter, int unit, bool wanted) {
  constexpr int kEach = kUnitBytes / sizeof(T);
  T numbers[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int k = unit * kEach + i;
    numbers[i] = wanted && k < kPatch ? reinterpret_cast<const T*>(filter)[k] : narrow<T>(0.f);
  }
  memcpy(words, numbers, sizeof words);
}

}  // namespace conv_sm80
}  // namespace vovnet_fast
