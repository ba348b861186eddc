// From Python's keyword arguments to the structs of params.h.
//
// A pointer is an integer, or None; a View is (pointer, stride_n, stride_h, stride_w), or None; an
// Array is (pointer, dtype), or None. All fields must be given, and nothing else.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/conv_engines.h"
#include "cuda/conv_sm90.h"
#include "ops.h"

namespace vovnet_fast {
namespace bind {

namespace py = pybind11;

inline void assign(int32_t& field, py::handle value) { field = value.cast<int32_t>(); }
inline void assign(int64_t& field, py::handle value) { field = value.cast<int64_t>(); }
inline void assign(double& field, py::handle value) { field = value.cast<double>(); }

template <class T>
void assign(T*& field, py::handle value) {
  field = value.is_none() ? nullptr : reinterpret_cast<T*>(value.cast<uintptr_t>());
}

inline void assign(View& field, py::handle value) {
  field = {};
  if (value.is_none()) return;
  const auto parts = value.cast<py::tuple>();
  if (parts.size() != 4) throw std::invalid_argument("a view is (pointer and three strides)");
  assign(field.data, parts[0]);
  assign(field.stride_n, parts[1]);
  assign(field.stride_h, parts[2]);
  assign(field.stride_w, parts[3]);
}

inline void assign(Array& field, py::handle value) {
  field = {};
  if (value.is_none()) return;
  const auto parts = value.cast<py::tuple>();
  if (parts.size() != 2) throw std::invalid_argument("an array is (pointer, dtype)");
  assign(field.data, parts[0]);
  assign(field.dtype, parts[1]);
}

// The names of "a, b, c", interned, for good.
inline std::vector<PyObject*> names_of(const std::string& list) {
  std::vector<PyObject*> names;
  for (size_t first = 0; first < list.size();) {
    const size_t last = std::min(list.find(", ", first), list.size());
    names.push_back(PyUnicode_InternFromString(list.substr(first, last - first).c_str()));
    first = last + 2;
  }
  return names;
}

template <class... Fields>
void assign_all(const std::vector<PyObject*>& names, const py::kwargs& values, Fields&... fields) {
  size_t i = 0;
  const auto next = [&](auto& field) {
    PyObject* value = PyDict_GetItemWithError(values.ptr(), names[i]);
    const auto name = py::reinterpret_borrow<py::str>(names[i++]);
    if (value == nullptr) throw std::invalid_argument("missing argument: " + std::string(name));
    try {
      assign(field, value);
    } catch (const py::cast_error&) {
      throw std::invalid_argument("argument " + std::string(name) +
                                  " has a wrong type: " + std::string(py::repr(value)));
    }
  };
  (next(fields), ...);
  if (values.size() != names.size()) {
    throw std::invalid_argument("takes " + std::to_string(names.size()) + " arguments, got " +
                                std::to_string(values.size()));
  }
}

template <class Params>
Params read(const py::kwargs& values);

// All fields in the order of the struct: another number of them does not compile.
#define VF_READ(Params, ...)                                                        \
  template <>                                                                       \
  inline Params read<Params>(const py::kwargs& values) {                            \
    static const auto& names = *new std::vector<PyObject*>(names_of(#__VA_ARGS__)); \
    Params params{};                                                                \
    auto& [__VA_ARGS__] = params;                                                   \
    assign_all(names, values, __VA_ARGS__);                                         \
    return params;                                                                  \
  }

VF_READ(EpilogueParams, z, out, n, height, width, c, scale, shift, pool_partials, statistics, relu,
        dtype)
VF_READ(ConvParams, x, out, tiles, scale, shift, pool_partials, n, height, width, out_height,
        out_width, c_in, c_out, kernel, stride, relu, dtype)
VF_READ(ConvPackParams, weight, out, c_out, c_in, kernel, dtype)
VF_READ(AccumulateParams, z, out, add, mask, n, height, width, c, add_c, mask_c, dtype)
VF_READ(DepthwiseParams, x, out, weight, n, height, width, out_height, out_width, c, stride, dtype)
VF_READ(DepthwiseInputGradParams, g, out, add, mask, weight, n, height, width, out_height,
        out_width, c, stride, dtype)
VF_READ(DepthwiseWeightGradParams, x, g, partials, out, n, height, width, out_height, out_width, c,
        parts, stride, dtype)
VF_READ(GatesParams, partials, mean, out, fc_weight, fc_bias, n, tiles, c, num_pixels, kind, dtype)
VF_READ(ApplyGatesParams, z, out, identity, gates, n, height, width, c, dtype)
VF_READ(GateSumsParams, dout, y, partials, out, n, height, width, c, parts, dtype)
VF_READ(GatesBackwardParams, dgates, gates, mean, fc_weight, dpixel, dfc_weight, dfc_bias, n, c,
        num_pixels, kind, dtype)
VF_READ(ApplyGatesBackwardParams, dout, y, out, gates, dpixel, n, height, width, c, dtype)
VF_READ(MaxPoolParams, x, out, argmax, n, height, width, out_height, out_width, c, pad, dtype)
VF_READ(MaxPoolBackwardParams, dout, out, argmax, n, height, width, out_height, out_width, c, pad,
        dtype)
VF_READ(BatchNormMergeParams, partials, scratch, out, parts, c, groups, dtype)
VF_READ(BatchNormFinishParams, partials, scratch, out, gamma, beta, eps, parts, c, groups, dtype)
VF_READ(BatchNormSumsParams, g, z, norm, partials, out, n, height, width, c, parts, dtype)
VF_READ(BatchNormInputGradParams, g, z, out, norm, sums, gamma, n, height, width, c, dtype)
VF_READ(ChannelSumsParams, g, partials, out, n, height, width, c, parts, dtype)
VF_READ(PackParams, weight, scale, out, c_out, kernel, c_in, stride_o, stride_h, stride_w, stride_i,
        dtype)
VF_READ(PackBackwardParams, products, weight, scale, dweight, dscale, c_out, kernel, c_in, stride_o,
        stride_h, stride_w, stride_i, dtype)
VF_READ(ConvSm90Params, x, out, weight, scale, shift, pool_partials, n, height, width, c_in, c_out,
        kernel, tile_h, tile_w, block_out, relu, dtype)

#undef VF_READ

// `name(threads, **fields)`.
inline void bind_cpu(py::module_ m) {
#define VF_DEFINE(name, Params)                            \
  m.def(#name, [](int threads, const py::kwargs& fields) { \
    const auto params = read<Params>(fields);              \
    const py::gil_scoped_release released;                 \
    cpu::name(params, threads);                            \
  });
  VF_OPS(VF_DEFINE)
#undef VF_DEFINE
  m.def("reduction_parts", &cpu::reduction_parts);
  m.def("merge_groups", &cpu::merge_groups);
}

// `name(threads, engine, **fields)`.
inline void bind_cpu_conv(py::module_ m) {
  m.def("conv_engines", &cpu::conv_engines);
  m.def("conv_parts", &cpu::conv_parts);
  m.def("conv_pack_bytes", &cpu::conv_pack_bytes);
  m.def("conv", [](int threads, const std::string& engine, const py::kwargs& fields) {
    const auto params = read<ConvParams>(fields);
    const py::gil_scoped_release released;
    cpu::conv(params, engine, threads);
  });
  m.def("conv_pack", [](int threads, const std::string& engine, const py::kwargs& fields) {
    const auto params = read<ConvPackParams>(fields);
    const py::gil_scoped_release released;
    cpu::conv_pack(params, engine, threads);
  });
}

// `name(stream, **fields)`.
inline void bind_cuda(py::module_ m) {
#define VF_DEFINE(name, Params)                                 \
  m.def(#name, [](uintptr_t stream, const py::kwargs& fields) { \
    const auto params = read<Params>(fields);                   \
    const py::gil_scoped_release released;                      \
    cuda::name(params, reinterpret_cast<void*>(stream));        \
  });
  VF_OPS(VF_DEFINE)
#ifdef VOVNET_FAST_WITH_CONV_SM90
  VF_DEFINE(conv_sm90, ConvSm90Params)
#endif
#undef VF_DEFINE
  m.def("reduction_parts", &cuda::reduction_parts);
  m.def("merge_groups", &cuda::merge_groups);
  m.def("runtime_version", &cuda::runtime_version);
  m.def("probe", &cuda::probe);
}

}  // namespace bind
}  // namespace vovnet_fast
