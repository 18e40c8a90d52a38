// Instructions of memory, barriers, the unit that copies and the one that multiplies.
#pragma once

#include "arithmetic.h"

inline Access access(const Instruction& i, Warp& w, bool other_unit) { return {i, w.number, w.clock, other_unit}; }

// ---- loads and stores

inline Outcome load_parameter(Machine& m, Warp& w, const Instruction& i, Lanes lanes) {
  auto parameter = m.program.parameters.find(i[1].name);
  if (parameter == m.program.parameters.end()) fail("there is no parameter " + i[1].name);
  uint64_t value = 0;
  memcpy(&value, (char*)m.arguments[parameter->second] + i[1].offset, i.has("b64") || i.has("u64") ? 8 : 4);
  each(lanes, [&](int l) { w.row(i[0])[l] = value; });
  return Outcome::done;
}

inline uint8_t* touched(Machine& m, Warp& w, const Instruction& i, const Operand& where, int lane, uint32_t length, bool store) {
  uint64_t address = m.address(w, where, lane);
  if (address % length) fail(format("%s: an address that is no multiple of %u", place(i).c_str(), length));
  if (!i.has("shared") && !i.has("shared::cta")) return m.global(address, length, i);
  uint8_t* bytes = m.shared.at((uint32_t)address, length, i);
  Span span{(uint32_t)address, (uint32_t)address + length};
  uint32_t now = w.clock.at[w.number];
  if (store) {
    m.shared.check_write(access(i, w, false), span);
    m.shared.note_store(w.number, now, span);
  } else {
    m.shared.check_read(access(i, w, false), span);
    m.shared.note_read(w.number, now, span);
  }
  return bytes;
}

inline Handler load_or_store(const Instruction& i) {
  return of_number(i.type(), [&]<class T>(T) -> Handler {
    return [](Machine& m, Warp& w, const Instruction& i, Lanes lanes) {
      bool store = i.is("st.");
      const Operand &where = i[!store], &what = i[store];
      std::vector<Operand> values = what.parts.empty() ? std::vector<Operand>{what} : what.parts;
      each(lanes, [&](int l) {
        uint8_t* bytes = touched(m, w, i, where, l, (uint32_t)(values.size() * sizeof(T)), store);
        for (size_t n = 0; n < values.size(); n++) {
          T value = get<T>(w.row(values[n])[l]);
          if (store) memcpy(bytes + n * sizeof(T), &value, sizeof(T));
          else memcpy(&value, bytes + n * sizeof(T), sizeof(T)), w.row(values[n])[l] = put(value);
        }
      });
      return Outcome::done;
    };
  });
}

// Matrices of 8 x 8 numbers of 16 bits, a row at the address that each of 8 threads has; thread l has the numbers 2 l
// and 2 l + 1 of each matrix, or of its transpose.
inline Outcome store_matrices(Machine& m, Warp& w, const Instruction& i, Lanes) {
  for (size_t matrix = 0; matrix < i[1].parts.size(); matrix++)
    for (int row = 0; row < 8; row++) {
      uint8_t* bytes = touched(m, w, i, i[0], (int)matrix * 8 + row, 16, true);
      for (int column = 0; column < 8; column++) {
        int number = i.has("trans") ? column * 8 + row : row * 8 + column;
        uint16_t value = (uint16_t)(w.row(i[1].parts[matrix])[number / 2] >> (16 * (number % 2)));
        memcpy(bytes + 2 * column, &value, 2);
      }
    }
  return Outcome::done;
}

// ---- barriers

inline Outcome meet(Machine& m, Warp& w, const Instruction& i, Lanes) {
  if (w.meets) return Outcome::waits;
  uint64_t number = w.row(i[0])[0], threads = i.operands.size() > 1 ? w.row(i[1])[0] : m.warps.size() * LANES;
  Meeting& meeting = m.meetings[number < 16 ? number : (fail("a barrier's number is below 16"), 0)];
  meeting.clock.join(w.clock);
  meeting.warps.push_back(w.number);
  w.meets = true;
  if (meeting.warps.size() * LANES < threads) return Outcome::waits;
  for (int other : meeting.warps) {
    Warp& one = m.warps[other];
    one.clock.join(meeting.clock), one.tick();
    one.meets = false;
    if (other != w.number)
      for (uint32_t& at : one.at) at++;
  }
  meeting = {};
  return Outcome::done;
}

inline Outcome make_barrier(Machine& m, Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    uint32_t count = (uint32_t)w.row(i[1])[l];
    int number = (int)m.barriers.size();
    if (number >= MOST_BARRIERS) fail("the emulator knows no more than 64 barriers in shared memory");
    Barrier fresh{.expected = count, .pending = count, .number = number, .coming = {}, .done = {}};
    m.barriers[(uint32_t)m.address(w, i[0], l)] = fresh;
  });
  return Outcome::done;
}

// mbarrier.arrive _, [barrier], count; with expect_tx the count is of bytes to come.
inline Outcome arrive(Machine& m, Warp& w, const Instruction& i, Lanes lanes) {
  bool bytes = i.has("expect_tx");
  each(lanes, [&](int l) {
    Barrier& b = m.barrier((uint32_t)m.address(w, i[1], l), i);
    uint32_t count = i.operands.size() > 2 ? (uint32_t)w.row(i[2])[l] : 1, arrivals = bytes ? 1 : count;
    if (b.pending < arrivals) return m.notes.add(place(i) + " arrives where nobody else is expected");
    b.bytes += bytes ? count : 0;
    b.pending -= arrivals;
    b.coming.join(w.clock);
    m.settle(b);
  });
  if (lanes) w.tick();
  return Outcome::done;
}

// mbarrier.try_wait.parity p, [barrier], parity: here it does not give up.
inline Outcome await(Machine& m, Warp& w, const Instruction& i, Lanes lanes) {
  bool there = true;
  each(lanes, [&](int l) {
    Barrier& b = m.barrier((uint32_t)m.address(w, i[1], l), i);
    if ((b.phase & 1) == (w.row(i[2])[l] & 1)) there = false;
    else w.clock.join(b.done);
  });
  if (!there) return Outcome::waits;
  set(w, i[0], lanes, lanes);
  return Outcome::done;
}

inline Outcome fence(Machine& m, Warp& w, const Instruction&, Lanes) {
  m.shared.fence(w.number);
  return Outcome::done;
}

inline Outcome change_registers(Machine& m, Warp& w, const Instruction& i, Lanes) {
  int wanted = (int)w.row(i[0])[0], more = (wanted - w.registers) * LANES;
  if (wanted % 8 || wanted < 24 || wanted > 256) fail(format("%s: %d registers", place(i).c_str(), wanted));
  if (more > m.free_registers) return Outcome::waits;
  m.free_registers -= more;
  w.registers = wanted;
  return Outcome::done;
}

// ---- the unit that copies

// f(address in shared memory, address in global memory or 0, length) of every item of the window.
template <class F>
void over_window(const Copy& copy, F f) {
  const TensorMap& map = copy.map;
  uint32_t row = map.window[0] * map.item;
  for (uint32_t n = 0; n < map.bytes(); n += map.item) {
    uint64_t from = map.base, rest = n / row;
    bool inside = true;
    for (int axis = 0; axis < map.rank; axis++) {
      int64_t index = copy.start[axis] + (int64_t)(axis ? rest % map.window[axis] : n % row / map.item);
      if (axis) rest /= map.window[axis];
      inside &= 0 <= index && index < map.sizes[axis];
      from += index * (axis ? map.strides[axis - 1] : map.item);
    }
    f(swizzled(copy.shared + n, map.swizzle), inside ? from : 0, map.item);
  }
}

inline Span span(const Copy& copy) { return {copy.shared, copy.shared + copy.bytes}; }

// Until a load is done its place holds what is no number.
inline void begin(Machine& m, Warp& w, Copy copy) {
  const Instruction& i = *copy.instruction;
  uint8_t* bytes = m.shared.at(copy.shared, copy.bytes, i);
  uint32_t unit = copy.kind == Copying::line ? 16 : 128;
  if (copy.shared % unit) fail(format("%s: shared memory at %u is no multiple of %u", place(i).c_str(), copy.shared, unit));
  if (copy.kind == Copying::load) {
    m.barrier(copy.barrier, i);
    m.shared.check_write(access(i, w, true), span(copy));
    m.shared.over(span(copy), [](Cell& cell) { cell.arriving++, cell.unfenced = -1; });
    memset(bytes, 0xff, copy.bytes);
  } else {
    m.shared.check_read(access(i, w, true), span(copy));
    m.shared.over(span(copy), [](Cell& cell) { cell.leaving++; });
  }
  copy.clock = w.clock;
  m.copies.push_back(std::move(copy));
}

inline void finish_load(Machine& m, Copy& copy) {
  over_window(copy, [&](uint32_t to, uint64_t from, uint32_t length) {
    if (from) memcpy(&m.shared.bytes[to], m.global(from, length, *copy.instruction), length);
    else memset(&m.shared.bytes[to], 0, length);
  });
  Barrier& b = m.barrier(copy.barrier, *copy.instruction);
  int writer = MOST_WARPS + b.number;
  b.coming.join(copy.clock);
  uint32_t now = ++b.coming.at[writer];
  m.shared.over(span(copy), [&](Cell& cell) { cell.arriving--, cell.writer = (int8_t)writer, cell.written = now; });
  b.bytes -= copy.bytes;
  m.settle(b);
}

inline void take(Machine& m, Copy& copy) {
  copy.taken.assign(&m.shared.bytes[copy.shared], &m.shared.bytes[copy.shared] + copy.bytes);
  Warp& w = m.warps[copy.warp];
  m.shared.over(span(copy), [](Cell& cell) { cell.leaving--; });
  m.shared.note_read(w.number, w.clock.at[w.number], span(copy));
}

inline void deliver(Machine& m, Copy& copy) {
  const Instruction& i = *copy.instruction;
  if (copy.kind == Copying::line) {
    memcpy(m.global(copy.global, copy.bytes, i), copy.taken.data(), copy.bytes);
    return;
  }
  over_window(copy, [&](uint32_t from, uint64_t to, uint32_t length) {
    if (!to) return;
    uint8_t *bytes = m.global(to, length, i), *taken = &copy.taken[from - copy.shared];
    if (copy.kind == Copying::store) {
      memcpy(bytes, taken, length);
    } else {
      float sum, more;
      memcpy(&sum, bytes, 4), memcpy(&more, taken, 4);
      sum += more;
      memcpy(bytes, &sum, 4);
    }
  });
}

inline void Machine::finish(size_t n) {
  Copy& copy = copies[n];
  if (copy.kind == Copying::load) finish_load(*this, copy);
  else if (copy.taken.empty()) return take(*this, copy);
  else deliver(*this, copy);
  copies.erase(copies.begin() + n);
}

inline Outcome copy_window(Machine& m, Warp& w, const Instruction& i, Lanes lanes) {
  bool load = i.has("mbarrier::complete_tx::bytes");
  const Operand &array = i[load], &shared = i[!load];  // an array is [map, {coordinates}]
  each(lanes, [&](int l) {
    Copy copy{};
    copy.kind = load ? Copying::load : i.is("cp.reduce") ? Copying::add : Copying::store;
    copy.instruction = &i, copy.warp = w.number, copy.lane = l, copy.group = w.copies[l];
    memcpy(&copy.map, (void*)m.address(w, array, l), sizeof(TensorMap));
    if (copy.map.magic != MAGIC) fail(place(i) + ": there is no description of an array");
    const auto& coordinates = array.parts[1].parts;
    if (coordinates.size() != copy.map.rank) fail(place(i) + ": the array has another number of axes");
    for (size_t axis = 0; axis < coordinates.size(); axis++) copy.start[axis] = (int32_t)w.row(coordinates[axis])[l];
    if (copy.kind == Copying::add && copy.map.type != 6) fail(place(i) + ": only float32 is added to");
    copy.bytes = copy.map.bytes();
    copy.shared = (uint32_t)m.address(w, shared, l);
    if (load) copy.barrier = (uint32_t)m.address(w, i[2], l);
    begin(m, w, copy);
  });
  return Outcome::done;
}

inline Outcome copy_line(Machine& m, Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    Copy copy{};
    copy.kind = Copying::line;
    copy.instruction = &i, copy.warp = w.number, copy.lane = l, copy.group = w.copies[l];
    copy.global = m.address(w, i[0], l), copy.shared = (uint32_t)m.address(w, i[1], l), copy.bytes = (uint32_t)w.row(i[2])[l];
    if (copy.global % 16 || copy.bytes % 16) fail(place(i) + ": no multiple of 16 bytes");
    begin(m, w, copy);
  });
  return Outcome::done;
}

inline Outcome commit_copies(Machine&, Warp& w, const Instruction&, Lanes lanes) {
  each(lanes, [&](int l) { w.copies[l]++; });
  return Outcome::done;
}

// cp.async.bulk.wait_group[.read] n: each thread for its own, but for its last n groups.
inline Outcome await_copies(Machine& m, Warp& w, const Instruction& i, Lanes lanes) {
  int left = (int)w.row(i[0])[0];
  for (Copy& copy : m.copies)
    if (copy.kind != Copying::load && copy.warp == w.number && lanes >> copy.lane & 1 && copy.group < w.copies[copy.lane] - left &&
        !(i.has("read") && !copy.taken.empty()))
      return Outcome::waits;
  return Outcome::done;
}

// ---- the unit that multiplies

// A matrix in shared memory, as a descriptor of it says: 16-bit numbers in blocks of eight rows, each row so long as the
// swizzle is. Along k or, transposed, along the other axis, numbers are neighbours.
struct Matrix {
  uint32_t start, leading, stride, row;
  bool transposed;

  Matrix(uint64_t descriptor, bool transposed)
      : start((descriptor & 0x3fff) << 4), leading((descriptor >> 16 & 0x3fff) << 4), stride((descriptor >> 32 & 0x3fff) << 4),
        row(std::array{16, 128, 64, 32}[descriptor >> 62]), transposed(transposed) {
    if (descriptor >> 49 & 7) fail("a descriptor of a matrix that begins between two patterns of the swizzle");
  }
  uint32_t address(uint32_t n, uint32_t k) const {
    uint32_t along = 2 * (transposed ? n : k), across = transposed ? k : n;
    if (!transposed && along >= row && row > 16) fail("a product that reads beyond its swizzled rows");
    uint32_t repeat = row > 16 ? (transposed ? leading : 0) : transposed ? stride : leading;
    uint32_t groups = row == 16 && transposed ? leading : stride;
    return swizzled(start + along / row * repeat + along % row + across / 8 * groups + across % 8 * row, row);
  }
};

struct Product {
  Machine& m;
  Warp& w;
  const Instruction& i;
  std::vector<bool> read = std::vector<bool>(m.shared.bytes.size() / 16);  // runs of 16 bytes
  static constexpr int ROWS = 16, DEPTH = 16;  // of what one warp has of it

  float number(uint16_t bits) const { return i.type() == "bf16" ? wide(bfloat16{bits}) : wide(float16{bits}); }

  float number_at(uint32_t address) {
    uint16_t bits;
    memcpy(&bits, m.shared.at(address, 2, i), 2);
    read[address / 16] = true;
    return number(bits);
  }
  void check_settled(const Operand& o, const char* what) {
    if (w.changed[o.row] > w.fenced) m.notes.add(place(i) + format(" takes %s that changed since wgmma.fence", what));
  }
  // Where lane l has the number `part` of `sums` registers, or of the factor's eight halves.
  static int row(int l, int part) { return l / 4 + 8 * (part / 2 % 2); }
  static int column(int l, int part) { return l % 4 * 2 + part % 2 + 8 * (part / 4); }

  void run();
  void read_left(float (&left)[ROWS][DEPTH]);
  void note_reads();
};

inline void Product::read_left(float (&left)[ROWS][DEPTH]) {
  if (i[1].parts.empty()) {
    Matrix matrix(w.row(i[1])[0], w.row(i[6])[0]);
    for (int r = 0; r < ROWS; r++)
      for (int k = 0; k < DEPTH; k++) left[r][k] = number_at(matrix.address(ROWS * (w.number % 4) + r, k));
    return;
  }
  for (int part = 0; part < 8; part++) {
    const Operand& o = i[1].parts[part / 2];
    check_settled(o, "a factor");
    for (int l = 0; l < LANES; l++) left[row(l, part)][column(l, part)] = number((uint16_t)(w.row(o)[l] >> (16 * (part % 2))));
  }
}

inline void Product::run() {
  const Text& shape = i.words[4];  // m64n...k16
  int columns = atoi(shape.c_str() + shape.find('n') + 1);
  if (shape.substr(shape.find('k')) != "k16" || i.words[5] != "f32" || (int)w.row(i[4])[0] != 1 || (int)w.row(i[5])[0] != 1)
    fail("the emulator knows no product " + i.text);
  bool fresh = !(w.predicate(i[3]) & 1);
  Matrix matrix(w.row(i[2])[0], w.row(i[i[1].parts.empty() ? 7 : 6])[0]);
  static float left[ROWS][DEPTH], right[DEPTH][256], sums[ROWS][256];
  read_left(left);
  for (int c = 0; c < columns; c++)
    for (int k = 0; k < DEPTH; k++) right[k][c] = number_at(matrix.address(c, k));
  const auto& registers = i[0].parts;
  for (int part = 0; part < (int)registers.size(); part++) {
    check_settled(registers[part], "sums");
    for (int l = 0; l < LANES; l++) sums[row(l, part)][column(l, part)] = fresh ? 0 : get<float>(w.row(registers[part])[l]);
  }
  for (int r = 0; r < ROWS; r++)
    for (int k = 0; k < DEPTH; k++)
      for (int c = 0; c < columns; c++) sums[r][c] += left[r][k] * right[k][c];
  for (int part = 0; part < (int)registers.size(); part++)
    for (int l = 0; l < LANES; l++) w.row(registers[part])[l] = put(sums[row(l, part)][column(l, part)]);
  note_reads();
}

// It is computed at once, but counts as under way until it is waited for.
inline void Product::note_reads() {
  for (const Operand& o : i[0].parts) w.busy[o.row] = SUM, w.open.rows.push_back(o.row);
  for (const Operand& o : i[1].parts) w.busy[o.row] = std::max<uint8_t>(w.busy[o.row], FACTOR), w.open.rows.push_back(o.row);
  for (uint32_t run = 0; run < read.size(); run++) {
    if (!read[run]) continue;
    Span span{16 * run, 16 * run + 16};
    m.shared.check_read(access(i, w, true), span);
    m.shared.over(span, [](Cell& cell) { cell.multiplied++; });
    w.open.spans.push_back(span);
  }
}

inline Outcome multiply(Machine& m, Warp& w, const Instruction& i, Lanes lanes) {
  if (lanes != ~Lanes(0)) fail(place(i) + " is for all threads of a warp");
  Product{m, w, i}.run();
  return Outcome::done;
}

inline Outcome fence_registers(Machine&, Warp& w, const Instruction&, Lanes) {
  w.fenced = w.steps;
  return Outcome::done;
}

inline Outcome commit_products(Machine&, Warp& w, const Instruction&, Lanes) {
  w.products.push_back(std::move(w.open));
  w.open = {};
  return Outcome::done;
}

inline Outcome await_products(Machine& m, Warp& w, const Instruction& i, Lanes) {
  while (w.products.size() > w.row(i[0])[0]) {
    Group group = std::move(w.products.front());
    w.products.erase(w.products.begin());
    for (Span span : group.spans) {
      m.shared.over(span, [](Cell& cell) { cell.multiplied--; });
      m.shared.note_read(w.number, w.clock.at[w.number], span);
    }
    for (int row : group.rows) {
      bool another = false;
      for (Group& other : w.products) another |= std::count(other.rows.begin(), other.rows.end(), row) > 0;
      if (!another) w.busy[row] = FREE, w.changed[row] = 0;
    }
  }
  return Outcome::done;
}

// What does the instruction, or nothing for one of arithmetic.h.
inline Handler unit(const Instruction& i) {
  if (i.is("ld.param")) return load_parameter;
  if (i.is("ld.") || i.is("st.")) return load_or_store(i);
  if (i.is("stmatrix.")) return store_matrices;
  if (i.is("bar.sync") || i.is("barrier.sync")) return meet;
  if (i.is("mbarrier.init")) return make_barrier;
  if (i.is("mbarrier.arrive")) return arrive;
  if (i.is("mbarrier.try_wait")) return await;
  if (i.is("fence.proxy.async")) return fence;
  if (i.is("setmaxnreg.")) return change_registers;
  if (i.is("cp.async.bulk.commit_group")) return commit_copies;
  if (i.is("cp.async.bulk.wait_group")) return await_copies;
  if (i.is("cp.async.bulk.tensor.") || i.is("cp.reduce.async.bulk.tensor.")) return copy_window;
  if (i.is("cp.async.bulk.global.shared")) return copy_line;
  if (i.is("wgmma.mma_async")) return multiply;
  if (i.is("wgmma.fence")) return fence_registers;
  if (i.is("wgmma.commit_group")) return commit_products;
  if (i.is("wgmma.wait_group")) return await_products;
  return nullptr;
}
