// Convolution in eight bits by what every processor with AVX2 has, and that of images.
#if defined(__AVX2__)

#include "conv_registers.h"
#include "int8_conv_notes.h"
#include "int8_conv_store.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

#ifdef __AVX512F__
using Register = __m512i;
VF_HD Register add_pairs(Register x, Register y) { return _mm512_maddubs_epi16(x, y); }
VF_HD Register multiply_add_pairs(Register x, Register y) { return _mm512_madd_epi16(x, y); }
VF_HD Register ones() { return _mm512_set1_epi16(1); }
#else
using Register = __m256i;
VF_HD Register add_pairs(Register x, Register y) { return _mm256_maddubs_epi16(x, y); }
VF_HD Register multiply_add_pairs(Register x, Register y) { return _mm256_madd_epi16(x, y); }
VF_HD Register ones() { return _mm256_set1_epi16(1); }
#endif

VF_HD Register even_bytes(Register x) { return (Register)((Ints)x & 0x00ff00ff); }
VF_HD Register odd_bytes(Register x) { return (Register)((Ints)x & ~0x00ff00ff); }

VF_HD Register add_words(Register x, Register y) {
#ifdef __AVX512F__
  return _mm512_add_epi16(x, y);
#else
  return _mm256_add_epi16(x, y);
#endif
}

struct Integers32 {
  using Sum = int32_t;
  static constexpr bool kTrim = true;
};

// One product at a time: of more levels two may not fit into 16 bits.
struct Singles : Integers32 {
  using Packed = uint8_t;
  static VF_HD Ints multiply(Floats pixel, Floats weights, Ints sums) {
    const Register even = add_pairs((Register)pixel, even_bytes((Register)weights));
    const Register odd = add_pairs((Register)pixel, odd_bytes((Register)weights));
    sums += (Ints)multiply_add_pairs(even, ones());
    return sums + (Ints)multiply_add_pairs(odd, ones());
  }
};

// The products of some units in a row are summed in 16 bits, pair by pair, before they are widened.
template <int kUnitsOfSum, int kPixels, int kVectors>
VF_HD void multiply_words(const float* pixels, const char* weight, int64_t tile_step, int first,
                          int last, conv::Sums<int32_t, kPixels, kVectors>& sum) {
  constexpr int kPerTile = 16 / kLanes<float>;
  for (int k = first; k < last; k += kUnitsOfSum) {
    const char* rows = weight + k * conv::kChunkBytes;
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
      asm("" : "+r"(rows));  // The rows of all units would not fit into registers.
      Register words[kVectors];
#pragma GCC unroll 4
      for (int u = 0; u < kUnitsOfSum; ++u) {
        const auto pixel = (Register)same(pixels[i * 16 + k + u]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const char* tile = rows + v / kPerTile * tile_step;
          const auto* row = reinterpret_cast<const float*>(tile) + u * 16;
          const auto weights = (Register)load(row + v % kPerTile * kLanes<float>, Full{});
          const Register pairs = add_pairs(pixel, weights);
          words[v] = u == 0 ? pairs : add_words(words[v], pairs);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] += (Ints)multiply_add_pairs(words[v], ones());
    }
  }
}

// Of as many units at a time as the weights allow (Notes), and of one in any case: a pair of
// products is at most 2 * 127 * 127.
constexpr int kPairsLevels = 127;

struct Pairs : Integers32 {
  using Packed = uint8_t;
  static constexpr bool kOwnChunks = true;
  static constexpr int kMost = 32767 / kPairsLevels;

  template <int kPixels, int kVectors>
  static VF_HD void multiply_chunk(const conv::Block& block, const float* pixels,
                                   const char* weight, int units,
                                   conv::Sums<int32_t, kPixels, kVectors>& sum) {
    Notes notes = notes_of(block.weights, weight);
    if constexpr (kVectors * kLanes<float> > conv::kTileChannels) {
      notes = larger(notes, notes_of(block.weights, weight + block.tile_step));
    }
    int done = 0;
    if (notes.of_four <= kMost) {
      done = units / 4 * 4;
      multiply_words<4, kPixels, kVectors>(pixels, weight, block.tile_step, 0, done, sum);
    } else if (notes.of_two <= kMost) {
      done = units / 2 * 2;
      multiply_words<2, kPixels, kVectors>(pixels, weight, block.tile_step, 0, done, sum);
    }
    multiply_words<1, kPixels, kVectors>(pixels, weight, block.tile_step, done, units, sum);
  }
};

struct Words : Integers32 {
  using Packed = int16_t;
  static VF_HD Ints multiply(Floats pixel, Floats weights, Ints sums) {
    return sums + (Ints)multiply_add_pairs((Register)pixel, (Register)weights);
  }
};

}  // namespace

void int8_conv_maddubs(const Int8ConvParams& p, int threads) {
  Int8ConvParams behind = p;
  behind.tiles = static_cast<const char*>(p.tiles) + notes_bytes(p.c_out, p.kernel, p.c_in);
  if (p.levels <= kPairsLevels) {
    conv::run<conv::Registers<Pairs>, uint8_t>(behind, threads);
  } else {
    conv::run<conv::Registers<Singles>, uint8_t>(behind, threads);
  }
}

void int8_conv_pack_maddubs(const Int8ConvPackParams& p, int threads) {
  Int8ConvPackParams behind = p;
  behind.out = static_cast<char*>(p.out) + notes_bytes(p.c_out, p.kernel, p.c_in);
  conv::pack<int8_t>(behind, threads);
  take_notes(p, behind.out);
}

void int8_conv_words(const Int8ConvParams& p, int threads) {
  if (p.kind == kWords) {
    conv::run<conv::Registers<Words>, int16_t>(p, threads);
  } else if (p.kind == kSignedBytes) {
    conv::run<conv::Registers<Words>, int8_t>(p, threads);
  } else {
    conv::run<conv::Registers<Words>, uint8_t>(p, threads);
  }
}

void int8_conv_pack_words(const Int8ConvPackParams& p, int threads) {
  conv::pack<int16_t>(p, threads);
}

}  // namespace VF_ISA
}  // namespace vovnet_fast

#endif
