// The Python module vovnet_fast._C. It knows nothing of torch: tensors arrive as raw pointers.
#include "bind.h"
#include "cpu/dispatch.h"

#ifndef VF_BUILD_VERSION
#define VF_BUILD_VERSION ""
#endif
#ifndef VF_BUILD_CXX
#define VF_BUILD_CXX __VERSION__
#endif
#ifndef VF_BUILD_FLAGS
#define VF_BUILD_FLAGS ""
#endif
#ifndef VF_BUILD_ISAS
#define VF_BUILD_ISAS ""
#endif
#ifndef VF_BUILD_CUDA
#define VF_BUILD_CUDA ""
#endif
#ifndef VF_BUILD_ARCHS
#define VF_BUILD_ARCHS ""
#endif

namespace {

namespace py = pybind11;

// How this file was built. `cuda` and what follows are empty without a CUDA half.
py::dict build_info() {
  py::dict info;
  info["version"] = VF_BUILD_VERSION;
  info["compiler"] = VF_BUILD_CXX;
  info["flags"] = VF_BUILD_FLAGS;
  info["isas"] = VF_BUILD_ISAS;
  info["cuda"] = VF_BUILD_CUDA;
  info["archs"] = VF_BUILD_ARCHS;
#ifdef VOVNET_FAST_WITH_CUDA
  info["cudart"] = vovnet_fast::cuda::runtime_version();
#else
  info["cudart"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of vovnet_fast in C++. Import torch first: it brings the OpenMP runtime.";
  m.def("build_info", &build_info);
  m.attr("TILE_PIXELS") = vovnet_fast::kTilePixels;

  py::module_ cpu = m.def_submodule("cpu");
  vovnet_fast::cpu::choose_isa();
  vovnet_fast::bind::bind_cpu(cpu);
  vovnet_fast::bind::bind_cpu_conv(cpu);
  vovnet_fast::bind::bind_cpu_conv_winograd(cpu);
  vovnet_fast::bind::bind_cpu_conv_unpacked(cpu);
  vovnet_fast::bind::bind_cpu_conv_weight_grad(cpu);
  vovnet_fast::bind::bind_cpu_int8_conv(cpu);
  vovnet_fast::bind::bind_recording(cpu);
  vovnet_fast::bind::bind_fingerprint(cpu);
  cpu.def("isa", &vovnet_fast::cpu::isa);
  cpu.def("isas", &vovnet_fast::cpu::isas);
  cpu.def("use_isa", &vovnet_fast::cpu::use_isa, py::arg("isa"));

#ifdef VOVNET_FAST_WITH_CUDA
  vovnet_fast::bind::bind_cuda(m.def_submodule("cuda"));
#endif
}
