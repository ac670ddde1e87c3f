// Tensor maps, and the copies of boxes that they describe.
//
// A load arrives at once or when no thread can go on without it. A store reads shared memory at once
// or when its thread waits for it.
#pragma once

namespace emu {

inline std::string encode_error = "cuTensorMapEncodeTiled failed";

inline CUresult refuse(const std::string& what) {
  encode_error = "emulator: cuTensorMapEncodeTiled: " + what;
  return CUDA_ERROR_INVALID_VALUE;
}

}  // namespace emu

CUresult cuGetErrorString(CUresult, const char** to) {
  *to = emu::encode_error.c_str();
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* dims,
    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
    CUtensorMapFloatOOBfill fill) {
  static constexpr int kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
  static constexpr uint64_t kSpans[] = {256 * 16, 32, 64, 128};
  using emu::refuse, emu::text;
  if (rank < 1 || rank > 5) return refuse("rank " + text(rank));
  if (type < 0 || type > 9) return refuse("element type " + text(type));
  if (swizzle < 0 || swizzle > 3) return refuse("swizzle " + text(swizzle));
  if (interleave || fill) return refuse("interleaving and filling with NaN are not emulated");
  if ((uintptr_t)data % 16) return refuse("the address is no multiple of 16");
  CUtensorMap made = {};
  made.data = (unsigned char*)data;
  made.rank = rank;
  made.swizzle = swizzle;
  for (unsigned n = 0; n < rank; ++n) {
    made.dims[n] = dims[n];
    made.strides[n] = n ? strides[n - 1] : kBytes[type];
    made.box[n] = box[n];
    std::string here = " in dimension " + text(n);
    if (!dims[n] || dims[n] > 1ull << 32) return refuse("size " + text(dims[n]) + here);
    if (!box[n] || box[n] > 256) return refuse("a box of " + text(box[n]) + here);
    if (steps[n] != 1) return refuse("a step between elements" + here);
    if (n && (made.strides[n] % 16 || made.strides[n] >= 1ull << 40))
      return refuse("a stride of " + text(made.strides[n]) + " bytes" + here);
  }
  uint64_t inner = (uint64_t)box[0] * kBytes[type];
  if (inner % 16) return refuse("rows of a box of " + text(inner) + " bytes, no multiple of 16");
  if (inner > kSpans[swizzle]) return refuse("rows of a box of " + text(inner) + " bytes do not fit the swizzle");
  *map = made;
  return CUDA_SUCCESS;
}

namespace emu {

// A copy of a box under way.
struct Transfer {
  const CUtensorMap* map;
  int at[5];
  uint32_t address;
};
struct Stores {
  std::vector<Transfer> open;
  std::deque<std::vector<Transfer>> groups;
};
inline std::map<int, Stores> stores;  // by thread

// Call `move(shared memory, global memory or nullptr, bytes)` for every element of a box.
template <typename F>
void each_of_box(const Transfer& t, const char* what, F move) {
  const CUtensorMap& m = *t.map;
  uint32_t mask = m.swizzle ? (1u << m.swizzle) - 1 : 0, address = t.address;
  uint64_t bytes = m.strides[0];
  int place[5] = {};
  while (true) {
    unsigned char* from = m.data;
    for (int n = 0; n < m.rank; ++n) {
      long long coordinate = (long long)t.at[n] + place[n];
      if (coordinate < 0 || coordinate >= (long long)m.dims[n]) from = nullptr;
      if (from) from += coordinate * (long long)m.strides[n];
    }
    uint32_t to = address ^ (address >> 7 & mask) << 4;
    move(at(to, bytes, what), from, bytes);
    address += bytes;
    int n = 0;
    while (n < m.rank && ++place[n] == m.box[n]) place[n++] = 0;
    if (n == m.rank) return;
  }
}

inline uint32_t box_bytes(const CUtensorMap& m) {
  uint32_t bytes = m.strides[0];
  for (int n = 0; n < m.rank; ++n) bytes *= m.box[n];
  return bytes;
}

inline Transfer transfer(int rank, uint32_t address, const void* map, const int* place) {
  const char* what = "cp.async.bulk.tensor";
  Transfer t = {(const CUtensorMap*)map, {}, address};
  if ((uintptr_t)map % 64) fail(std::string(what) + ": a tensor map that is not aligned to 64 bytes");
  if (t.map->rank != rank) fail(std::string(what) + ": the tensor map has rank " + text(t.map->rank));
  std::copy(place, place + rank, t.at);
  at(address, box_bytes(*t.map), what, 128);
  return t;
}

inline void load(const Transfer& t, uint32_t barrier) {
  each_of_box(t, "cp.async.bulk.tensor", [](unsigned char* to, unsigned char* from, int bytes) {
    from ? (void)std::memcpy(to, from, bytes) : (void)std::memset(to, 0, bytes);
  });
  mbarrier_complete(barrier, box_bytes(*t.map));
}

inline void store(const Transfer& t) {
  each_of_box(t, "cp.async.bulk.tensor", [](unsigned char* from, unsigned char* to, int bytes) {
    if (to) std::memcpy(to, from, bytes);
  });
}

inline void begin_load(int rank, uint32_t to, const void* map, const int* place, uint32_t barrier) {
  Transfer t = transfer(rank, to, map, place);
  mbarrier(barrier, "cp.async.bulk.tensor");
  if (at_once()) return load(t, barrier);
  later([=] { load(t, barrier); }, "nobody waited for the copy of a box to " + text(to));
}

void tensor_load(int rank, uint32_t to, const void* map, const int* place, uint32_t barrier) {
  begin_load(rank, to, map, place, barrier);
  pause();
}

void tensor_load_cluster(int rank, uint32_t to, const void* map, const int* place, uint32_t barrier,
                         uint32_t mask) {
  for (int n = 0; mask >> n; ++n)
    if (mask >> n & 1)
      elsewhere(n, "cp.async.bulk.tensor", [=] { begin_load(rank, to, map, place, barrier); });
  pause();
}

void tensor_store(int rank, const void* map, const int* place, uint32_t from) {
  Transfer t = transfer(rank, from, map, place);
  if (at_once()) store(t);
  stores[current].open.push_back(t);
}

void bulk_commit() {
  Stores& mine = stores[current];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void bulk_wait(unsigned left) {
  Stores& mine = stores[current];
  for (; mine.groups.size() > left; mine.groups.pop_front())
    for (const Transfer& t : mine.groups.front()) store(t);
}

}  // namespace emu
