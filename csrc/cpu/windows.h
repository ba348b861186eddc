// Windows of 3x3 inputs, gone over side by side.
#pragma once

#include "loops.h"

namespace vovnet_fast {
inline namespace VF_ISA {

// Outputs that lie side by side in a row: what their windows have in common is loaded once.
constexpr int kAtOnce = 4;

// Columns of the input that their windows have, from the first one's first on.
template <int kStride>
constexpr int kColumns = (kAtOnce - 1) * kStride + 3;

// Those of them that lie inside the input, of which the windows begin at `start`.
template <int kStride>
VF_HD Taps columns_inside(int64_t start, int64_t width) {
  return {start < 0 ? static_cast<int>(-start) : 0,
          static_cast<int>(least<int64_t>(kColumns<kStride>, width - start))};
}

// take(output, tap, values) for a row of the windows, column by column; tap is one of the row's
// three. `x` is where the first column inside lies. kEdges: not all of them may be.
template <class T, int kStride, bool kEdges, class Span, class Take>
VF_HD void take_columns(const T* x, int64_t step, Taps inside, Span span, Take take) {
#pragma GCC unroll 16
  for (int column = 0; column < kColumns<kStride>; ++column) {
    if (kEdges && (column < inside.first || column >= inside.last)) continue;
    const auto values = load(x + (kEdges ? column - inside.first : column) * step, span);
#pragma GCC unroll 3
    for (int tap = 0; tap < 3; ++tap) {
      const int output = (column - tap) / kStride;
      if (column < tap || (column - tap) % kStride != 0 || output >= kAtOnce) continue;
      take(output, tap, values);
    }
  }
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
