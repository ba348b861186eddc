#include "threads.h"

#if defined(_OPENMP) && !defined(__clang__)
#include <omp.h>
#elif !defined(_WIN32)
#include <dlfcn.h>

#include <initializer_list>
#endif

namespace vovnet_fast {
namespace cpu {

#if defined(_OPENMP) && !defined(__clang__)

void run_on_threads(int threads, void (*body)(void*, int, int), void* data) {
#pragma omp parallel num_threads(threads)
  body(data, omp_get_thread_num(), omp_get_num_threads());
}

#else

namespace {

// The entry points of GCC's runtime, which LLVM's and Intel's have as well.
struct Runtime {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*index)() = nullptr;
  int (*team)() = nullptr;
};

template <class Function>
bool find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

// That of a runtime which is loaded already; none is brought.
Runtime find_runtime() {
  for (const char* name : {"libgomp.so.1", "libomp.so", "libomp.so.5", "libiomp5.so"}) {
    void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    Runtime found;
    if (library != nullptr && find(library, "GOMP_parallel", found.parallel) &&
        find(library, "omp_get_thread_num", found.index) &&
        find(library, "omp_get_num_threads", found.team)) {
      return found;
    }
  }
  return {};
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

struct Call {
  void (*body)(void*, int, int);
  void* data;
};

void run_one(void* data) {
  const auto* call = static_cast<const Call*>(data);
  call->body(call->data, runtime().index(), runtime().team());
}

}  // namespace

void run_on_threads(int threads, void (*body)(void*, int, int), void* data) {
  if (runtime().parallel == nullptr) return body(data, 0, 1);
  Call call{body, data};
  runtime().parallel(run_one, &call, static_cast<unsigned>(threads), 0);
}

#endif

}  // namespace cpu
}  // namespace vovnet_fast
