// Where everything lies in the depthwise 3x3 with its 1x1: what comes on top of
// ../conv_sm80/layout.h.
//
// Plain arithmetic for host and device.
//
// Strips are those of a 3x3 convolution, weights those of a 1x1. Between them lie the pixels that
// the depthwise convolution makes of a strip: rows like those of a strip without a halo, twice, as
// one half is multiplied while the other is made.
#pragma once

#include "../conv_sm80/layout.h"

namespace vovnet_fast {
namespace depthwise_conv {

using conv_sm80::kRowBytes;
using conv_sm80::kThreads;
using conv_sm80::kUnits;

constexpr int kPixels = 128;  // of a tile
constexpr int kTaps = 9;
constexpr int kRun = kPixels / (kThreads / kUnits);  // Pixels, one below the other, of a thread.
constexpr int kMinStages = 2, kMaxStages = 3;

// f(output channels of a tile): those of published networks, and what their multiples are made of.
// Tests compile a few of them.
#ifdef VF_CONV_SM80_FEW
#define VF_DEPTHWISE_CONV_TILES(f) f(64) f(80) f(128) f(224)
#else
#define VF_DEPTHWISE_CONV_TILES(f) f(64) f(80) f(96) f(112) f(128) f(160) f(192) f(224)
#endif

// All that the kernel is told: the strips of a 3x3 and the weights of a 1x1, and the depthwise
// ones. `taps` of the former is 1: a step is a chunk of the channels.
struct Problem : conv_sm80::Problem {
  const char* depthwise;  // of a tap of all channels there are tap_bytes
};

// The row of a strip that the first tap of the first pixel of a run reads,
VF_HD int run_row(const Problem& p, int line, int column) {
  return line * p.stride * p.pitch + column;
}

// ---- Shared memory -----------------------------------------------------------------------------

// Pixels that the depthwise convolution has made, of even chunks and of odd ones.
VF_HD uint32_t pixels_at(const Problem& p, int block_out, int chunk) {
  return conv_sm80::weights_at(p, block_out, p.stages) +
         static_cast<uint32_t>((chunk & 1) * kPixels * kRowBytes);
}

// Rows of taps.
VF_HD uint32_t taps_at(const Problem& p, int block_out, int stage) {
  return pixels_at(p, block_out, 0) +
         static_cast<uint32_t>((2 * kPixels + stage * kTaps) * kRowBytes);
}

// Sums of the warps, conv_sm80::sums_at, take the place of strips, the smallest of which are
// larger.
inline uint32_t shared_bytes(const Problem& p, int block_out) {
  return taps_at(p, block_out, p.stages);
}

}  // namespace depthwise_conv
}  // namespace vovnet_fast
