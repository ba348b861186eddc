// The choice of an instruction set; see dispatch.cpp.
#pragma once

#include <string>
#include <vector>

namespace vovnet_fast {
namespace cpu {

// Choose by VOVNET_FAST_CPU_ISA, or the best. Throws std::invalid_argument where it is unknown, or
// the processor does not have it. To be called before any op.
void choose_isa();

// Choose by name, for tests: all ops that start later run on it.
void use_isa(const std::string& isa);

// What was chosen, and all that could be, the best one last.
std::string isa();
std::vector<std::string> isas();

}  // namespace cpu
}  // namespace vovnet_fast
