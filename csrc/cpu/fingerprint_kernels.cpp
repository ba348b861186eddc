// Digests of chunks of memory, at the speed at which it is read.
//
// A chunk is read in stripes of eight words, each of which goes into its lane of two rows of sums:
// as a digit of a number in base three, and as the product of the halves of the word and a key of
// its place, as in XXH3 (https://github.com/Cyan4973/xxHash). After every block of stripes both are
// scrambled, one to one. So one word that differs is always found, and words that have changed
// places are found twice.
#include "fingerprint.h"
#include "loops.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

constexpr int kWords = 8, kStripes = 16;
constexpr int64_t kStripeBytes = kWords * 8;

typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
constexpr int kLanesOfWords = kVectorBytes / 8, kGroups = kWords / kLanesOfWords;

// Random numbers (SplitMix64), the last two rows for scrambling.
struct Keys {
  uint64_t of[kStripes + 2][kWords];
  constexpr Keys() : of() {
    uint64_t state = 0;
    for (auto& row : of) {
      for (uint64_t& key : row) {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        key = z ^ z >> 31;
      }
    }
  }
};
alignas(64) constexpr Keys kKeys;

VF_HD Words load_words(const void* from) {
  Words words;
  memcpy(&words, from, sizeof words);
  return words;
}

// The low half of each word times its high half.
VF_HD Words multiply_halves(Words x) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)x, (__m512i)(x >> 32));
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)x, (__m256i)(x >> 32));
#else
  return (x & 0xffffffff) * (x >> 32);
#endif
}

struct Sums {
  Words digits[kGroups], products[kGroups];
};

// Two blocks ahead memory is asked for: a processor itself begins anew at each page, which took a
// fifth of the time of reading what is in no cache. Behind a chunk nothing is read so.
constexpr int64_t kAhead = 2 * kStripes * kStripeBytes;

VF_HD void add_stripe(Sums& sums, const char* stripe, const uint64_t* keys) {
  // (An address, since a pointer must not point there.)
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(stripe) + kAhead));
  for (int g = 0; g < kGroups; ++g) {
    const Words data = load_words(stripe + g * kVectorBytes);
    sums.digits[g] += (sums.digits[g] << 1) + data;
    sums.products[g] += multiply_halves(data ^ load_words(keys + g * kLanesOfWords));
  }
}

VF_HD void scramble(Words& sum, const uint64_t* keys) {
  sum ^= sum >> 47;
  sum = (sum ^ load_words(keys)) * 0x9e3779b1;
}

VF_HD void scramble(Sums& sums) {
  for (int g = 0; g < kGroups; ++g) {
    scramble(sums.digits[g], kKeys.of[kStripes] + g * kLanesOfWords);
    scramble(sums.products[g], kKeys.of[kStripes + 1] + g * kLanesOfWords);
  }
}

VF_HD cpu::Digest digest(const cpu::Piece& chunk) {
  Sums sums{};
  const char* data = static_cast<const char*>(chunk.data);
  int64_t left = chunk.bytes;
  for (; left >= kStripes * kStripeBytes; left -= kStripes * kStripeBytes) {
    for (int i = 0; i < kStripes; ++i, data += kStripeBytes) add_stripe(sums, data, kKeys.of[i]);
    scramble(sums);
  }
  int i = 0;
  for (; left >= kStripeBytes; left -= kStripeBytes, data += kStripeBytes) {
    add_stripe(sums, data, kKeys.of[i++]);
  }
  char last[kStripeBytes] = {};
  memcpy(last, data, static_cast<size_t>(left));
  add_stripe(sums, last, kKeys.of[i]);
  scramble(sums);

  uint64_t words[2][kWords];
  memcpy(words[0], sums.digits, sizeof words[0]);
  memcpy(words[1], sums.products, sizeof words[1]);
  const auto bytes = static_cast<uint64_t>(chunk.bytes);
  cpu::Digest found{bytes, ~bytes};
  for (int w = 0; w < kWords; ++w) {
    found.first = cpu::mix(cpu::mix(found.first, words[0][w]), words[1][w]);
    found.second = cpu::mix(cpu::mix(found.second, words[1][w]), words[0][kWords - 1 - w]);
  }
  return found;
}

}  // namespace

void digests(const cpu::Piece* chunks, int64_t count, int64_t bytes, int threads,
             cpu::Digest* out) {
  parallel(count, bytes / 4, threads, [&](int64_t i) { out[i] = digest(chunks[i]); });
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
