// The fibres of cuda_on_cpu.h.

// With it longjmp takes a jump to another stack for a mistake.
#undef _FORTIFY_SOURCE

#include "cuda_on_cpu.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "shared_memory.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kPoison = 0xff;  // NaN in every floating dtype.

// A stack on which threads run, one after the other, until one of them waits.
struct Fibre {
  ucontext_t context;  // Where it begins,
#if !defined(__SANITIZE_ADDRESS__)
  jmp_buf place;  // and where it goes on: without the system calls of swapcontext.
  bool begun = false;
#endif
  char* stack;
  void* fake_stack = nullptr;

  Fibre() {
    stack = static_cast<char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stack == MAP_FAILED) throw std::bad_alloc();
  }
  ~Fibre() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes);
#endif
    munmap(stack, kStackBytes);
  }
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;
};

enum class State { kNew, kRunning, kAtBarrier, kAtShuffle, kTogether, kDone };

struct Thread {
  State state = State::kNew;
  Fibre* fibre = nullptr;
  const char* place = nullptr;  // Where it waits,
  uint32_t lanes = 0;           // for these lanes,
  uint64_t value = 0;           // with this value.
  uint64_t shown = 0;           // What it came with, when all were there.
  Work work = nullptr;          // What is done then,
  void* brought = nullptr;      // with this.
};

// Stacks that no thread uses.
std::vector<std::unique_ptr<Fibre>> idle_fibres;

// One block: its threads, and what it shares.
class Block {
 public:
  explicit Block(const std::function<void()>& body)
      : body_(body), threads_(here.block.x * here.block.y) {}

  void run();
  [[noreturn]] void fail(const std::string& what);
  uint64_t wait(State state, const char* place, uint32_t lanes, uint64_t value, int source);
  void together(const char* place, Work work, void* mine);
  int current() const { return current_; }
  uint32_t passed() const { return passed_; }
  void* shared(const void* key, size_t bytes);

 private:
  static void enter();
  void work();
  void resume(Fibre* fibre);
  void leave(bool for_good);
  void choose(int thread);
  Fibre* fresh();
  bool release();
  bool release_barrier();
  bool release_shuffles();
  std::string thread_words(int thread) const;
  std::string stuck() const;

  const std::function<void()>& body_;
  std::vector<Thread> threads_;
  std::map<const void*, std::unique_ptr<char[]>> shared_;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  std::string error_;
#if defined(__SANITIZE_ADDRESS__)
  ucontext_t scheduler_;
#else
  jmp_buf scheduler_;
#endif
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_bytes_ = 0;
  Fibre* fibre_ = nullptr;
  int current_ = -1;
  int next_ = 0;
  uint32_t passed_ = 0;
};

Block* block = nullptr;

void Block::enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack_, &block->scheduler_bytes_);
#endif
  block->work();
}

// Runs threads that have not begun. When one of them has waited, and goes on, the others are gone.
void Block::work() {
  while (next_ < static_cast<int>(threads_.size())) {
    const int thread = next_++;
    choose(thread);
    threads_[thread].state = State::kRunning;
    threads_[thread].fibre = fibre_;
    body_();
    thread_ends();
    threads_[current_].state = State::kDone;
  }
  leave(true);
}

void Block::choose(int thread) {
  current_ = thread;
  here.thread_index = dim3(thread % here.block.x, thread / here.block.x);
}

void Block::resume(Fibre* fibre) {
  fibre_ = fibre;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, fibre->stack, kStackBytes);
  swapcontext(&scheduler_, &fibre->context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#else
  if (_setjmp(scheduler_) == 0) {
    if (fibre->begun) _longjmp(fibre->place, 1);
    fibre->begun = true;
    setcontext(&fibre->context);
  }
#endif
}

// Back to the scheduler.
void Block::leave([[maybe_unused]] bool for_good) {
  Fibre* const fibre = fibre_;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fibre->fake_stack, scheduler_stack_,
                                 scheduler_bytes_);
  swapcontext(&fibre->context, &scheduler_);
  __sanitizer_finish_switch_fiber(fibre->fake_stack, &scheduler_stack_, &scheduler_bytes_);
#else
  if (_setjmp(fibre->place) == 0) _longjmp(scheduler_, 1);
#endif
}

// A fibre for the next threads.
Fibre* Block::fresh() {
  if (idle_fibres.empty()) idle_fibres.push_back(std::make_unique<Fibre>());
  fibres_.push_back(std::move(idle_fibres.back()));
  idle_fibres.pop_back();
  Fibre* const fibre = fibres_.back().get();
#if !defined(__SANITIZE_ADDRESS__)
  fibre->begun = false;
#endif
  getcontext(&fibre->context);
  fibre->context.uc_stack.ss_sp = fibre->stack;
  fibre->context.uc_stack.ss_size = kStackBytes;
  fibre->context.uc_link = nullptr;
  makecontext(&fibre->context, &Block::enter, 0);
  return fibre;
}

void Block::run() {
  block = this;
  const int count = static_cast<int>(threads_.size());
  while (error_.empty() && next_ < count) resume(fresh());
  while (error_.empty() && release()) {
    for (int thread = 0; error_.empty() && thread < count; ++thread) {
      if (threads_[thread].state != State::kRunning) continue;
      choose(thread);
      resume(threads_[thread].fibre);
    }
  }
  if (!error_.empty()) throw std::runtime_error(error_);
  for (auto& fibre : fibres_) idle_fibres.push_back(std::move(fibre));
}

// Lets threads go on that have waited for each other. False: none of them has to.
bool Block::release() {
  bool waiting = false;
  for (const Thread& thread : threads_) waiting |= thread.state != State::kDone;
  if (!waiting) return false;
  if (!release_shuffles() && !release_barrier()) error_ = stuck();
  return error_.empty();
}

// Lets all threads pass a barrier, if they are all there.
bool Block::release_barrier() {
  for (const Thread& thread : threads_) {
    if (thread.state != State::kAtBarrier || thread.place != threads_[0].place) return false;
  }
  for (Thread& thread : threads_) thread.state = State::kRunning;
  ++passed_;
  return true;
}

// Lets warps pass a shuffle whose lanes are all there, each of which takes what it wants when it
// goes on; or does what they have come together for.
bool Block::release_shuffles() {
  const int count = static_cast<int>(threads_.size());
  bool any = false;
  for (int first = 0; first < count; first += kWarp) {
    const int lanes = std::min(kWarp, count - first);
    const uint32_t all = lanes == kWarp ? ~0u : (1u << lanes) - 1;
    bool together = true;
    for (int lane = 0; lane < lanes; ++lane) {
      const Thread& thread = threads_[first + lane];
      // Fewer lanes than the warp has would need a barrier of their own: no kernel has that.
      together &= (thread.state == State::kAtShuffle || thread.state == State::kTogether) &&
                  thread.state == threads_[first].state && thread.place == threads_[first].place &&
                  (thread.lanes & all) == all;
    }
    if (together && threads_[first].state == State::kTogether) {
      void* brought[kWarp] = {};
      for (int lane = 0; lane < lanes; ++lane) brought[lane] = threads_[first + lane].brought;
      current_ = first;
      threads_[first].work(brought);
    }
    for (int lane = 0; together && lane < lanes; ++lane) {
      Thread& thread = threads_[first + lane];
      thread.state = State::kRunning;
      thread.shown = thread.value;
    }
    any |= together;
  }
  return any;
}

std::string Block::thread_words(int thread) const {
  const Thread& t = threads_[thread];
  const std::string name = "thread " + std::to_string(thread);
  if (t.state == State::kDone) return name + " has returned";
  const char* waits = t.state == State::kAtShuffle  ? " waits at the shuffle "
                      : t.state == State::kTogether ? " waits for its warp at "
                                                    : " waits at the barrier ";
  return name + waits + t.place;
}

std::string Block::stuck() const {
  int first = 0;  // A thread that waits,
  while (threads_[first].state == State::kDone) ++first;
  // and one that does not wait there: for a shuffle, of the same warp.
  const bool warp = threads_[first].state != State::kAtBarrier;
  int other = warp ? first / kWarp * kWarp : 0;
  const int end = warp ? other + kWarp : static_cast<int>(threads_.size());
  while (other < std::min(end, static_cast<int>(threads_.size())) - 1 &&
         threads_[other].state == threads_[first].state &&
         threads_[other].place == threads_[first].place) {
    ++other;
  }
  return thread_words(first) + ", but " + thread_words(other);
}

void Block::fail(const std::string& what) {
  error_ = "thread " + std::to_string(current_) + " of block " +
           std::to_string(here.block_index.x) + ": " + what;
  leave(false);
  std::abort();  // A failed block is not resumed.
}

uint64_t Block::wait(State state, const char* place, uint32_t lanes, uint64_t value, int source) {
  Thread& thread = threads_[current_];
  const int first = current_ / kWarp * kWarp;
  thread.state = state;
  thread.place = place;
  thread.lanes = lanes;
  thread.value = value;
  leave(false);
  if (state == State::kAtBarrier) return 0;
  if (first + source >= static_cast<int>(threads_.size())) fail("a shuffle from no thread");
  return threads_[first + source].shown;
}

void Block::together(const char* place, Work work, void* mine) {
  Thread& thread = threads_[current_];
  thread.state = State::kTogether;
  thread.place = place;
  thread.lanes = ~0u;
  thread.work = work;
  thread.brought = mine;
  leave(false);
}

void* Block::shared(const void* key, size_t bytes) {
  auto& array = shared_[key];
  if (array == nullptr) {
    array.reset(new char[bytes]);
    memset(array.get(), kPoison, bytes);
  }
  return array.get();
}

}  // namespace

Where here;

void fail(const std::string& what) { block->fail(what); }

void barrier(const char* place) { block->wait(State::kAtBarrier, place, 0, 0, 0); }

uint64_t shuffle(const char* place, uint32_t lanes, uint64_t value, int source) {
  return block->wait(State::kAtShuffle, place, lanes, value, source);
}

void together(const char* place, Work work, void* mine) { block->together(place, work, mine); }

int thread() { return block->current(); }

uint32_t barriers_passed() { return block->passed(); }

void* shared(const void* key, size_t bytes) { return block->shared(key, bytes); }

void run(const char* op, dim3 grid, dim3 block_size, const std::function<void()>& thread,
         uint32_t shared_bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  here.grid = grid;
  here.block = block_size;
  try {
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          here.block_index = dim3(x, y, z);
          block_begins(block_size.x * block_size.y, shared_bytes);
          Block(thread).run();
          block_ends();
        }
      }
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(op) + ": " + error.what());
  }
}

}  // namespace cuda_on_cpu
