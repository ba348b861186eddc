// The Hopper convolution in e4m3 on the simulator, for test_conv_sm90_e4m3.py.
#include "../../csrc/conditions.h"
#include "conv_sm90_simulator.h"

namespace {

using namespace vovnet_fast;
using conv_sm90::Float8;
using simulator::run;

simulator::Run run_for(const ConvSm90Params& params) {
  const bool one = conv_sm90::blocks_of(params) == 1;
  switch (params.block_out) {
#define VF_CASE(channels, most) \
  case channels:                \
    return one ? run<Float8, channels, 1> : run<Float8, channels, most>;
    VF_CONV_SM90_E4M3_TILES(VF_CASE)
#undef VF_CASE
  }
  return nullptr;
}

}  // namespace

extern "C" {

// See conv_sm90_simulator.cpp.
int conv_sm90_simulate(const ConvSm90Fp8Params* params, int ctas, int late_copies,
                       int late_products, int64_t ahead, int64_t multiplied, unsigned seed,
                       int64_t* fetched, char* error, int size) {
  return simulator::guarded(error, size, [&] {
    const conv_sm90::Problem p = conv_sm90::plan(*params);
    const ConvSm90Params like = conv_sm90::common(*params);
    const simulator::Timing timing = {late_copies != 0, late_products != 0, ahead, multiplied};
    *fetched = run_for(like)(p, conv_sm90::strip_box(like), conv_sm90::weight_box(like), ctas,
                             timing, seed);
  });
}

int conv_sm90_plan(const ConvSm90Fp8Params* params, int* numbers, char* error, int size) {
  return simulator::guarded(error, size, [&] {
    const conv_sm90::Problem p = conv_sm90::plan(*params);
    numbers[0] = p.x_stages;
    numbers[1] = p.w_stages;
    numbers[2] = static_cast<int>(conv_sm90::shared_bytes(p));
  });
}

// What the binding asks of them.
int conv_sm90_check(const ConvSm90Fp8Params* params, char* error, int size) {
  return simulator::guarded(error, size, [&] {
    ConvSm90Fp8Params given = *params;
    vovnet_fast::check(given);
  });
}

// The simulator's conversions of a number to e4m3, and back.
int e4m3_bits(float y) { return static_cast<int>(simulator::narrow_byte(y)); }
float e4m3_number(int bits) { return simulator::widen_byte(static_cast<uint16_t>(bits)); }
}
