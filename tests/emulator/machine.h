// A kernel's thread blocks, one after the other; warps of one in turns of random length, copies done in random order.
#pragma once

#include <array>
#include <random>

#include "memory.h"

constexpr int REGISTERS = 65536;  // of a multiprocessor

enum class Copying { load, store, add, line };

// What the unit that copies is told of an array, in the place of a CUtensorMap.
struct TensorMap {
  uint64_t magic, base;
  uint8_t item, rank, swizzle, type;
  uint32_t sizes[5];    // innermost first, as all of these
  uint16_t window[5];
  uint64_t strides[4];  // bytes, of all axes but the innermost

  uint32_t bytes() const {
    uint32_t n = item;
    for (int axis = 0; axis < rank; axis++) n *= window[axis];
    return n;
  }
};
static_assert(sizeof(TensorMap) <= 128);
constexpr uint64_t MAGIC = 0x50414d524f534e54;

struct Copy {
  Copying kind;
  const Instruction* instruction;
  int warp, lane, group;
  uint32_t shared, bytes;
  TensorMap map;
  int32_t start[5];      // of the window
  uint64_t global;       // of a line
  uint32_t barrier;      // of a load
  Clock clock;           // of the warp that asked
  std::vector<uint8_t> taken;  // from shared memory, when that was read
};

// In shared memory, an mbarrier.
struct Barrier {
  uint32_t expected, pending;
  int64_t bytes = 0;  // that copies are still to bring
  uint64_t phase = 0;
  int number;          // for clocks
  Clock coming, done;  // what those know who arrive, and who arrived in the phase before
};

// One of the sixteen barriers of a thread block.
struct Meeting {
  std::vector<int> warps;
  Clock clock;
};

// Products asked for together: what they read, and their registers.
struct Group {
  std::vector<Span> spans;
  std::vector<int> rows;
};

enum : uint8_t { FREE, FACTOR, SUM };  // a register, or one of a product that may not be done

struct Warp {
  int number, registers;
  std::vector<uint64_t> file;     // (rows, lanes)
  std::vector<uint8_t> busy;      // by row: FREE, FACTOR, SUM
  std::vector<uint64_t> changed;  // by row: when, by `steps`
  uint64_t steps = 0, fenced = 0;
  uint32_t at[LANES] = {};
  Lanes gone = 0;
  bool meets = false;
  int copies[LANES] = {};  // groups of copies committed by each thread
  Group open;
  std::vector<Group> products;
  Clock clock;

  uint64_t* row(int n) { return &file[(size_t)n * LANES]; }
  uint64_t* row(const Operand& o) {
    if (o.row < 0) fail("an operand that is no register: " + o.name);
    return row(o.row);
  }
  bool ended() const { return gone == ~Lanes(0); }
  uint32_t next() const {
    uint32_t least = ~0u;
    for (int l = 0; l < LANES; l++)
      if (!(gone >> l & 1)) least = std::min(least, at[l]);
    return least;
  }
  Lanes lanes_at(uint32_t place) const {
    Lanes lanes = 0;
    for (int l = 0; l < LANES; l++) lanes |= Lanes(!(gone >> l & 1) && at[l] == place) << l;
    return lanes;
  }
  Lanes predicate(const Operand& o) {
    uint64_t* values = row(o);
    Lanes lanes = 0;
    for (int l = 0; l < LANES; l++) lanes |= Lanes(values[l] != 0) << l;
    return o.negated ? ~lanes : lanes;
  }
  void tick() { clock.at[number]++; }
};

struct Machine {
  const Program& program;
  std::mt19937 random;
  Notes notes;
  void** arguments;
  uint32_t grid[3], block[3], place[3];
  uint32_t shared_bytes;
  std::vector<std::pair<uint64_t, uint64_t>> arrays;  // beginnings and ends in global memory

  SharedMemory shared{0, &notes};
  std::vector<Warp> warps;
  std::map<uint32_t, Barrier> barriers;
  Meeting meetings[16];
  std::vector<Copy> copies;
  int free_registers = 0;
  uint32_t haste = 0;   // of 64: how often a copy goes on while warps do

  Machine(const Program& program, uint32_t seed) : program(program), random(seed) {}

  void run() {
    if (shared_bytes > MOST_SHARED) fail(format("%u bytes of shared memory, and there are %d", shared_bytes, MOST_SHARED));
    for (place[2] = 0; place[2] < grid[2]; place[2]++)
      for (place[1] = 0; place[1] < grid[1]; place[1]++)
        for (place[0] = 0; place[0] < grid[0]; place[0]++) {
          try {
            run_block();
          } catch (std::exception& error) {
            fail(format("thread block (%u, %u, %u): ", place[0], place[1], place[2]) + error.what());
          }
        }
  }

  uint8_t* global(uint64_t address, uint32_t length, const Instruction& i) {
    for (auto [begin, end] : arrays)
      if (begin <= address && address + length <= end) return (uint8_t*)address;
    fail(format("%s: %u bytes at %llx are in no array", ::place(i).c_str(), length, (unsigned long long)address));
  }

  uint64_t address(Warp& w, const Operand& o, int lane) { return w.row(o.parts.at(0))[lane] + o.offset; }

  Barrier& barrier(uint32_t at, const Instruction& i) {
    auto found = barriers.find(at);
    if (found == barriers.end()) fail(format("%s: there is no barrier at %d", ::place(i).c_str(), (int)at - SHARED_BASE));
    return found->second;
  }

  void settle(Barrier& b) {
    if (b.pending || b.bytes) return;
    b.phase++;
    b.pending = b.expected;
    b.done = b.coming;
  }

  void finish(size_t copy);  // or the half of it that is next: units.h

 private:
  void run_block();
  void start(Warp& w, int number);
  bool step(Warp& w);
  void check_registers(Warp& w, const Instruction& i);
  bool turn();
  [[noreturn]] void tell_who_waits();
};

inline void Machine::run_block() {
  int count = (int)(block[0] * block[1] * block[2] / LANES);
  if (count > MOST_WARPS || block[0] % LANES) fail("a thread block of no whole warps, or of too many");
  shared = SharedMemory(shared_bytes, &notes);
  barriers.clear(), copies.clear();
  for (Meeting& meeting : meetings) meeting = {};
  warps.assign(count, {});
  for (int n = 0; n < count; n++) start(warps[n], n);
  free_registers = REGISTERS - count * LANES * warps[0].registers;
  haste = std::array{0, 1, 16, 64}[random() % 4];
  while (turn()) {}
  for (Copy& copy : copies)
    if (copy.kind == Copying::load || copy.taken.empty())
      notes.add(::place(*copy.instruction) + " goes on when its thread block is gone");
  while (!copies.empty()) finish(random() % copies.size());
}

inline void Machine::start(Warp& w, int number) {
  w.number = number;
  w.registers = std::min<int>(255, REGISTERS / (block[0] * block[1] * block[2])) / 8 * 8;
  w.file.assign((size_t)program.rows * LANES, 0xdead7fa0dead7fa0);  // nobody shall count on what a register begins with
  w.busy.assign(program.rows, FREE);
  w.changed.assign(program.rows, 0);
  w.tick();
  for (auto [value, row] : program.numbers) std::fill_n(w.row(row), LANES, value);
  for (auto& [name, row] : program.special)
    for (int l = 0; l < LANES; l++) {
      uint32_t thread = number * LANES + l, axis = name.back() - 'x';
      uint32_t within[3] = {thread % block[0], thread / block[0] % block[1], thread / block[0] / block[1]};
      w.row(row)[l] = name == "%laneid" ? l : name == "%warpid" ? number : name[1] == 't' ? within[axis]
                      : name.find("%ntid") == 0 ? block[axis] : name.find("%nctaid") == 0 ? grid[axis] : place[axis];
    }
}

// Some instructions of each warp, in random order; false when all have ended.
inline bool Machine::turn() {
  std::vector<int> order;
  for (Warp& w : warps)
    if (!w.ended()) order.push_back(w.number);
  if (order.empty()) return false;
  std::shuffle(order.begin(), order.end(), random);
  bool moved = false;
  for (int number : order) {
    Warp& w = warps[number];
    for (int left = 1 + random() % 200; left-- && !w.ended() && step(w);) moved = true;
    if (!copies.empty() && random() % 64 < haste) finish(random() % copies.size()), moved = true;
  }
  if (!moved && copies.empty()) tell_who_waits();
  if (!moved) finish(random() % copies.size());
  return true;
}

inline void Machine::tell_who_waits() {
  Text all = "everybody waits, for ever:";
  for (Warp& w : warps)
    if (!w.ended()) all += format(" warp %d at ", w.number) + ::place(program.code[w.next()]) + ";";
  fail(all);
}

// The next instruction of the threads that are furthest behind; false where they have to wait.
inline bool Machine::step(Warp& w) {
  uint32_t at = w.next();
  if (at >= program.code.size()) fail("a warp runs past the end of the kernel");
  const Instruction& i = program.code[at];
  Lanes here = w.lanes_at(at), lanes = here;
  if (i.guard >= 0) {
    Operand guard;
    guard.row = i.guard, guard.negated = i.unless;
    lanes &= w.predicate(guard);
  }
  if (i.together && here != ~Lanes(0)) fail(::place(i) + " is for all threads of a warp, and only some are here");
  w.steps++;
  check_registers(w, i);
  Outcome outcome = i.run(*this, w, i, lanes);
  for (int l = 0; l < LANES && outcome != Outcome::waits; l++)
    if (here >> l & 1 && !(outcome == Outcome::jumped && lanes >> l & 1)) w.at[l] = at + 1;
  return outcome != Outcome::waits;
}

// A product has its registers until it is waited for.
inline void Machine::check_registers(Warp& w, const Instruction& i) {
  if (i.words[0] == "wgmma") return;
  for (int row : i.reads)
    if (w.busy[row] == SUM) return notes.add(::place(i) + " reads sums of a product that may not be done");
  for (int row : i.writes) {
    if (w.busy[row]) return notes.add(::place(i) + " changes a register of a product that may not be done");
    w.changed[row] = w.steps;
  }
}
