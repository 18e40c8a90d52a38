// Shared memory of a thread block, and the rules of who may touch it: what a GPU would have left to chance is noted.
#pragma once



#include "program.h"

constexpr int MOST_WARPS = 16, MOST_BARRIERS = 64;
constexpr int MOST_SHARED = 227 * 1024;

// How much of what each warp has done, and of what copies have brought to each barrier, is known to have happened (a
// vector clock). Who has waited for one copy knows nothing of those that arrive elsewhere.
struct Clock {
  uint32_t at[MOST_WARPS + MOST_BARRIERS] = {};
  void join(const Clock& other) {
    for (int n = 0; n < MOST_WARPS + MOST_BARRIERS; n++) at[n] = std::max(at[n], other.at[n]);
  }
};

struct Span {
  uint32_t begin, end;
};

// Four bytes.
struct Cell {
  int8_t writer = -1;               // a warp, or MOST_WARPS and the number of the barrier of a copy
  uint32_t written = 0;             // when, by the writer's clock
  uint32_t read[MOST_WARPS] = {};   // when last, by the clock of each warp
  uint8_t arriving = 0;             // copies that write here and are not waited for yet,
  uint8_t leaving = 0;              // that read here,
  uint8_t multiplied = 0;           // and products that read here
  int8_t unfenced = -1;             // a warp that has stored here, and has not shown it to the other units
};

struct Notes {
  std::map<Text, int> found;
  void add(const Text& note) {
    if (found.size() < 50 || found.count(note)) found[note]++;
  }
};

inline Text place(const Instruction& i) {
  return format("%s (PTX line %d, %s)", i.text.c_str(), i.line, i.source.empty() ? "no source" : i.source.c_str());
}

// Who asks: a warp, for itself or (`other_unit`) for the unit that copies or the one that multiplies.
struct Access {
  const Instruction& instruction;
  int warp;
  Clock& clock;
  bool other_unit;
};

struct SharedMemory {
  uint32_t size;
  std::vector<uint8_t> bytes;
  std::vector<Cell> cells;
  std::vector<uint32_t> unfenced[MOST_WARPS];
  Notes* notes;

  SharedMemory(uint32_t size, Notes* notes)
      : size(size), bytes(SHARED_BASE + size + 1024, 0xff), cells(bytes.size() / 4), notes(notes) {}

  uint8_t* at(uint32_t address, uint32_t length, const Instruction& i) {
    if (address < SHARED_BASE || address + length > SHARED_BASE + size)
      fail(format("%s: byte %d of shared memory, of which there are %u", place(i).c_str(), (int)address - SHARED_BASE, size));
    return &bytes[address];
  }

  template <class F>
  void over(Span span, F f) {
    for (uint32_t cell = span.begin / 4; cell < (span.end + 3) / 4; cell++) f(cells[cell]);
  }

  void check_read(const Access& who, Span span) {
    for (uint32_t cell = span.begin / 4; cell < (span.end + 3) / 4; cell++)
      if (Text why = against_reading(who, cells[cell]); !why.empty()) return notes->add(place(who.instruction) + why);
  }

  void check_write(const Access& who, Span span) {
    for (uint32_t cell = span.begin / 4; cell < (span.end + 3) / 4; cell++)
      if (Text why = against_writing(who, cells[cell]); !why.empty()) return notes->add(place(who.instruction) + why);
  }

  void note_read(int warp, uint32_t when, Span span) {
    over(span, [&](Cell& cell) { cell.read[warp] = std::max(cell.read[warp], when); });
  }

  void note_store(int warp, uint32_t when, Span span) {
    for (uint32_t cell = span.begin / 4; cell < (span.end + 3) / 4; cell++) {
      if (cells[cell].unfenced != warp) unfenced[warp].push_back(cell);
      cells[cell].writer = cells[cell].unfenced = (int8_t)warp;
      cells[cell].written = when;
    }
  }

  void fence(int warp) {
    for (uint32_t cell : unfenced[warp])
      if (cells[cell].unfenced == warp) cells[cell].unfenced = -1;
    unfenced[warp].clear();
  }

 private:
  static bool unknown(const Access& who, const Cell& cell) {
    return cell.writer >= 0 && cell.writer != who.warp && cell.written > who.clock.at[cell.writer];
  }

  static Text against_reading(const Access& who, const Cell& cell) {
    if (cell.arriving) return " reads what a copy may still be writing";
    if (unknown(who, cell)) return format(" reads what %s wrote, and has not waited for it", name(cell.writer).c_str());
    if (who.other_unit && cell.unfenced >= 0) return " reads by another unit what was stored without a fence since";
    return "";
  }

  static Text against_writing(const Access& who, const Cell& cell) {
    if (cell.arriving) return " writes where a copy may still be writing";
    if (cell.leaving) return " writes what a copy may still be reading";
    if (cell.multiplied) return " writes what a product may still be reading";
    if (unknown(who, cell)) return format(" writes over what %s wrote, and has not waited for it", name(cell.writer).c_str());
    for (int warp = 0; warp < MOST_WARPS; warp++)
      if (warp != who.warp && cell.read[warp] > who.clock.at[warp])
        return format(" writes what %s reads, and has not waited for it", name(warp).c_str());
    if (who.other_unit && cell.unfenced >= 0) return " writes by another unit where something was stored without a fence since";
    return "";
  }

  static Text name(int warp) { return warp >= MOST_WARPS ? "a copy" : format("warp %d", warp); }
};

// How the unit that copies and the one that multiplies permute rows of `row` bytes: runs of 16 bytes, by bits of the
// address.
inline uint32_t swizzled(uint32_t address, uint32_t row) { return address ^ ((address >> 3) & (row - 16)); }
