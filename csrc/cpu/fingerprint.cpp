// Fingerprints of memory: into chunks, and together again.
#include "fingerprint.h"

namespace vovnet_fast {
namespace cpu {

Digest fingerprint(const std::vector<Piece>& pieces, int threads) {
  std::vector<Piece> chunks;
  int64_t bytes = 0;
  for (const Piece& piece : pieces) {
    bytes += piece.bytes;
    for (int64_t at = 0; at < piece.bytes; at += kChunkBytes) {
      const int64_t left = piece.bytes - at;
      chunks.push_back(
          {static_cast<const char*>(piece.data) + at, left < kChunkBytes ? left : kChunkBytes});
    }
  }
  std::vector<Digest> found(chunks.size());
  digests(chunks.data(), static_cast<int64_t>(chunks.size()), bytes, threads, found.data());
  Digest all{pieces.size(), static_cast<uint64_t>(bytes)};
  for (const Digest& one : found) {
    all.first = mix(all.first, one.first);
    all.second = mix(all.second, one.second);
  }
  return all;
}

}  // namespace cpu
}  // namespace vovnet_fast
