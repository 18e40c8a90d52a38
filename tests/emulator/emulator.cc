// What Python calls (emulator_...), and what the code that launches a kernel calls (mosaic_gpu_...).
#include <array>

#include "units.h"

namespace {

struct Launch {
  const Program* program = nullptr;
  uint32_t seed = 0;
  std::vector<std::pair<uint64_t, uint64_t>> arrays;
  Text error, notes;
} launch;

void refuse(const Text& why) {
  if (launch.error.empty()) launch.error = why;
}

void check(const TensorMap& map, const void* place) {  // as cuTensorMapEncodeTiled would
  if ((uint64_t)place % 64) refuse("a description of an array lies at no multiple of 64 bytes");
  if (map.base % 16) refuse("an array that is copied from begins at no multiple of 16 bytes");
  for (int axis = 0; axis < map.rank; axis++)
    if (map.window[axis] < 1 || map.window[axis] > 256 || map.sizes[axis] < 1)
      refuse(format("a window of %u of an axis of %u, where 1 to 256 may be copied", map.window[axis], map.sizes[axis]));
  for (int axis = 0; axis + 1 < map.rank; axis++)
    if (map.strides[axis] % 16) refuse(format("a stride of %llu bytes, no multiple of 16", (unsigned long long)map.strides[axis]));
  uint32_t row = map.window[0] * map.item;
  if (row % 16 || (map.swizzle != 16 && row > map.swizzle))
    refuse(format("rows of %u bytes are copied, swizzled by %u", row, map.swizzle));
}

}  // namespace

extern "C" {

void* emulator_read(const char* ptx, char* error, int size) {
  try {
    auto* program = new Program(ptx);
    for (Instruction& i : program->code) {
      i.run = unit(i);
      if (!i.run) i.run = arithmetic(i);
      if (!i.run) fail("the emulator does not know " + place(i));
    }
    return program;
  } catch (std::exception& problem) {
    snprintf(error, size, "%s", problem.what());
    return nullptr;
  }
}

void emulator_begin(const void* program, uint32_t seed, int count, const uint64_t* begin, const uint64_t* bytes) {
  launch = {(const Program*)program, seed, {}, {}, {}};
  for (int n = 0; n < count; n++) launch.arrays.push_back({begin[n], begin[n] + bytes[n]});
}

const char* emulator_error() { return launch.error.c_str(); }
const char* emulator_notes() { return launch.notes.c_str(); }

void mosaic_gpu_init_tma_desc(void* to, void* base, int64_t type, int64_t rank, int64_t* sizes, int64_t* strides,
                              int64_t swizzle, int64_t* window) {
  constexpr int BITS[] = {4, 8, 16, 32, 64, 16, 32, 16, 2, 32, 64};
  if (rank < 1 || rank > 5 || BITS[type] < 8 || strides[rank - 1] != 1) return refuse("an array that cannot be copied from");
  TensorMap map{MAGIC, (uint64_t)base, (uint8_t)(BITS[type] / 8), (uint8_t)rank, (uint8_t)swizzle, (uint8_t)type, {}, {}, {}};
  for (int axis = 0; axis < rank; axis++) {
    map.sizes[axis] = (uint32_t)sizes[rank - 1 - axis];
    map.window[axis] = (uint16_t)window[rank - 1 - axis];
    if (axis) map.strides[axis - 1] = strides[rank - 1 - axis] * map.item;
  }
  check(map, to);
  memcpy(to, &map, sizeof map);
}

void mosaic_gpu_init_tma_im2col_desc() { refuse("the emulator does not copy patches of images"); }

void mosaic_gpu_build_kernel_spec(void*, uint32_t grid_x, uint32_t grid_y, uint32_t grid_z, uint32_t cluster_x,
                                  uint32_t cluster_y, uint32_t cluster_z, uint32_t block_x, uint32_t block_y, uint32_t block_z,
                                  uint32_t shared, int32_t, int32_t, void** arguments, int32_t*) {
  if (cluster_x * cluster_y * cluster_z > 1) refuse("the emulator has no clusters of thread blocks");
  if (!launch.error.empty()) return;
  Machine machine(*launch.program, launch.seed);
  machine.arguments = arguments;
  machine.arrays = launch.arrays;
  machine.shared_bytes = shared;
  std::copy_n(std::array{grid_x, grid_y, grid_z}.begin(), 3, machine.grid);
  std::copy_n(std::array{block_x, block_y, block_z}.begin(), 3, machine.block);
  try {
    machine.run();
  } catch (std::exception& problem) {
    refuse(problem.what());
  }
  for (auto& [note, times] : machine.notes.found) launch.notes += format("%d times: ", times) + note + "\n";
}
}
