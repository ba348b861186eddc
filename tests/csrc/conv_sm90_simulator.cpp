// The Hopper convolution on the simulator, for hopper.py.
#include "conv_sm90_simulator.h"

namespace {

using namespace vovnet_fast;

using simulator::run;

simulator::Run run_for(const ConvSm90Params& params) {
  const bool one = conv_sm90::blocks_of(params) == 1;
  if (params.dtype == kBFloat16) {  // Only rounding differs: a few tiles are enough.
    if (params.block_out != 80) throw std::runtime_error("bf16 is simulated for 80 channels only");
    return one ? run<bfloat16, 80, 1> : run<bfloat16, 80, 2>;
  }
  switch (params.block_out) {
#define VF_CASE(channels, most) \
  case channels:                \
    return one ? run<float16, channels, 1> : run<float16, channels, most>;
    VF_CONV_SM90_TILES(VF_CASE)
#undef VF_CASE
  }
  return nullptr;
}

}  // namespace

extern "C" {

// 0, or 1 with the words of an error. `fetched`: the bytes that copies asked for.
int conv_sm90_simulate(const ConvSm90Params* params, int ctas, int late_copies, int late_products,
                       int64_t ahead, int64_t multiplied, unsigned seed, int64_t* fetched,
                       char* error, int size) {
  return simulator::guarded(error, size, [&] {
    const conv_sm90::Problem p = conv_sm90::plan(*params);
    const simulator::Timing timing = {late_copies != 0, late_products != 0, ahead, multiplied};
    *fetched = run_for(*params)(p, conv_sm90::strip_box(*params), conv_sm90::weight_box(*params),
                                ctas, timing, seed);
  });
}

// The same, without running anything: stages of strips and of weights, and bytes of shared memory.
int conv_sm90_plan(const ConvSm90Params* params, int* numbers, char* error, int size) {
  return simulator::guarded(error, size, [&] {
    const conv_sm90::Problem p = conv_sm90::plan(*params);
    numbers[0] = p.x_stages;
    numbers[1] = p.w_stages;
    numbers[2] = static_cast<int>(conv_sm90::shared_bytes(p));
  });
}
}
