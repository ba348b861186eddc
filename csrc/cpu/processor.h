// What a processor has, and the system lets a process use. The processor is asked once: in a
// virtual machine it takes microseconds to answer.
#pragma once

namespace vovnet_fast {
namespace cpu {

// The instruction sets of dispatch.cpp.
bool has_avx2();
bool has_avx512();

// And what there is beyond them.
bool has_avx512bf16();
bool has_avx512vnni();
bool has_avxvnni();

// Whether Linux lets this process have the matrix unit's large registers, too.
bool has_amx_bf16();
bool has_amx_int8();

}  // namespace cpu
}  // namespace vovnet_fast
