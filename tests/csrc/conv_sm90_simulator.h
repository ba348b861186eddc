// A machine for csrc/cuda/conv_sm90/kernel.h that simulates what it uses of a Hopper GPU.
//
// The threads of a cluster of CTAs are fibres. Shared memory is bytes, to which tensor copies write
// with the 128-byte swizzle, and of which WGMMA reads what descriptors say, as the PTX ISA and the
// CUDA driver API have it: nothing of this comes from the kernel's own arithmetic. A warp's
// products are computed as late as possible, when the warp waits for them, or as early as possible
// (those of e4m3 added up to as few bits as Hopper's tensor cores keep);
// copies likewise, in any order. So a stage that is overwritten too early, or read too early, shows
// in the numbers.
//
// Reported as errors: threads that wait for ever, barriers that are used before they are
// initialised or get more arrivals than they expect, operands and copies that do not start at an
// atom of the swizzle or lie outside shared memory, collective instructions that not all threads
// come to.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/conv_sm90/kernel.h"
#include "../../csrc/cuda/conv_sm90/plan.h"
#include "../../csrc/dtypes.h"

namespace simulator {

using vovnet_fast::conv_sm90::Box;
using vovnet_fast::conv_sm90::Problem;

constexpr int kThreads = 384;
constexpr int kLanes = 32;
constexpr int kGroup = 128;
constexpr size_t kStack = 64 << 10;
constexpr int kNap = 128;  // Rounds of the scheduler.

inline void require(bool held, const std::string& what) {
  if (!held) throw std::runtime_error(what);
}

// When the copies and the products under way come to their end.
struct Timing {
  bool late_copies, late_products;
  int64_t ahead;       // Nothing is stored before copies have asked for so many bytes,
  int64_t multiplied;  // and before so many products were issued.
};

// ---- Fibres ------------------------------------------------------------------------------------

// Runs threads that wait for each other, each until it waits, in an order of its own every round.
class Scheduler {
 public:
  explicit Scheduler(unsigned seed) : random_(seed) {}

  // `idle`: called when all threads wait, false if that cannot change anything.
  void run(int threads, const std::function<void(int)>& body, const std::function<bool()>& idle) {
    body_ = body;
    fibres_.resize(threads);
    std::vector<int> order(threads);
    for (int i = 0; i < threads; ++i) {
      start(i);
      order[i] = i;
    }
    uint64_t asleep = 0;  // Warps that do not run for a while, so that others get far ahead.
    for (int round = 0;; ++round) {
      std::shuffle(order.begin(), order.end(), random_);
      if (round % kNap == 0) asleep = static_cast<uint64_t>(random_()) << 32 | random_();
      bool waiting = false, moved = false;
      for (int i : order) {
        if (fibres_[i].done) continue;
        if (asleep >> (i / kLanes % 64) & 1) {
          waiting = true;
          continue;
        }
        if (fibres_[i].ready == nullptr || fibres_[i].ready()) {
          moved = true;
          resume(i);
          require(error_.empty(), error_);
        }
        waiting = waiting || !fibres_[i].done;
      }
      if (!waiting) return;
      if (moved) continue;
      if (asleep != 0) {
        asleep = 0;
      } else if (!idle()) {
        throw std::runtime_error("deadlock: " + what_they_wait_for());
      }
    }
  }

  // Called by a thread.
  void wait(const std::string& what, std::function<bool()> ready) {
    if (ready()) return;
    Fibre& self = fibres_[current_];
    self.what = what;
    self.ready = std::move(ready);
    swapcontext(&self.context, &main_);
    self.ready = nullptr;
  }

  std::mt19937& random() { return random_; }

 private:
  struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::function<bool()> ready;
    std::string what;
    bool done = false;
  };

  void start(int i) {
    Fibre& fibre = fibres_[i];
    fibre.stack.reset(new char[kStack]);  // Not cleared: there may be thousands.
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = &main_;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&fibre.context, reinterpret_cast<void (*)()>(&Scheduler::enter), 2,
                static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
  }

  void resume(int i) {
    current_ = i;
    swapcontext(&main_, &fibres_[i].context);
  }

  static void enter(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Scheduler*>(static_cast<uintptr_t>(high) << 32 | low);
    const int i = self->current_;
    try {
      self->body_(i);
    } catch (const std::exception& error) {
      self->error_ = "thread " + std::to_string(i) + ": " + error.what();
    }
    self->fibres_[i].done = true;
  }

  std::string what_they_wait_for() const {
    std::map<std::string, int> counts;
    for (const Fibre& fibre : fibres_) {
      if (!fibre.done) ++counts[fibre.what];
    }
    std::string words;
    for (const auto& [what, count] : counts) {
      words += (words.empty() ? "" : ", ") + std::to_string(count) + " wait for " + what;
    }
    return words;
  }

  std::mt19937 random_;
  std::function<void(int)> body_;
  std::vector<Fibre> fibres_;
  ucontext_t main_;
  int current_ = 0;
  std::string error_;
};

// ---- What a CTA has ----------------------------------------------------------------------------

// mbarrier: a phase ends when all arrivals and all bytes that it expects are there.
struct Barrier {
  int expected, arrivals;
  int64_t bytes;
  uint32_t phase;

  void arrive() {
    require(arrivals > 0, "a barrier gets more arrivals than it expects");
    --arrivals;
    end_phase();
  }
  void receive(int64_t count) {
    bytes -= count;
    end_phase();
  }
  void end_phase() {
    if (arrivals != 0 || bytes != 0) return;
    arrivals = expected;
    phase ^= 1;
  }
};

// Threads that meet, and may swap a word.
struct Meeting {
  int here = 0;
  int64_t meetings = 0;
  std::string what;
  uint32_t words[2][kLanes];
};

// A product of a warpgroup, D[64, N] = A[64, K] * B[N, K]^T (+ D), and whose parts are done. K are
// 32 bytes.
struct Product {
  uint64_t a, b;
  bool add, e4m3;
  int n, posted = 0;
  bool done[kGroup / kLanes] = {};
  float* sums[kGroup];
  float (*widen)(uint16_t);
};

struct Copy {
  const Box* box;
  uint32_t to, barrier;
  int at[4];
  int rank;  // of the CTA that it goes to
};

class Cta;

// The CTAs of a cluster, their threads, and the copies that are under way.
class Cluster {
 public:
  Cluster(const Problem& p, const Box& strip, const Box& weight, Timing timing, unsigned seed);

  template <class Body>
  void run(const Body& body);

  // Which CTA has this rank. What others do to it after its end would be somebody else's memory.
  Cta& cta(int rank);
  int size() const { return static_cast<int>(ctas_.size()); }

  void copy(Copy copy, uint16_t mask, int own);

  Scheduler scheduler;
  Meeting all;
  int64_t fetched = 0;  // Bytes that copies asked for, of channels that there are.
  int64_t issued = 0;   // Products of warpgroups.
  const Box strip, weight;
  const Timing timing;

 private:
  bool finish_a_copy();

  std::vector<std::unique_ptr<Cta>> ctas_;
  std::vector<int> running_;  // Threads of each CTA.
  std::vector<Copy> copies_;
};

class Cta {
 public:
  Cta(const Problem& p, Timing timing, Scheduler& scheduler)
      : timing_(timing),
        scheduler_(scheduler),
        size_(vovnet_fast::conv_sm90::shared_bytes(p)),
        memory_(size_, 0xff) {}  // NaN, in fp16, bf16 and fp32.

  void check_the_end() const {
    for (const auto& [address, barrier] : barriers_) {
      require(barrier.bytes == 0, "a barrier expects bytes when the CTA ends");
    }
    for (const auto& group : products_) {
      for (const Product& product : group) {
        require(std::all_of(product.done, product.done + 4, [](bool done) { return done; }),
                "products are under way when the CTA ends");
      }
    }
  }

  uint8_t* at(uint32_t address, uint32_t bytes) {
    require(address + bytes <= size_, "an access outside shared memory");
    return memory_.data() + address;
  }

  Scheduler& scheduler() { return scheduler_; }

  // ---- Threads that meet

  // Wait until `size` threads are at this meeting. Returns which it was.
  int64_t meet(Meeting& meeting, int size, const std::string& what) {
    require(meeting.here == 0 || meeting.what == what,
            "some are at " + what + ", others at " + meeting.what);
    meeting.what = what;
    const int64_t number = meeting.meetings;
    if (++meeting.here == size) {
      meeting.here = 0;
      ++meeting.meetings;
    } else {
      scheduler_.wait(what, [&meeting, number] { return meeting.meetings != number; });
    }
    return number;
  }

  uint32_t swap(int thread, uint32_t word, int lanes) {
    Meeting& meeting = warps_[thread / kLanes];
    meeting.words[meeting.meetings % 2][thread % kLanes] = word;
    const int64_t number = meet(meeting, kLanes, "shuffle " + std::to_string(lanes));
    return meeting.words[number % 2][thread % kLanes ^ lanes];
  }

  Meeting all_, consumers_[3], warps_[kThreads / kLanes];

  // ---- Barriers

  Barrier& barrier(uint32_t address) {
    const auto found = barriers_.find(address);
    require(found != barriers_.end(), "a barrier that is not initialised");
    return found->second;
  }

  void initialise(uint32_t address, int arrivals) {
    at(address, 8);
    require(address % 8 == 0 && barriers_.count(address) == 0, "a barrier is initialised twice");
    barriers_[address] = {arrivals, arrivals, 0, 0};
  }

  // ---- Products

  // Called by each thread of a warpgroup, which comes to its `number`-th product.
  // Returns whether it is the last of them that comes.
  bool post(int thread, int64_t number, const Product& wanted, float* sums) {
    auto& group = products_[thread / kGroup];
    int64_t& first = first_product_[thread / kGroup];
    const int64_t index = number - first;
    if (index == static_cast<int64_t>(group.size())) group.push_back(wanted);
    Product& product = group.at(index);
    require(product.a == wanted.a && product.b == wanted.b && product.add == wanted.add &&
                product.n == wanted.n,
            "the threads of a warpgroup multiply different operands");
    product.sums[thread % kGroup] = sums;
    ++product.posted;
    if (product.posted == kGroup && !timing_.late_products) {
      for (int warp = 0; warp < 4; ++warp) finish(product, warp);
    }
    return product.posted == kGroup;
  }

  // Wait until all of a warp's products before the `number`-th are done.
  void wait_products(int thread, int64_t number) {
    auto& group = products_[thread / kGroup];
    int64_t& first = first_product_[thread / kGroup];
    scheduler_.wait("products", [&group, &first, number] {
      return number <= first || group.at(number - 1 - first).posted == kGroup;
    });
    for (int64_t i = 0; i < number - first; ++i) finish(group[i], thread % kGroup / kLanes);
    while (!group.empty() && std::all_of(group.front().done, group.front().done + 4,
                                         [](bool done) { return done; })) {
      group.pop_front();
      ++first;
    }
  }

  // ---- Tensor copies (tiled mode, 128-byte swizzle, zeros outside)

  void finish(const Copy& copy) {
    const Box& box = *copy.box;
    require(copy.to % 1024 == 0, "a copy does not start at an atom of the swizzle");
    const uint32_t size = box.element;
    require(box.box[0] * size == 128, "a copy's rows do not have the 128 bytes of the swizzle");
    uint32_t elements = 1;
    for (int d = 0; d < box.rank; ++d) elements *= box.box[d];
    at(copy.to, elements * size);
    for (uint32_t i = 0; i < elements; ++i) {
      const char* from = static_cast<const char*>(box.data);
      bool inside = true;
      uint32_t rest = i;
      for (int d = 0; d < box.rank; ++d) {
        const int64_t index = copy.at[d] + static_cast<int64_t>(rest % box.box[d]);
        rest /= box.box[d];
        inside = inside && index >= 0 && index < static_cast<int64_t>(box.sizes[d]);
        from += index * static_cast<int64_t>(d == 0 ? size : box.strides[d - 1]);
      }
      uint16_t element = 0;
      if (inside) memcpy(&element, from, size);
      memcpy(at(swizzled(copy.to + i * size), size), &element, size);
    }
    barrier(copy.barrier).receive(elements * size);
  }

 private:
  static uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

  // Rows of 32 bytes of a K-major operand with the 128-byte swizzle: rows of 128 bytes, eight of
  // them adjacent, the next eight a stride further.
  std::vector<float> rows(const Product& product, uint64_t descriptor, int first, int count) {
    const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    require(descriptor >> 62 == 1, "an operand without the 128-byte swizzle");
    require((descriptor >> 49 & 7) == 0 && (start >> 7 & 7) == 0,
            "an operand does not start at an atom of the swizzle");
    const int each = product.e4m3 ? 16 : 8;  // Numbers of 16 bytes.
    std::vector<float> numbers(count * 2 * each);
    for (int i = 0; i < count * 2; ++i) {  // Of 16 bytes, which stay together.
      const int row = first + i / 2;
      const uint32_t address = start + row / 8 * stride + row % 8 * 128 + i % 2 * 16;
      const uint8_t* from = at(swizzled(address), 16);
      for (int k = 0; k < each; ++k) {
        uint16_t bits = 0;
        memcpy(&bits, from + k * 16 / each, 16 / each);
        numbers[i * each + k] = product.widen(bits);
      }
    }
    return numbers;
  }

  // What 32 products of e4m3 are added to: all are cut to 14 bits below the largest of them.
  // (DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.5.2.)
  static float added_e4m3(float sum, const float* a, const float* b) {
    float products[32], largest = std::fabs(sum);
    bool finite = std::isfinite(sum);
    for (int k = 0; k < 32; ++k) {
      products[k] = a[k] * b[k];
      finite = finite && std::isfinite(products[k]);
      largest = std::max(largest, std::fabs(products[k]));
    }
    if (!finite) return std::nanf("");
    if (largest == 0) return 0;
    const float unit = std::ldexp(1.0f, std::ilogb(largest) - 13), per = 1 / unit;
    auto units = static_cast<int64_t>(sum * per);
    for (float product : products) units += static_cast<int32_t>(product * per);
    return static_cast<float>(units) * unit;
  }

  // The part of a warp: rows 16 * warp to 16 * warp + 15.
  void finish(Product& product, int warp) {
    if (product.done[warp]) return;
    product.done[warp] = true;
    const std::vector<float> a = rows(product, product.a, warp * 16, 16);
    const std::vector<float> b = rows(product, product.b, 0, product.n);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int d = 0; d < product.n / 2; ++d) {
        // d0, d1: row lane / 4, columns 2 * (lane % 4) and the next; d2, d3: eight rows below; and
        // so on for every eight columns.
        const int row = lane / 4 + (d % 4 / 2) * 8;
        const int column = d / 4 * 8 + lane % 4 * 2 + d % 2;
        float& sum = product.sums[warp * kLanes + lane][d];
        if (product.e4m3) {
          sum = added_e4m3(product.add ? sum : 0, &a[row * 32], &b[column * 32]);
          continue;
        }
        float products = 0;
        for (int k = 0; k < 16; ++k) products += a[row * 16 + k] * b[column * 16 + k];
        sum = product.add ? sum + products : products;
      }
    }
  }

  Timing timing_;
  Scheduler& scheduler_;
  uint32_t size_;
  std::vector<uint8_t> memory_;
  std::map<uint32_t, Barrier> barriers_;
  std::deque<Product> products_[kThreads / kGroup];
  int64_t first_product_[kThreads / kGroup] = {};
};

inline Cluster::Cluster(const Problem& p, const Box& strip, const Box& weight, Timing timing,
                        unsigned seed)
    : scheduler(seed), strip(strip), weight(weight), timing(timing) {
  for (int i = 0; i < vovnet_fast::conv_sm90::cluster_size(p); ++i) {
    ctas_.push_back(std::make_unique<Cta>(p, timing, scheduler));
  }
  running_.assign(ctas_.size(), kThreads);
}

template <class Body>
void Cluster::run(const Body& body) {
  const auto thread = [&](int i) {
    body(i / kThreads, i % kThreads);
    --running_[i / kThreads];
  };
  scheduler.run(size() * kThreads, thread, [this] { return finish_a_copy(); });
  require(copies_.empty(), "copies are under way when the cluster ends");
  for (const auto& cta : ctas_) cta->check_the_end();
}

inline Cta& Cluster::cta(int rank) {
  require(rank >= 0 && rank < size(), "a CTA that the cluster does not have");
  require(running_[rank] > 0, "a CTA of the cluster has ended already");
  return *ctas_[rank];
}

inline void Cluster::copy(Copy copy, uint16_t mask, int own) {
  const Box& box = *copy.box;
  const auto channels =
      std::min<int64_t>(box.box[0], static_cast<int64_t>(box.sizes[0]) - copy.at[0]);
  fetched += channels * box.box[1] * box.box[2] * (box.rank == 4 ? box.box[3] : 1) * box.element;
  cta(own).barrier(copy.barrier);
  for (int rank = 0; rank < 16; ++rank) {
    if ((mask >> rank & 1) == 0) continue;
    copy.rank = rank;
    if (timing.late_copies) {
      copies_.push_back(copy);
    } else {
      cta(rank).finish(copy);
    }
  }
}

inline bool Cluster::finish_a_copy() {
  if (copies_.empty()) return false;
  const size_t i = scheduler.random()() % copies_.size();
  const Copy copy = copies_[i];
  copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(i));
  cta(copy.rank).finish(copy);
  return true;
}

// ---- The machine -------------------------------------------------------------------------------

inline float widen_half(uint16_t bits) { return vovnet_fast::widen(vovnet_fast::float16{bits}); }
// E4M3 of "FP8 Formats for Deep Learning" (arXiv:2209.05433): no infinity, NaN is all ones.
inline float number_of(int bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return std::nanf("");
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                   : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return (bits & 0x80) != 0 ? -size : size;
}
// All of them, those that are not negative first, which their bits count up.
inline const std::array<float, 256>& numbers_of_e4m3() {
  static const std::array<float, 256> found = [] {
    std::array<float, 256> numbers;
    for (int i = 0; i < 256; ++i) numbers[i] = number_of(i);
    return numbers;
  }();
  return found;
}
inline float widen_byte(uint16_t bits) { return numbers_of_e4m3()[bits & 0xff]; }
// To nearest even, and no larger than 448 (satfinite).
inline uint32_t narrow_byte(float y) {
  const uint32_t sign = std::signbit(y) ? 0x80 : 0;
  const float size = std::fabs(y);
  if (std::isnan(y)) return 0x7f;
  if (size >= 448) return sign | 0x7e;
  // The nearest of two neighbours.
  const auto& numbers = numbers_of_e4m3();
  const auto next = std::upper_bound(numbers.begin(), numbers.begin() + 0x7f, size);
  const auto low = static_cast<uint32_t>(next - numbers.begin()) - 1;
  const float below = size - numbers[low], above = numbers[low + 1] - size;
  return sign | (below < above || (below == above && low % 2 == 0) ? low : low + 1);
}
inline float widen_bfloat(uint16_t bits) { return vovnet_fast::widen(vovnet_fast::bfloat16{bits}); }

// What a thread sees of its CTA, and of the cluster.
class Thread {
 public:
  Thread(Cluster& cluster, int rank, int thread, int index, int clusters)
      : all_(cluster),
        cta_(cluster.cta(rank)),
        rank_(rank),
        thread_(thread),
        index_(index),
        clusters_(clusters) {}

  int thread() const { return thread_; }
  int thread_again() const { return thread_; }
  int uniform(int value) {
    const auto word = static_cast<uint32_t>(value);
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      require(cta_.swap(thread_, word, lanes) == word, "not the same in all threads of a warp");
    }
    return value;
  }
  int cluster() const { return index_; }
  int clusters() const { return clusters_; }
  int rank() const { return rank_; }
  void synchronise() {
    require(published_ || thread_ != 0, "the barriers were not published to the copies");
    cta_.meet(cta_.all_, kThreads, "all threads");
  }
  void synchronise_cluster() {
    require(published_ || thread_ != 0, "the barriers were not published to the copies");
    cta_.meet(all_.all, all_.size() * kThreads, "all threads of the cluster");
  }
  void synchronise_consumers(int group = 0, int count = 2 * kGroup) {
    require(group >= 0 && group < 3, "a group of consumers that is none");
    cta_.meet(cta_.consumers_[group], count, std::to_string(count) + " consumers");
  }
  void shrink_registers() {}
  void grow_registers() {}
  float* floats(uint32_t offset) { return reinterpret_cast<float*>(cta_.at(offset, 4)); }

  void initialise(uint32_t barrier, int arrivals) { cta_.initialise(barrier, arrivals); }
  void publish_barriers() { published_ = true; }
  void wait(uint32_t barrier, uint32_t parity) {
    Barrier& found = cta_.barrier(barrier);
    cta_.scheduler().wait("the barrier at " + std::to_string(barrier),
                          [&found, parity] { return found.phase != parity; });
  }
  void expect(uint32_t barrier, uint32_t bytes) {
    cta_.barrier(barrier).bytes += bytes;
    cta_.barrier(barrier).arrive();
  }
  void wait_free(uint32_t barrier, uint32_t parity) { wait(barrier, parity); }
  void arrive(uint32_t barrier, int count, int to) {
    cta_.meet(cta_.warps_[thread_ / kLanes], kLanes, "an arrival");
    if (thread_ % kLanes < count) all_.cta(count == 1 ? rank_ : to).barrier(barrier).arrive();
  }

  void free(uint32_t barrier, int count, int to) { arrive(barrier, count, to); }

  void copy_strip(uint32_t to, uint32_t full, int c, int w, int h, int n, int count,
                  uint16_t mask) {
    copy(all_.strip, to, full, {c, w, h, n}, count, mask);
  }
  void copy_weights(uint32_t to, uint32_t full, int c, int tap, int first, int count,
                    uint16_t mask) {
    copy(all_.weight, to, full, {c, tap, first, 0}, count, mask);
  }

  uint64_t operand(uint32_t offset) { return vovnet_fast::conv_sm90::descriptor(offset); }
  void begin_products() { begun_ = true; }
  template <class T, int N>
  void multiply_add(float (&sums)[N / 2], uint64_t a, uint64_t b, bool add) {
    require(begun_, "products without a fence before them");
    const bool half = std::is_same_v<T, vovnet_fast::float16>;
    Product product{};
    product.a = a;
    product.b = b;
    product.add = add;
    product.n = N;
    product.widen = half ? widen_half : widen_bfloat;
    product.e4m3 = vovnet_fast::conv_sm90::kIsE4m3<T>;
    if (product.e4m3) product.widen = widen_byte;
    all_.issued += cta_.post(thread_, products_++, product, sums);
  }
  void commit_products() {
    begun_ = false;
    groups_.push_back(products_);
  }
  template <int PENDING>
  void wait_products() {
    if (groups_.size() <= PENDING) return;
    cta_.wait_products(thread_, groups_[groups_.size() - 1 - PENDING]);
    groups_.erase(groups_.begin(), groups_.end() - PENDING);
  }

  void load_shared(int rank, uint32_t offset, float (&numbers)[4]) {
    require(offset % 16 == 0, "a load of 16 bytes of shared memory is not aligned");
    memcpy(numbers, all_.cta(rank).at(offset, 16), 16);
  }
  uint32_t shuffle_xor(uint32_t word, int lanes) { return cta_.swap(thread_, word, lanes); }
  float shuffle_xor(float value, int lanes) {
    uint32_t word;
    memcpy(&word, &value, 4);
    word = cta_.swap(thread_, word, lanes);
    memcpy(&value, &word, 4);
    return value;
  }
  template <class T>
  uint32_t narrow_pair(float a, float b) {
    const T pair[2] = {vovnet_fast::narrow<T>(a), vovnet_fast::narrow<T>(b)};
    uint32_t word;
    memcpy(&word, pair, 4);
    return word;
  }
  uint32_t narrow_e4m3(float a, float b) { return narrow_byte(a) | narrow_byte(b) << 8; }
  void widen_e4m3(uint32_t pair, float& a, float& b) {
    a = widen_byte(pair & 0xff), b = widen_byte(pair >> 8);
  }
  uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
  uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000); }
  template <size_t COUNT>
  void settle(float (&)[COUNT]) {
    require(groups_.empty(), "sums are read before they were waited for");
  }
  template <class T>
  void load(const T* from, uint32_t (&words)[4]) {
    require(reinterpret_cast<uintptr_t>(from) % 16 == 0, "a load of 16 bytes is not aligned");
    memcpy(words, from, 16);
  }
  template <class T>
  void store(T* to, const uint32_t (&words)[4]) {
    Cluster& all = all_;
    cta_.scheduler().wait("copies under an epilogue",
                          [&all] { return all.fetched >= all.timing.ahead; });
    cta_.scheduler().wait("products under an epilogue",
                          [&all] { return all.issued >= all.timing.multiplied; });
    require(reinterpret_cast<uintptr_t>(to) % 16 == 0, "a store of 16 bytes is not aligned");
    memcpy(to, words, 16);
  }
  void store_words(uint8_t* to, const uint32_t (&words)[2]) {
    require(reinterpret_cast<uintptr_t>(to) % 8 == 0, "a store of 8 bytes is not aligned");
    memcpy(to, words, 8);
  }
  void store_pair(float* to, float a, float b) {
    require(reinterpret_cast<uintptr_t>(to) % 8 == 0, "a store of 8 bytes is not aligned");
    to[0] = a, to[1] = b;
  }

 private:
  void copy(const Box& box, uint32_t to, uint32_t full, std::array<int, 4> at, int count,
            uint16_t mask) {
    const auto own = static_cast<uint16_t>(1u << rank_);
    all_.copy({&box, to, full, {at[0], at[1], at[2], at[3]}, 0}, count > 1 ? mask : own, rank_);
  }

  Cluster& all_;
  Cta& cta_;
  int rank_, thread_, index_, clusters_;
  bool published_ = false, begun_ = false;
  int64_t products_ = 0;
  std::vector<int64_t> groups_;  // Number of products at the end of each that may be under way.
};

// ---- Launches ----------------------------------------------------------------------------------

// Runs the kernel of a tile on at most so many CTAs. Returns the bytes that copies asked for.
template <class T, int N, int BLOCKS>
int64_t run(const Problem& p, const Box& strip, const Box& weight, int ctas, Timing timing,
            unsigned seed) {
  // As many clusters as there are processors for, one a CTA.
  const int size = vovnet_fast::conv_sm90::cluster_size(p);
  const int clusters = std::min(std::max(ctas / size, 1), p.tiles);
  int64_t fetched = 0;
  for (int index = 0; index < clusters; ++index) {
    Cluster cluster(p, strip, weight, timing, seed + index);
    cluster.run([&](int rank, int i) {
      Thread thread(cluster, rank, i, index, clusters);
      vovnet_fast::conv_sm90::run_thread<T, N, BLOCKS>(thread, p);
    });
    fetched += cluster.fetched;
  }
  return fetched;
}

using Run = int64_t (*)(const Problem&, const Box&, const Box&, int, Timing, unsigned);

// 0, or 1 with the words of an error.
template <class Body>
int guarded(char* error, int size, const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& found) {
    snprintf(error, static_cast<size_t>(size), "%s", found.what());
    return 1;
  }
}

}  // namespace simulator
