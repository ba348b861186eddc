// From Python's keyword arguments to the structs of params.h.
//
// A pointer is an integer, or None; a View is (pointer, stride_n, stride_h, stride_w), or None; an
// Array is (pointer, dtype), or None. All fields must be given, and nothing else. What they hold is
// checked (conditions.h) before any function of a half sees it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "conditions.h"
#include "cpu/conv_engines.h"
#include "cpu/conv_unpacked.h"
#include "cpu/conv_winograd.h"
#include "cpu/fingerprint.h"
#include "cpu/int8_conv_engines.h"
#include "cpu/recording.h"
#include "cuda/conv_sm80/launch.h"
#include "cuda/conv_sm90/launch.h"
#include "cuda/depthwise_conv/launch.h"
#include "fields.h"
#include "ops.h"

namespace vovnet_fast {
namespace bind {

namespace py = pybind11;

// What a field takes, in words.
inline const char* words(const int32_t&) { return "an integer of 32 bits"; }
inline const char* words(const int64_t&) { return "an integer of 64 bits"; }
inline const char* words(const double&) { return "a number"; }
inline const char* words(const void*) { return "an address or None"; }
inline const char* words(const View&) { return "(address, stride_n, stride_h, stride_w) or None"; }
inline const char* words(const Array&) { return "(address, dtype) or None"; }

// Raises OverflowError for integers that are too large, or TypeError.
[[noreturn]] inline void refuse(py::handle name, const char* expected, py::handle value) {
  const auto message = "argument " + std::string(py::str(name)) +
                       " has a wrong type: " + std::string(py::repr(value)) + " is not " + expected;
  if (PyLong_Check(value.ptr())) throw std::overflow_error(message);
  throw py::type_error(message);
}

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
  if (parts.size() != 4) throw py::cast_error("not a pointer and three strides");
  assign(field.data, parts[0]);
  assign(field.stride_n, parts[1]);
  assign(field.stride_h, parts[2]);
  assign(field.stride_w, parts[3]);
}

inline void assign(Array& field, py::handle value) {
  field = {};
  if (value.is_none()) return;
  const auto parts = value.cast<py::tuple>();
  if (parts.size() != 2) throw py::cast_error("not a pointer and a dtype");
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
    if (value == nullptr) {
      if (PyErr_Occurred() != nullptr) throw py::error_already_set();
      throw py::type_error("missing argument: " + std::string(name));
    }
    try {
      assign(field, value);
    } catch (const py::cast_error&) {
      refuse(name, words(field), value);
    }
  };
  (next(fields), ...);
  if (values.size() != names.size()) {
    throw py::type_error("takes " + std::to_string(names.size()) + " arguments, got " +
                         std::to_string(values.size()));
  }
}

// A struct of params.h, from keyword arguments of a function, checked.
template <class Params>
Params read(const char* function, const py::kwargs& values) {
  static const auto& names = *new std::vector<PyObject*>(names_of(Fields<Params>::kNames));
  Params params{};
  Fields<Params>::visit(params, [&](auto&... fields) { assign_all(names, values, fields...); });
  try {
    check(params);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string(function) + ": " + error.what());
  } catch (const std::overflow_error& error) {
    throw std::overflow_error(std::string(function) + ": " + error.what());
  }
  return params;
}

// What this thread's calls of the CPU half are added to, or null.
inline cpu::Recording*& recording() {
  thread_local cpu::Recording* current = nullptr;
  return current;
}

// Run an op of the CPU half, and keep the call where this thread is recording.
template <class Params>
void run(const char* function, const py::kwargs& fields, int threads,
         std::function<void(const Params&, int)> op, bool recorded = true) {
  checks::threads(threads);
  const auto params = read<Params>(function, fields);
  {
    const py::gil_scoped_release released;
    op(params, threads);
  }
  if (recorded && recording() != nullptr) recording()->add(params, std::move(op));
}

// One that packs a weight: mostly it is packed once, and the calls that follow read what it leaves.
template <class Params>
void run_pack(const char* function, const py::kwargs& fields, int threads,
              std::function<void(const Params&, int)> op) {
  const bool recorded = recording() != nullptr && recording()->packs();
  run<Params>(function, fields, threads, std::move(op), recorded);
}

// A half's functions of sizes alone.
template <int64_t (*kReductionParts)(int64_t, int64_t, int64_t, int64_t),
          int64_t (*kMergeGroups)(int64_t, int64_t)>
void bind_sizes(py::module_ m) {
  m.def("reduction_parts", [](int64_t n, int64_t height, int64_t width, int64_t c) {
    checks::extent("n", n);
    checks::extent("height", height);
    checks::extent("width", width);
    checks::extent("c", c);
    checks::count("what is reduced", {n, height, width, c});
    return kReductionParts(n, height, width, c);
  });
  m.def("merge_groups", [](int64_t parts, int64_t c) {
    checks::extent("parts", parts);
    checks::extent("c", c);
    return kMergeGroups(parts, c);
  });
}

// `name(threads, **fields)`.
inline void bind_cpu(py::module_ m) {
#define VF_DEFINE(name, Params)                            \
  m.def(#name, [](int threads, const py::kwargs& fields) { \
    run<Params>(#name, fields, threads, &cpu::name);       \
  });
  VF_OPS(VF_DEFINE)
  VF_CPU_OPS(VF_DEFINE)
#undef VF_DEFINE
  bind_sizes<&cpu::reduction_parts, &cpu::merge_groups>(m);
}

// `name(threads, engine, **fields)`.
inline void bind_cpu_conv(py::module_ m) {
  m.def("conv_engines", &cpu::conv_engines);
  m.def("conv_parts", [](const std::string& engine, int64_t out_height, int64_t out_width,
                         int64_t c_in, int64_t c_out, int64_t kernel, int64_t stride) {
    checks::extent("out_height", out_height);
    checks::extent("out_width", out_width);
    checks::filter_extents(c_out, kernel, c_in);
    checks::choice("stride", stride, {1, 2});
    checks::count("the input", {out_height, out_width, c_in});
    return cpu::conv_parts(engine, out_height, out_width, c_in, c_out, kernel, stride);
  });
  m.def("conv_pack_bytes",
        [](const std::string& engine, int64_t c_out, int64_t kernel, int64_t c_in) {
          checks::filter_extents(c_out, kernel, c_in);
          return cpu::conv_pack_bytes(engine, c_out, kernel, c_in);
        });
  m.def("conv", [](int threads, const std::string& engine, const py::kwargs& fields) {
    run<ConvParams>("conv", fields, threads, [engine](const ConvParams& params, int count) {
      cpu::conv(params, engine, count);
    });
  });
  m.def("conv_pack", [](int threads, const std::string& engine, const py::kwargs& fields) {
    run_pack<ConvPackParams>("conv_pack", fields, threads,
                             [engine](const ConvPackParams& params, int count) {
                               cpu::conv_pack(params, engine, count);
                             });
  });
}

// `int8_conv(threads, engine, **fields)`.
inline void bind_cpu_int8_conv(py::module_ m) {
  m.def("int8_conv_engines", &cpu::int8_conv_engines);
  m.def("int8_conv_parts", [](const std::string& engine, int64_t out_height, int64_t out_width,
                              int64_t c_in, int64_t c_out, int64_t kernel, int64_t stride) {
    checks::extent("out_height", out_height);
    checks::extent("out_width", out_width);
    checks::filter_extents(c_out, kernel, c_in);
    checks::choice("stride", stride, {1, 2});
    checks::count("the input", {out_height, out_width, c_in});
    return cpu::int8_conv_parts(engine, out_height, out_width, c_in, c_out, kernel, stride);
  });
  m.def("int8_conv_pack_bytes",
        [](const std::string& engine, int64_t c_out, int64_t kernel, int64_t c_in) {
          checks::filter_extents(c_out, kernel, c_in);
          return cpu::int8_conv_pack_bytes(engine, c_out, kernel, c_in);
        });
  m.def("int8_conv", [](int threads, const std::string& engine, const py::kwargs& fields) {
    run<Int8ConvParams>("int8_conv", fields, threads,
                        [engine](const Int8ConvParams& params, int count) {
                          cpu::int8_conv(params, engine, count);
                        });
  });
  m.def("int8_conv_pack", [](int threads, const std::string& engine, const py::kwargs& fields) {
    run_pack<Int8ConvPackParams>("int8_conv_pack", fields, threads,
                                 [engine](const Int8ConvPackParams& params, int count) {
                                   cpu::int8_conv_pack(params, engine, count);
                                 });
  });
}

// `name(threads, side, **fields)`.
inline void bind_cpu_conv_winograd(py::module_ m) {
  m.def("conv_winograd_runs", &cpu::conv_winograd_runs);
  m.def("conv_winograd_pack_bytes", [](int64_t side, int64_t c_out, int64_t c_in) {
    checks::filter_extents(c_out, 3, c_in);
    return cpu::conv_winograd_pack_bytes(side, c_out, c_in);
  });
  m.def("conv_winograd", [](int threads, int64_t side, const py::kwargs& fields) {
    run<ConvParams>("conv_winograd", fields, threads, [side](const ConvParams& params, int count) {
      cpu::conv_winograd(params, side, count);
    });
  });
  m.def("conv_winograd_pack", [](int threads, int64_t side, const py::kwargs& fields) {
    run_pack<ConvPackParams>("conv_winograd_pack", fields, threads,
                             [side](const ConvPackParams& params, int count) {
                               cpu::conv_winograd_pack(params, side, count);
                             });
  });
}

// `name(threads, **fields)`.
inline void bind_cpu_conv_unpacked(py::module_ m) {
  m.def("conv_unpacked_runs", &cpu::conv_unpacked_runs);
  m.def("conv_unpacked", [](int threads, const py::kwargs& fields) {
    run<ConvUnpackedParams>("conv_unpacked", fields, threads, cpu::conv_unpacked);
  });
  m.def("conv_unpacked_input_grad", [](int threads, const py::kwargs& fields) {
    run<ConvUnpackedInputGradParams>("conv_unpacked_input_grad", fields, threads,
                                     cpu::conv_unpacked_input_grad);
  });
  m.def("conv_unpacked_weight_grad", [](int threads, const py::kwargs& fields) {
    run<ConvUnpackedWeightGradParams>("conv_unpacked_weight_grad", fields, threads,
                                      cpu::conv_unpacked_weight_grad);
  });
}

// `name(threads, engine, **fields)`.
inline void bind_cpu_conv_weight_grad(py::module_ m) {
  m.def("conv_weight_grad_engines", &cpu::conv_weight_grad_engines);
  m.def("conv_weight_grad_parts", [](int64_t n, int64_t out_height, int64_t out_width, int64_t c_in,
                                     int64_t c_out, int64_t kernel, int64_t stride) {
    checks::extent("n", n);
    checks::extent("out_height", out_height);
    checks::extent("out_width", out_width);
    checks::filter_extents(c_out, kernel, c_in);
    checks::choice("stride", stride, {1, 2});
    checks::count("x", {n, out_height, out_width, c_in});
    return cpu::conv_weight_grad_parts(n, out_height, out_width, c_in, c_out, kernel, stride);
  });
  m.def("conv_weight_grad", [](int threads, const std::string& engine, const py::kwargs& fields) {
    run<ConvWeightGradParams>("conv_weight_grad", fields, threads,
                              [engine](const ConvWeightGradParams& params, int count) {
                                cpu::conv_weight_grad(params, engine, count);
                              });
  });
  m.def("conv_weight_grad_finish", [](int threads, const std::string& engine,
                                      const py::kwargs& fields) {
    run<ConvWeightGradFinishParams>("conv_weight_grad_finish", fields, threads,
                                    [engine](const ConvWeightGradFinishParams& params, int count) {
                                      cpu::conv_weight_grad_finish(params, engine, count);
                                    });
  });
}

// `with Recording() as calls: ...` records all calls of the CPU half that this thread makes;
// `calls.move([(address, bytes), ...])` says what may lie elsewhere when `calls.run(threads,
// [address, ...])` makes them again. It returns by which calls each piece is used, (first, last),
// and how many addresses lie in none. With `Recording(packs=True)` weights are packed again as
// well.
inline void bind_recording(py::module_ m) {
  py::class_<cpu::Recording>(m, "Recording")
      .def(py::init<bool>(), py::arg("packs") = false)
      .def("__enter__",
           [](py::object self) {
             auto& calls = self.cast<cpu::Recording&>();
             if (recording() != nullptr) throw std::logic_error("this thread records already");
             calls.begin();
             recording() = &calls;
             self.inc_ref();  // While calls are added to it, it is there.
             return self;
           })
      .def("__exit__",
           [](py::object self, const py::args&) {
             auto& calls = self.cast<cpu::Recording&>();
             if (recording() != &calls) throw std::logic_error("this thread does not record this");
             recording() = nullptr;
             calls.end();
             self.dec_ref();
           })
      .def("__len__", &cpu::Recording::size)
      .def("move",
           [](cpu::Recording& self, const std::vector<std::pair<uintptr_t, uint64_t>>& pieces) {
             std::vector<cpu::Recording::Memory> memory;
             for (const auto& [first, bytes] : pieces) {
               memory.push_back({first, bytes});
               if (bytes == 0) continue;
               checks::address("a piece's address", reinterpret_cast<void*>(first), 1);
               if (bytes > static_cast<uint64_t>(checks::kBytesLimit) ||
                   first > UINTPTR_MAX - bytes) {
                 throw std::overflow_error("a piece must be memory that there is, got " +
                                           std::to_string(bytes) + " bytes");
               }
             }
             const auto found = self.move(memory);
             std::vector<std::pair<size_t, size_t>> uses;
             for (const auto& [first, last] : found.uses) uses.emplace_back(first, last);
             return std::make_pair(uses, found.elsewhere);
           })
      .def("run", [](cpu::Recording& self, int threads, const std::vector<uintptr_t>& addresses) {
        checks::threads(threads);
        const py::gil_scoped_release released;
        self.run(addresses, threads);
      });
}

// `fingerprint(threads, [(address, bytes), ...])`, two integers.
inline void bind_fingerprint(py::module_ m) {
  m.def("fingerprint", [](int threads, const std::vector<std::pair<uintptr_t, int64_t>>& given) {
    checks::threads(threads);
    std::vector<cpu::Piece> pieces;
    for (const auto& [first, bytes] : given) {
      const auto* data = reinterpret_cast<const void*>(first);
      checks::extent("a piece's bytes", bytes);
      if (bytes > 0) checks::address("a piece's address", data, 1);
      checks::memory("a piece", data, bytes, {bytes});
      pieces.push_back({data, bytes});
    }
    const py::gil_scoped_release released;
    const cpu::Digest found = cpu::fingerprint(pieces, threads);
    return std::make_pair(found.first, found.second);
  });
}

// `name(stream, **fields)`.
inline void bind_cuda(py::module_ m) {
#define VF_DEFINE(name, Params)                                 \
  m.def(#name, [](uintptr_t stream, const py::kwargs& fields) { \
    const auto params = read<Params>(#name, fields);            \
    const py::gil_scoped_release released;                      \
    cuda::name(params, reinterpret_cast<void*>(stream));        \
  });
  VF_OPS(VF_DEFINE)
  VF_DEFINE(conv_sm80, ConvSm80Params)
  VF_DEFINE(conv_sm80_image_grad, ConvSm80ImageGradParams)
  VF_DEFINE(conv_sm80_input_grad, ConvSm80InputGradParams)
  VF_DEFINE(conv_sm80_weight_grad, ConvSm80WeightGradParams)
  VF_DEFINE(depthwise_conv, DepthwiseConvParams)
#ifdef VOVNET_FAST_WITH_CONV_SM90
  VF_DEFINE(conv_sm90, ConvSm90Params)
  VF_DEFINE(conv_sm90_fp8, ConvSm90Fp8Params)
#endif
#undef VF_DEFINE
  bind_sizes<&cuda::reduction_parts, &cuda::merge_groups>(m);
  m.def("runtime_version", &cuda::runtime_version);
  m.def("probe", &cuda::probe);
}

}  // namespace bind
}  // namespace vovnet_fast
