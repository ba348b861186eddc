// Calls of ops of the CPU half, kept so that they can be made again without Python in between.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../conditions.h"
#include "../ops.h"

namespace vovnet_fast {
namespace cpu {

// Whoever makes the calls again answers for the memory that they point to. What lies elsewhere
// each time, such as the image, is named once all calls are recorded (`move`), and its new
// addresses are given to `run`.
class Recording {
 public:
  struct Memory {
    uintptr_t first;
    uint64_t bytes;
  };

  explicit Recording(bool packs = false) : packs_(packs) {}

  // Memory of zeros is an empty recording too: Python can make one without its constructor.
  static void* operator new(size_t bytes) {
    void* memory = std::calloc(1, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }
  static void operator delete(void* memory) { std::free(memory); }

  template <class Params>
  void add(const Params& params, std::function<void(const Params&, int)> op) {
    if constexpr (std::is_same_v<Params, MaxPoolParams>) {
      if (add_to_gates(params)) return;
    }
    calls_.push_back(std::make_unique<CallOf<Params>>(params, std::move(op)));
  }

  size_t size() const { return calls_.size(); }

  // Whether calls that pack weights are among those to add.
  bool packs() const { return packs_; }

  // Calls are added between these: nobody makes or moves them meanwhile.
  void begin() { take(); }
  void end() { busy_ = false; }

  // The first and the last call that a piece of memory is used by, as numbers from 0 on; of a piece
  // that none uses the first is after the last.
  struct Uses {
    size_t first, last;
  };

  struct Movable {
    std::vector<Uses> uses;  // of each piece
    size_t elsewhere;        // addresses that lie in no piece, and stay what they are
  };

  // From now on `run` takes addresses for these pieces of memory. They do not overlap.
  Movable move(const std::vector<Memory>& pieces) {
    take();
    const Done done{busy_};
    moved_.clear();
    pieces_ = pieces;
    Movable found{std::vector<Uses>(pieces.size(), Uses{calls_.size(), 0}), 0};
    for (size_t number = 0; number < calls_.size(); ++number) {
      Call* const call = calls_[number].get();
      call->each_pointer([&](void* field) {
        uintptr_t address;
        std::memcpy(&address, field, sizeof(address));
        if (address == 0) return;
        bool inside = false;
        for (size_t i = 0; i < pieces.size(); ++i) {
          // An address before the piece wraps around, past its end.
          const uint64_t offset = address - pieces[i].first;
          if (offset >= pieces[i].bytes) continue;
          inside = true;
          moved_.push_back({field, i, offset, call});
          found.uses[i] = {std::min(found.uses[i].first, number), number};
        }
        if (!inside) ++found.elsewhere;
      });
    }
    return found;
  }

  // Make all calls, in their order. For one thread at a time.
  void run(const std::vector<uintptr_t>& addresses, int threads) {
    if (addresses.size() != pieces_.size()) {
      throw std::invalid_argument("the recording needs the addresses of " +
                                  std::to_string(pieces_.size()) + " pieces of memory, got " +
                                  std::to_string(addresses.size()));
    }
    take();
    const Done done{busy_};
    for (size_t i = 0; i < addresses.size(); ++i) {
      if (pieces_[i].bytes > 0) {
        checks::address("a piece's address", reinterpret_cast<void*>(addresses[i]), 1);
      }
    }
    for (const Moved& moved : moved_) {
      const uintptr_t address = addresses[moved.piece] + moved.offset;
      std::memcpy(moved.field, &address, sizeof(address));
    }
    const Call* checked = nullptr;
    for (const Moved& moved : moved_) {
      if (moved.call != checked) moved.call->check();
      checked = moved.call;
    }
    for (const auto& call : calls_) call->run(threads);
  }

 private:
  struct Call {
    virtual ~Call() = default;
    virtual void run(int threads) const = 0;
    virtual void check() = 0;
    // `each` gets the address of every field that is a pointer, or begins with one.
    virtual void each_pointer(const std::function<void(void*)>& each) = 0;
  };

  template <class Params>
  struct CallOf final : Call {
    CallOf(const Params& params, std::function<void(const Params&, int)> op)
        : params(params), op(std::move(op)) {}

    void run(int threads) const override { op(params, threads); }
    void check() override { vovnet_fast::check(params); }

    void each_pointer(const std::function<void(void*)>& each) override {
      Fields<Params>::visit(params, [&](auto&... fields) { (pass(each, fields), ...); });
    }

    Params params;
    std::function<void(const Params&, int)> op;
  };

  // Gates and the pool behind them are one call, which reads what they make while it is near.
  struct GatedPool final : Call {
    GatedPool(const ApplyGatesParams& gates, const MaxPoolParams& pool)
        : gates(gates), pool(pool) {}

    void run(int threads) const override { gated_pool(gates, pool, threads); }
    void check() override {
      vovnet_fast::check(gates);
      vovnet_fast::check(pool);
    }
    void each_pointer(const std::function<void(void*)>& each) override {
      const auto next = [&](auto&... fields) { (pass(each, fields), ...); };
      Fields<ApplyGatesParams>::visit(gates, next);
      Fields<MaxPoolParams>::visit(pool, next);
    }

    ApplyGatesParams gates;
    MaxPoolParams pool;
  };

  bool add_to_gates(const MaxPoolParams& pool) {
    if (calls_.empty()) return false;
    const auto* last = dynamic_cast<const CallOf<ApplyGatesParams>*>(calls_.back().get());
    if (last == nullptr || !can_follow(pool, last->params)) return false;
    calls_.back() = std::make_unique<GatedPool>(last->params, pool);
    return true;
  }

  // Whether the pool takes all that the gates make, and may write before they have read all.
  static bool can_follow(const MaxPoolParams& pool, const ApplyGatesParams& gates) {
    const auto same = [](const View& a, const View& b) {
      return a.data == b.data && a.stride_n == b.stride_n && a.stride_h == b.stride_h &&
             a.stride_w == b.stride_w;
    };
    if (!same(pool.x, gates.out) || pool.n != gates.n || pool.height != gates.height ||
        pool.width != gates.width || pool.c != gates.c || pool.dtype != gates.dtype ||
        pool.argmax != nullptr || pool.n < 1 || pool.out_height < 1 || pool.out_width < 1) {
      return false;
    }
    const int64_t bytes = checks::bytes_of("dtype", pool.dtype);
    const auto memory = [&](const View& view, int64_t height, int64_t width) {
      const int64_t last = (pool.n - 1) * view.stride_n + (height - 1) * view.stride_h +
                           (width - 1) * view.stride_w + pool.c;
      return Memory{reinterpret_cast<uintptr_t>(view.data), static_cast<uint64_t>(last * bytes)};
    };
    const Memory out = memory(pool.out, pool.out_height, pool.out_width);
    const auto apart = [&](Memory in) {
      return in.first == 0 || out.first + out.bytes <= in.first || in.first + in.bytes <= out.first;
    };
    constexpr int64_t kMostBytes = 8;  // of a gate
    return apart(memory(gates.z, gates.height, gates.width)) &&
           apart(memory(gates.identity, gates.height, gates.width)) &&
           apart({reinterpret_cast<uintptr_t>(gates.gates),
                  static_cast<uint64_t>(gates.n * gates.c * kMostBytes)});
  }

  template <class T>
  static void pass(const std::function<void(void*)>& each, T*& field) {
    each(&field);
  }
  static void pass(const std::function<void(void*)>& each, View& field) { each(&field.data); }
  static void pass(const std::function<void(void*)>& each, Array& field) { each(&field.data); }
  static void pass(const std::function<void(void*)>&, int32_t) {}
  static void pass(const std::function<void(void*)>&, int64_t) {}
  static void pass(const std::function<void(void*)>&, double) {}

  struct Moved {
    void* field;  // in the arguments of a call
    size_t piece;
    uint64_t offset;
    Call* call;
  };

  struct Done {
    std::atomic<bool>& busy;
    ~Done() { busy = false; }
  };

  void take() {
    if (busy_.exchange(true)) {
      throw std::logic_error("a recording is for one thread at a time: make one a thread");
    }
  }

  std::vector<std::unique_ptr<Call>> calls_;
  std::vector<Moved> moved_;
  std::vector<Memory> pieces_;
  std::atomic<bool> busy_{false};
  const bool packs_;
};

static_assert(sizeof(uintptr_t) == sizeof(void*), "pointers are exchanged as integers");

}  // namespace cpu
}  // namespace vovnet_fast
