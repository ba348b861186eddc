// Convolution in eight bits by the matrix unit of Intel's processors (AMX).
#include "amx.h"
#include "int8_conv_store.h"

namespace vovnet_fast {
inline namespace VF_ISA {

void int8_conv_amx(const Int8ConvParams& p, int threads) {
  conv::run<conv::Tiles<uint8_t, int32_t>, uint8_t>(p, threads);
}

void int8_conv_pack_amx(const Int8ConvPackParams& p, int threads) {
  conv::pack<int8_t>(p, threads);
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
