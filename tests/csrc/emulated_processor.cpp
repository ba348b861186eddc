// csrc/cpu/processor.cpp of a processor that has all instructions that emulated_instructions.h
// does.
#define has_avx512vnni real_has_avx512vnni
#define has_avxvnni real_has_avxvnni
#define has_amx_int8 real_has_amx_int8
#include "../../csrc/cpu/processor.cpp"
#undef has_avx512vnni
#undef has_avxvnni
#undef has_amx_int8

namespace vovnet_fast {
namespace cpu {

bool has_avx512vnni();
bool has_avxvnni();
bool has_amx_int8();

bool has_avx512vnni() { return true; }
bool has_avxvnni() { return true; }
bool has_amx_int8() { return true; }

}  // namespace cpu
}  // namespace vovnet_fast
