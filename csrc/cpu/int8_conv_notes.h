// What the weights of a tile are at most, for the engine that sums products in 16 bits.
//
// vpmaddubsw makes two products of a byte and a weight, and their sum, in 16 bits, which hold it
// for 127 levels whatever the weights are. Most are far from 127: then the sums of a few units (of
// four channels) in a row fit as well, and are widened to 32 bits together. Whether they do, for
// any steps, is known from the weights: a sum lies between the levels times its negative weights
// and the levels times its positive ones.
//
// Notes lie before the tiles of a packed weight, the first one last: that of a tile is found from
// where it is.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv_plan.h"

namespace vovnet_fast {
inline namespace VF_ISA {

// The largest sums of weights of one sign, absolutely, whose products make one sum in 16 bits of so
// many units.
struct Notes {
  uint16_t of_two, of_four;
};

VF_HD int64_t notes_bytes(int64_t c_out, int64_t kernel, int64_t c_in) {
  const auto plan = conv::divide({1, 1, c_in, c_out, kernel, 1}, conv::kChunkBytes);
  const int64_t bytes = plan.tiles * plan.chunks * conv::taps(plan) * int64_t{sizeof(Notes)};
  return ceil_div(bytes, conv::kChunkBytes) * conv::kChunkBytes;
}

VF_HD Notes notes_of(const char* tiles, const char* tile) {
  Notes notes;
  memcpy(&notes, tiles - ((tile - tiles) / conv::kTileBytes + 1) * int64_t{sizeof(Notes)},
         sizeof notes);
  return notes;
}

VF_HD uint16_t larger(uint16_t x, uint16_t y) { return x > y ? x : y; }

VF_HD Notes larger(Notes x, Notes y) {
  return {larger(x.of_two, y.of_two), larger(x.of_four, y.of_four)};
}

// Of one tile, [unit][output][4].
VF_HD Notes notes_on(const int8_t* tile) {
  constexpr int kMost = 4;  // units
  Notes notes{};
  uint16_t* const of[] = {&notes.of_two, &notes.of_four};
  for (int output = 0; output < conv::kTileChannels; ++output) {
    for (int pair = 0; pair < 4; pair += 2) {
      for (int first = 0; first < conv::kUnits; first += kMost) {
        for (int which = 0; which < 2; ++which) {
          const int units = 2 << which;
          for (int unit = first; unit < first + kMost; unit += units) {
            uint16_t sums[2] = {};
            for (int i = 0; i < 2 * units; ++i) {
              const int w =
                  tile[((unit + i / 2) * conv::kTileChannels + output) * 4 + pair + i % 2];
              sums[w < 0] = static_cast<uint16_t>(sums[w < 0] + (w < 0 ? -w : w));
            }
            *of[which] = larger(*of[which], larger(sums[0], sums[1]));
          }
        }
      }
    }
  }
  return notes;
}

// Before the tiles of a packed weight.
VF_HD void take_notes(const Int8ConvPackParams& p, void* tiles) {
  const auto plan = conv::divide({1, 1, p.c_in, p.c_out, p.kernel, 1}, conv::kChunkBytes);
  auto* first = static_cast<char*>(tiles);
  memset(p.out, 0, static_cast<size_t>(first - static_cast<char*>(p.out)));
  for (int64_t i = 0; i < plan.tiles * plan.chunks * conv::taps(plan); ++i) {
    const Notes notes = notes_on(reinterpret_cast<const int8_t*>(first) + i * conv::kTileBytes);
    memcpy(first - (i + 1) * int64_t{sizeof notes}, &notes, sizeof notes);
  }
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
