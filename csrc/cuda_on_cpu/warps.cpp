// Shared memory, asynchronous copies and the products of warps.h.
#include "warps.h"

#include <deque>
#include <set>
#include <vector>

#include "shared_memory.h"

namespace cuda_on_cpu {
namespace {

constexpr uint32_t kCell = 4;       // Bytes that are followed together.
constexpr uint32_t kUnit = 16;      // Bytes of a copy, and of a row of ldmatrix.
constexpr uint32_t kLineUnits = 8;  // Units that the banks serve at once.
constexpr int kPhase = 8;           // Lanes that are served together.
constexpr int kBanks = 32;          // Of 4 bytes.
constexpr int kNobody = -1, kMany = -2;
constexpr int kPoison = 0xff;

struct Cell {
  int writer = kNobody, reader = kNobody;
  uint32_t written = 0, read = 0;  // Behind how many barriers.
  bool there = false, under_way = false;
};

struct Copy {
  uint32_t to;
  const void* from;  // Null: zeros.
};

struct Thread {
  std::vector<Copy> open;  // In no group yet.
  std::deque<std::vector<Copy>> groups;
  size_t copy_calls = 0, unit_calls = 0, word_calls = 0;
};

// Addresses that lanes of a warp gave with the same call.
struct Call {
  uint32_t at[kWarp];
  uint32_t lanes = 0;
};

std::vector<char> memory;
std::vector<Cell> cells;
std::vector<Thread> threads;
std::vector<std::vector<Call>> copy_calls, unit_calls, word_calls;  // By warp.
Counts counts = {};
bool early = false, tf32 = true;

std::string where(uint32_t offset) {
  return "byte " + std::to_string(offset) + " of shared memory";
}

std::string by(int thread) { return " thread " + std::to_string(thread); }

void check_place(uint32_t offset, uint32_t bytes) {
  if (offset % bytes != 0) fail(where(offset) + " is not aligned to " + std::to_string(bytes));
  if (offset + bytes > memory.size()) {
    fail(where(offset) + " is outside its " + std::to_string(memory.size()) + " bytes");
  }
}

void reads(uint32_t offset, uint32_t bytes) {
  check_place(offset, bytes);
  const int me = thread();
  const uint32_t now = barriers_passed();
  for (uint32_t at = offset; at < offset + bytes; at += kCell) {
    Cell& cell = cells[at / kCell];
    if (cell.under_way)
      fail(where(at) + " is read, and a copy of" + by(cell.writer) + " is on its way there");
    if (!cell.there) fail(where(at) + " is read, and nobody has written it");
    if (cell.writer != me && cell.written == now) {
      fail(where(at) + " is read, and" + by(cell.writer) + " wrote it, with no barrier between");
    }
    cell.reader = cell.read == now && cell.reader != kNobody && cell.reader != me ? kMany : me;
    cell.read = now;
  }
}

void writes(uint32_t offset, uint32_t bytes, bool under_way) {
  check_place(offset, bytes);
  const int me = thread();
  const uint32_t now = barriers_passed();
  for (uint32_t at = offset; at < offset + bytes; at += kCell) {
    Cell& cell = cells[at / kCell];
    if (cell.under_way)
      fail(where(at) + " is written, and a copy of" + by(cell.writer) + " is on its way there");
    if (cell.there && cell.writer != me && cell.written == now) {
      fail(where(at) + " is written, and" + by(cell.writer) + " wrote it, with no barrier between");
    }
    if (cell.reader != kNobody && cell.reader != me && cell.read == now) {
      fail(where(at) + " is written, and" +
           (cell.reader == kMany ? std::string(" other threads") : by(cell.reader)) +
           " read it, with no barrier between");
    }
    cell.writer = me;
    cell.written = now;
    cell.there = true;
    cell.under_way = under_way;
  }
}

void land(const Copy& copy) {
  if (copy.from == nullptr) {
    memset(&memory[copy.to], 0, kUnit);
  } else {
    memcpy(&memory[copy.to], copy.from, kUnit);
  }
}

// Lanes of a phase whose units lie in the same banks: what that takes beyond one turn. Those that
// have the same unit share it.
int conflicts(const uint32_t* addresses, uint32_t lanes) {
  int turns[kLineUnits] = {}, most = 0;
  for (int lane = 0; lane < kPhase; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    const auto same = [&](int other) {
      return (lanes >> other & 1) != 0 && addresses[other] == addresses[lane];
    };
    bool shared = false;
    for (int other = 0; other < lane; ++other) shared = shared || same(other);
    if (shared) continue;
    int& count = turns[addresses[lane] / kUnit % kLineUnits];
    most = std::max(most, ++count);
  }
  return std::max(most - 1, 0);
}

// The same of a warp's words: lanes that ask for the same one are served together.
int word_conflicts(const Call& call) {
  std::set<uint32_t> of_bank[kBanks];
  size_t most = 1;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((call.lanes >> lane & 1) == 0) continue;
    const uint32_t word = call.at[lane] / kCell;
    of_bank[word % kBanks].insert(word);
    most = std::max(most, of_bank[word % kBanks].size());
  }
  return static_cast<int>(most - 1);
}

// What the calls of all warps take beyond one turn a phase.
uint64_t conflicts(const std::vector<std::vector<Call>>& calls) {
  uint64_t found = 0;
  for (const auto& of_warp : calls) {
    for (const Call& call : of_warp) {
      for (int first = 0; first < kWarp; first += kPhase) {
        found += conflicts(call.at + first, call.lanes >> first);
      }
    }
  }
  return found;
}

// Call `number` of this lane.
void note(std::vector<std::vector<Call>>& calls, size_t number, uint32_t at) {
  auto& of_warp = calls[thread() / kWarp];
  if (of_warp.size() <= number) of_warp.resize(number + 1);
  of_warp[number].at[lane()] = at;
  of_warp[number].lanes |= 1u << lane();
}

}  // namespace

void block_begins(unsigned count, uint32_t shared_bytes) {
  memory.assign(shared_bytes, static_cast<char>(kPoison));
  cells.assign(shared_bytes / kCell, Cell());
  threads.assign(count, Thread());
  copy_calls.assign((count + kWarp - 1) / kWarp, {});
  unit_calls = word_calls = copy_calls;
  counts.shared_bytes = std::max(counts.shared_bytes, uint64_t{shared_bytes});
}

void thread_ends() {
  const Thread& mine = threads[thread()];
  if (!mine.open.empty()) fail("it returns, and copies are in no group");
  for (const auto& group : mine.groups) {
    if (!group.empty()) fail("it returns, and has not waited for copies");
  }
}

void block_ends() {
  counts.copy_conflicts += conflicts(copy_calls);
  counts.unit_conflicts += conflicts(unit_calls);
  for (const auto& of_warp : word_calls) {
    counts.words += of_warp.size();
    for (const Call& call : of_warp) counts.word_conflicts += word_conflicts(call);
  }
}

void copy_async(uint32_t to, const void* from, bool inside, bool wanted) {
  Thread& mine = threads[thread()];
  const size_t number = mine.copy_calls++;  // All lanes make the same calls, wanted or not.
  if (!wanted) return;
  if (inside) check_aligned(from, kUnit);
  writes(to, kUnit, true);
  note(copy_calls, number, to);
  ++counts.copies;
  mine.open.push_back({to, inside ? from : nullptr});
  if (early) land(mine.open.back());
}

void commit_copies() {
  Thread& mine = threads[thread()];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void wait_copies(int pending) {
  Thread& mine = threads[thread()];
  for (; mine.groups.size() > static_cast<size_t>(pending); mine.groups.pop_front()) {
    for (const Copy& copy : mine.groups.front()) {
      land(copy);
      for (uint32_t at = copy.to; at < copy.to + kUnit; at += kCell) {
        cells[at / kCell].under_way = false;
        cells[at / kCell].written = barriers_passed();
      }
    }
  }
}

float load_shared(uint32_t from) {
  reads(from, sizeof(float));
  float value;
  memcpy(&value, &memory[from], sizeof value);
  return value;
}

void store_shared(uint32_t to, float value) {
  writes(to, sizeof value, false);
  memcpy(&memory[to], &value, sizeof value);
}

void load_unit(void* unit, uint32_t from) {
  reads(from, kUnit);
  note(unit_calls, threads[thread()].unit_calls++, from);
  ++counts.units;
  memcpy(unit, &memory[from], kUnit);
}

void store_unit(uint32_t to, const void* unit) {
  writes(to, kUnit, false);
  note(unit_calls, threads[thread()].unit_calls++, to);
  ++counts.units;
  memcpy(&memory[to], unit, kUnit);
}

uint32_t load_word(uint32_t from) {
  reads(from, kCell);
  note(word_calls, threads[thread()].word_calls++, from);
  uint32_t word;
  memcpy(&word, &memory[from], sizeof word);
  return word;
}

// ---- ldmatrix ----------------------------------------------------------------------------------

namespace {

constexpr int kMatrixRows = 8, kRowWords = 4;

struct Rows {
  uint32_t address;
  uint32_t row[kRowWords];  // That this lane points at.
  uint32_t* words;
  int count;
  bool transposed;
};

// "Each thread of the first eight points at a row of the first matrix", and so on; thread 4r + w
// gets word w of row r of every matrix.
void hand_out(void* const (&brought)[kWarp]) {
  const int count = static_cast<Rows*>(brought[0])->count;
  for (int matrix = 0; matrix < count; ++matrix) {
    uint32_t addresses[kMatrixRows];
    for (int i = 0; i < kMatrixRows; ++i) {
      addresses[i] = static_cast<Rows*>(brought[matrix * kMatrixRows + i])->address;
    }
    ++counts.matrices;
    counts.matrix_conflicts += conflicts(addresses, ~0u);
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& mine = *static_cast<Rows*>(brought[lane]);
      const auto row = [&](int i) {
        return static_cast<Rows*>(brought[matrix * kMatrixRows + i])->row;
      };
      if (mine.transposed) {  // Of rows 2w and 2w + 1, number r.
        const int number = lane / kRowWords, first = lane % kRowWords * 2;
        const auto half = [&](int i) { return row(i)[number / 2] >> number % 2 * 16 & 0xffffu; };
        mine.words[matrix] = half(first) | half(first + 1) << 16;
      } else {
        mine.words[matrix] = row(lane / kRowWords)[lane % kRowWords];
      }
    }
  }
}

}  // namespace

void load_matrices(const char* place, uint32_t* words, int count, uint32_t from) {
  Rows mine = {from, {}, words, count, false};
  if (lane() < count * kMatrixRows) {
    reads(from, kUnit);
    memcpy(mine.row, &memory[from], sizeof mine.row);
  }
  together(place, hand_out, &mine);
}

void load_transposed(const char* place, uint32_t (&words)[4], uint32_t from) {
  Rows mine = {from, {}, words, 4, true};
  reads(from, kUnit);
  memcpy(mine.row, &memory[from], sizeof mine.row);
  together(place, hand_out, &mine);
}

// ---- mma.sync ----------------------------------------------------------------------------------

namespace {

struct Operand {
  Operands kind;
  float* sums;
  const uint32_t* a;
  uint32_t b[2];
};

constexpr int kM = 16, kN = 8;

float number(Operands kind, uint32_t word, int half) {
  if (kind == Operands::kTf32) {
    const uint32_t bits = tf32 ? word & ~0x1fffu : word;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  const auto bits = static_cast<uint16_t>(word >> 16 * half);
  return kind == Operands::kFloat16 ? vovnet_fast::widen(vovnet_fast::float16{bits})
                                    : vovnet_fast::widen(vovnet_fast::bfloat16{bits});
}

// "Matrix Fragments for mma.m16n8k16 with floating point type", and "for mma.m16n8k8" with .tf32:
// with g = lane / 4 and t = lane % 4, word i of A has row g + 8 * (i % 2), and of the k-th half of
// the columns, k = i / 2, number t where words are numbers, and 2t and 2t + 1 where they are two.
void multiply(void* const (&brought)[kWarp]) {
  const Operands kind = static_cast<Operand*>(brought[0])->kind;
  const int each = kind == Operands::kTf32 ? 1 : 2, depth = 8 * each;
  float a[kM][16], b[16][kN];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& operand = *static_cast<Operand*>(brought[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < each; ++e) {
      for (int i = 0; i < 4; ++i) {
        a[g + 8 * (i % 2)][i / 2 * 4 * each + t * each + e] = number(kind, operand.a[i], e);
      }
      for (int i = 0; i < 2; ++i) b[i * 4 * each + t * each + e][g] = number(kind, operand.b[i], e);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* sums = static_cast<Operand*>(brought[lane])->sums;
    for (int i = 0; i < 4; ++i) {  // c0, c1: row g; c2, c3: row g + 8; columns 2t and 2t + 1.
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = sums[i];
      for (int k = 0; k < depth; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      sums[i] = static_cast<float>(sum);
    }
  }
  ++counts.products;
}

}  // namespace

void multiply_add(const char* place, Operands kind, float (&sums)[4], const uint32_t (&a)[4],
                  uint32_t b0, uint32_t b1) {
  Operand mine = {kind, sums, a, {b0, b1}};
  together(place, multiply, &mine);
}

uint32_t to_tf32(uint32_t bits) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite && tf32 ? (bits + 0x1000u) & ~0x1fffu : bits;
}

Counts take_counts() {
  const Counts taken = counts;
  counts = {};
  return taken;
}

void copies_land_early(bool choice) { early = choice; }
void tf32_rounds(bool choice) { tf32 = choice; }

}  // namespace cuda_on_cpu
