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

// Hands out [0, count). A thread takes what lies in a part of its own, in order: in ops that follow
// each other it is the same part of the images, which its caches still have. Who is done with his
// takes what is left of the others'.
class Tasks {
 public:
  VF_HD Tasks(int64_t count, int threads) : parts_(threads < kMostParts ? threads : kMostParts) {
    if (parts_ < 1) parts_ = 1;
    for (int i = 0; i < parts_; ++i) {
      part_[i].next = count * i / parts_;
      part_[i].last = count * (i + 1) / parts_;
    }
  }

  // `part` is where the thread takes from: its index at first, and then what was left here.
  // (std::atomic's functions have one name for all instruction sets.)
  VF_HD bool next(int* part, int64_t* task) {
    for (int tried = 0; tried < parts_; ++tried) {
      Part& from = part_[*part % parts_];
      *task = __atomic_fetch_add(&from.next, 1, __ATOMIC_RELAXED);
      if (*task < from.last) return true;
      *part = *part % parts_ + 1;
    }
    return false;
  }

 private:
  static constexpr int kMostParts = 64;
  struct alignas(64) Part {  // A line each.
    int64_t next, last;
  };
  Part part_[kMostParts];
  int parts_;
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
