// Convolutions in eight bits of the CPU half, by engine. All compute the same integers.
//
//   amx            bytes, by the matrix unit (tdpbusd)                     AMX
//   vnni           bytes, four products at once (vpdpbusd)                 AVX512-VNNI, AVX-VNNI
//   maddubs        bytes, sums in 16 bits (vpmaddubsw) of as many as they  AVX2, AVX-512
//                  hold (int8_conv_notes.h)
//   words          images, and bytes, pairs of 16 bits (vpmaddwd)          AVX2, AVX-512
//
// 3x3 with a stride of 1 takes a quarter of the products in tiles of 4x4 outputs, in 16 bits
// (int8_conv_winograd.h), without pool partials:
//
//   winograd_vnni  by vpdpwssd                                             AVX512-VNNI, AVX-VNNI
//   winograd       by vpmaddwd                                             AVX2, AVX-512
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../params.h"

namespace vovnet_fast {
namespace cpu {

// What can run here, on the instruction set that is in use, the fastest first.
std::vector<std::string> int8_conv_engines();

// On `threads` threads. Throw std::invalid_argument of what an engine does not take.
void int8_conv(const Int8ConvParams& params, const std::string& engine, int threads);
void int8_conv_pack(const Int8ConvPackParams& params, const std::string& engine, int threads);

// Size of a packed weight.
int64_t int8_conv_pack_bytes(const std::string& engine, int64_t c_out, int64_t kernel,
                             int64_t c_in);

// Number of pool partials of an image; 0 of an engine that has none.
int64_t int8_conv_parts(const std::string& engine, int64_t out_height, int64_t out_width,
                        int64_t c_in, int64_t c_out, int64_t kernel, int64_t stride);

}  // namespace cpu
}  // namespace vovnet_fast
