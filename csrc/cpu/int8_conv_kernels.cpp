// Convolution in eight bits by what every processor with AVX2 has, and that of images.
#if defined(__AVX2__)

#include "conv_registers.h"
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

struct Integers32 {
  using Sum = int32_t;
  static constexpr bool kTrim = true;
};

// Pairs of products are at most 2 * 127 * 127, which 16 bits hold: with at most 127 levels.
struct Pairs : Integers32 {
  using Packed = uint8_t;
  static VF_HD Ints multiply(Floats pixel, Floats weights, Ints sums) {
    const Register pairs = add_pairs((Register)pixel, (Register)weights);
    return sums + (Ints)multiply_add_pairs(pairs, ones());
  }
};

// With more levels only one product at a time fits.
struct Singles : Integers32 {
  using Packed = uint8_t;
  static VF_HD Ints multiply(Floats pixel, Floats weights, Ints sums) {
    const Register even = add_pairs((Register)pixel, even_bytes((Register)weights));
    const Register odd = add_pairs((Register)pixel, odd_bytes((Register)weights));
    sums += (Ints)multiply_add_pairs(even, ones());
    return sums + (Ints)multiply_add_pairs(odd, ones());
  }
};

struct Words : Integers32 {
  using Packed = int16_t;
  static VF_HD Ints multiply(Floats pixel, Floats weights, Ints sums) {
    return sums + (Ints)multiply_add_pairs((Register)pixel, (Register)weights);
  }
};

constexpr int kPairsLevels = 127;

}  // namespace

void int8_conv_maddubs(const Int8ConvParams& p, int threads) {
  if (p.levels <= kPairsLevels) {
    conv::run<conv::Registers<Pairs>, uint8_t>(p, threads);
  } else {
    conv::run<conv::Registers<Singles>, uint8_t>(p, threads);
  }
}

void int8_conv_pack_maddubs(const Int8ConvPackParams& p, int threads) {
  conv::pack<int8_t>(p, threads);
}

void int8_conv_words(const Int8ConvParams& p, int threads) {
  if (p.kind == kWords) {
    conv::run<conv::Registers<Words>, int16_t>(p, threads);
  } else {
    conv::run<conv::Registers<Words>, int8_t>(p, threads);
  }
}

void int8_conv_pack_words(const Int8ConvPackParams& p, int threads) {
  conv::pack<int16_t>(p, threads);
}

}  // namespace VF_ISA
}  // namespace vovnet_fast

#endif
