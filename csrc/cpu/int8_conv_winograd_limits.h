// What Winograd's convolution of bytes may be given, and how large its packed weight is.
#pragma once

#include <cstdint>

#include "../math.h"

namespace vovnet_fast {

// A packed weight begins with a line that holds, as an int64_t, the largest sum of an output
// channel's weights of one sign, absolutely: times the levels, no output is beyond it.
constexpr int64_t kWinogradHeaderBytes = 64;

// Outputs are less, without their bias.
constexpr int64_t kWinogradMost = int64_t{1} << 25;

// Behind the line: [point][C_out / 16][C_in / 32][1 KiB].
inline int64_t winograd_tiles_bytes(int64_t c_out, int64_t c_in) {
  return 36 * ceil_div(c_out, int64_t{16}) * ceil_div(c_in, int64_t{32}) * 1024;
}

}  // namespace vovnet_fast
