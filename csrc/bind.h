// From Python's keyword arguments to the structs of params.h.
//
// A pointer is an integer, or None; a View is (pointer, stride_n, stride_h, stride_w), or None; an
// Array is (pointer, dtype), or None. All fields must be given, and nothing else.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/conv_engines.h"
#include "cpu/recording.h"
#include "cuda/conv_sm90/launch.h"
#include "fields.h"
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

// A struct of params.h, from keyword arguments.
template <class Params>
Params read(const py::kwargs& values) {
  static const auto& names = *new std::vector<PyObject*>(names_of(Fields<Params>::kNames));
  Params params{};
  Fields<Params>::visit(params, [&](auto&... fields) { assign_all(names, values, fields...); });
  return params;
}

// What this thread's calls of the CPU half are added to, or null.
inline cpu::Recording*& recording() {
  thread_local cpu::Recording* current = nullptr;
  return current;
}

// Run an op of the CPU half, and keep the call where this thread is recording.
template <class Params>
void run(const py::kwargs& fields, int threads, std::function<void(const Params&, int)> op) {
  const auto params = read<Params>(fields);
  {
    const py::gil_scoped_release released;
    op(params, threads);
  }
  if (recording() != nullptr) recording()->add(params, std::move(op));
}

// `name(threads, **fields)`.
inline void bind_cpu(py::module_ m) {
#define VF_DEFINE(name, Params) \
  m.def(#name,                  \
        [](int threads, const py::kwargs& fields) { run<Params>(fields, threads, &cpu::name); });
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
    run<ConvParams>(fields, threads, [engine](const ConvParams& params, int count) {
      cpu::conv(params, engine, count);
    });
  });
  // Not recorded: weights are packed once, and the calls that follow read what it leaves.
  m.def("conv_pack", [](int threads, const std::string& engine, const py::kwargs& fields) {
    const auto params = read<ConvPackParams>(fields);
    const py::gil_scoped_release released;
    cpu::conv_pack(params, engine, threads);
  });
}

// `with Recording() as calls: ...` records all calls of the CPU half that this thread makes;
// `calls.move([(address, bytes), ...])` says what may lie elsewhere when `calls.run(threads,
// [address, ...])` makes them again.
inline void bind_recording(py::module_ m) {
  py::class_<cpu::Recording>(m, "Recording")
      .def(py::init<>())
      .def(
          "__enter__",
          [](cpu::Recording& self) -> cpu::Recording& {
            if (recording() != nullptr) throw std::logic_error("this thread records already");
            recording() = &self;
            return self;
          },
          py::return_value_policy::reference)
      .def("__exit__", [](cpu::Recording&, const py::args&) { recording() = nullptr; })
      .def("__len__", &cpu::Recording::size)
      .def("move",
           [](cpu::Recording& self, const std::vector<std::pair<uintptr_t, uint64_t>>& pieces) {
             std::vector<cpu::Recording::Memory> memory;
             for (const auto& [first, bytes] : pieces) memory.push_back({first, bytes});
             self.move(memory);
           })
      .def("run", [](cpu::Recording& self, int threads, const std::vector<uintptr_t>& addresses) {
        const py::gil_scoped_release released;
        self.run(addresses, threads);
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
