// What memory holds, in 128 bits: by them it is recognised when it is looked at again.
//
// No change that an accident could make leaves them as they are. They are no protection against
// somebody who looks for such a change.
#pragma once

#include <cstdint>
#include <vector>

namespace vovnet_fast {
namespace cpu {

struct Piece {
  const void* data;
  int64_t bytes;
};

struct Digest {
  uint64_t first, second;
};

// Of pieces of memory in this order; where they lie makes no difference. On `threads` threads; the
// result depends neither on how many they are, nor on the instruction set.
Digest fingerprint(const std::vector<Piece>& pieces, int threads);

// One digest a chunk, of as many bytes as a chunk has at most, on the instruction set in use.
constexpr int64_t kChunkBytes = 1 << 16;
void digests(const Piece* chunks, int64_t count, int64_t bytes, int threads, Digest* out);

// Takes a word into a state. For each word it is one to one, so that states that differ stay
// different, and for each state as well.
inline __attribute__((always_inline)) uint64_t mix(uint64_t state, uint64_t word) {
  state = (state ^ word) * 0x9fb21c651e98df25;
  return state ^ state >> 32;
}

}  // namespace cpu
}  // namespace vovnet_fast
