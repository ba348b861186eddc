// y = z * gates + identity, some pixels at a time.
#pragma once

#include "loops.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace gating {

template <class T, bool kGated, bool kAdded>
VF_HD void run_share(const ApplyGatesParams& p, const Share& share) {
  const auto* gates = static_cast<const High<T>*>(p.gates) + (kGated ? share.image * p.c : 0);
  for_pixels(share, p.width, [&](const Pixel* pixels, auto count) {
    constexpr int kCount = count.value;
    const Pointers<const T, kCount> z(p.z, share.image, pixels);
    const Pointers<const T, kCount> identity(kAdded ? p.identity : p.z, share.image, pixels);
    const Pointers<T, kCount> out(p.out, share.image, pixels);
    for_channels<T>(p.c, [&](int64_t c, auto span) VF_LAMBDA {
      Vector<T> gate{};
      if (kGated) gate = load(gates + c, span);
      for (int i = 0; i < kCount; ++i) {
        auto y = load(z[i] + c, span);
        if (kGated) y *= gate;
        if (kAdded) y += load(identity[i] + c, span);
        store(out[i] + c, y, span);
      }
    });
  });
}

template <class T>
VF_HD void run(const ApplyGatesParams& p, const Share& share) {
  const bool added = p.identity.data != nullptr;
  if (p.gates != nullptr) {
    added ? run_share<T, true, true>(p, share) : run_share<T, true, false>(p, share);
  } else {
    added ? run_share<T, false, true>(p, share) : run_share<T, false, false>(p, share);
  }
}

}  // namespace gating
}  // namespace VF_ISA
}  // namespace vovnet_fast
