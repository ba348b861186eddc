// Loops on torch's own threads.
//
// There is one OpenMP runtime in the process, which torch has brought. GCC's pragmas call it. What
// Clang makes of them calls another one, whose threads would be more than there are cores: built by
// Clang, the runtime that is loaded is asked for its functions by name (threads.cpp).
#pragma once

#include <cstdint>

#include "../math.h"

namespace vovnet_fast {

namespace cpu {
// body(data, index, team) at once on `threads` threads, or on fewer: on `team` of them. It must not
// throw.
void run_on_threads(int threads, void (*body)(void* data, int index, int team), void* data);
}  // namespace cpu

inline namespace VF_ISA {

// (Not a lambda: of a function that is one's, not all names begin with the instruction set.)
template <class Body>
void call_body(void* data, int index, int team) {
  (*static_cast<Body*>(data))(index, team);
}

// body(index, team), likewise.
template <class Body>
VF_HD void on_threads(int threads, Body body) {
  cpu::run_on_threads(threads, call_body<Body>, &body);
}

// Hands out [0, count), one by one, to whichever thread asks next.
class Tasks {
 public:
  explicit VF_HD Tasks(int64_t count) : count_(count) {}

  // (std::atomic's functions have one name for all instruction sets.)
  VF_HD bool next(int64_t* task) {
    *task = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED);
    return *task < count_;
  }

 private:
  int64_t next_ = 0;
  const int64_t count_;
};

// Something has failed on some thread.
class Failure {
 public:
  VF_HD void set() { __atomic_store_n(&failed_, true, __ATOMIC_RELAXED); }
  VF_HD explicit operator bool() const { return __atomic_load_n(&failed_, __ATOMIC_RELAXED); }

 private:
  bool failed_ = false;
};

}  // namespace VF_ISA
}  // namespace vovnet_fast
