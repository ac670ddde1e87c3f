// Products of a warp group: 64 rows, N columns, depth 16. They are done when the last of its 128
// threads asks for them; when it waits for them, the operands must still be there.
#pragma once

namespace emu {

// A product that nobody has waited for yet, and what its operands in shared memory were.
struct Flight {
  uint64_t (*digest)(uint64_t, uint64_t);
  uint64_t a, b, was;
};

struct WarpGroup : Waitable {
  int number = 0, arrived = 0;
  const char* what = "";
  uint64_t a = 0, b = 0;  // descriptors
  bool keeps = false;     // what the accumulators hold
  float* const* registers[128];
  uint32_t rows[128][4];  // A in registers
  std::vector<Flight> open;
  std::deque<std::vector<Flight>> committed;
  std::string name() const override {
    return std::string(what) + " of warp group " + text(number) + " (" + text(arrived) +
           " of 128 threads arrived)";
  }
};
inline std::vector<WarpGroup> groups;

inline WarpGroup& my_group() {
  int number = current / 128;
  if (block_threads < (number + 1) * 128) fail("wgmma: a warp group has 128 threads");
  groups[number].number = number;
  return groups[number];
}

// What a descriptor says: where lines of `pitch` bytes lie, eight by eight.
struct Operand {
  uint32_t address, leading, stride, pitch, mask;
};

inline Operand operand(uint64_t descriptor) {
  static constexpr uint32_t kPitch[4] = {0, 128, 64, 32};
  Operand o;
  o.address = (descriptor & 0x3FFF) << 4;
  o.leading = (descriptor >> 16 & 0x3FFF) << 4;
  o.stride = (descriptor >> 32 & 0x3FFF) << 4;
  o.pitch = kPitch[descriptor >> 62];
  if (!o.pitch) fail("wgmma: a descriptor without a swizzle");
  if (descriptor >> 49 & 7) fail("wgmma: a descriptor with a base offset");
  o.mask = o.pitch / 16 - 1;
  // Rows of the pattern are numbered by address, and it starts with row 0.
  if (o.address >> 7 & o.mask)
    fail("wgmma: an operand at " + text(o.address) + ", which is not aligned to the " +
         text(8 * o.pitch) + " bytes of its swizzle");
  return o;
}

// The bits of the number at row or column `line` of an operand and at `depth`.
template <bool kTransposed>
uint16_t fetch(const Operand& o, int line, int depth) {
  uint32_t address = o.address;
  if (kTransposed) {
    int width = o.pitch / 2;  // lines next to one another
    address += line / width * o.leading + line % width * 2 + depth / 8 * o.stride + depth % 8 * o.pitch;
  } else {
    address += line / 8 * o.stride + line % 8 * o.pitch + depth * 2;
  }
  address ^= (address >> 7 & o.mask) << 4;
  uint16_t bits;
  std::memcpy(&bits, at(address, 2, "wgmma"), 2);
  return bits;
}

template <int N, bool kTransposedA, bool kTransposedB, bool kShared>
uint64_t digest(uint64_t da, uint64_t db) {
  Operand ob = operand(db), oa = kShared ? operand(da) : ob;
  uint64_t sum = 0;
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < N; ++n) sum = sum * 0x9E3779B97F4A7C15 + fetch<kTransposedB>(ob, n, k);
    for (int m = 0; kShared && m < 64; ++m)
      sum = sum * 0x9E3779B97F4A7C15 + fetch<kTransposedA>(oa, m, k);
  }
  return sum;
}

typedef float Vector __attribute__((vector_size(32)));

template <int N>
void multiply(WarpGroup& g, const float (&a)[64][16], const float (&b)[16][N]) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  for (int row = 0; row < 64; ++row) {
    alignas(32) float sums[N] = {};
    int first = row / 16 * 32 + row % 8 * 4, half = row % 16 / 8;  // thread, and half of its registers
    if (g.keeps)
      for (int n = 0; n < N; ++n) sums[n] = *g.registers[first + n % 8 / 2][n / 8 * 4 + half * 2 + n % 2];
    Vector* sum = (Vector*)sums;
    for (int k = 0; k < 16; ++k) {
      const Vector* line = (const Vector*)b[k];
      for (int n = 0; n < N / 8; ++n) sum[n] += a[row][k] * line[n];
    }
    for (int n = 0; n < N; ++n) *g.registers[first + n % 8 / 2][n / 8 * 4 + half * 2 + n % 2] = sums[n];
  }
}

// Note what this thread brings; true for the last one of the group.
inline bool enter(WarpGroup& g, const char* what, float* const* registers, uint64_t a, uint64_t b,
                  bool keeps) {
  if (g.arrived && (g.a != a || g.b != b || g.keeps != keeps || std::strcmp(g.what, what)))
    fail(std::string(what) + ": threads of warp group " + text(g.number) + " disagree");
  g.what = what;
  g.a = a, g.b = b, g.keeps = keeps;
  g.registers[current % 128] = registers;
  if (++g.arrived < 128) return false;
  g.arrived = 0;
  return true;
}

template <int N, bool kBf16, bool kTransposedA, bool kTransposedB, bool kShared>
void wgmma(float* const* registers, const uint32_t (&rows)[4], uint64_t da, uint64_t db, bool keeps,
           int scale_a, int scale_b) {
  alignas(32) static float a[64][16], b[16][N];
  WarpGroup& g = my_group();
  std::memcpy(g.rows[current % 128], rows, sizeof rows);
  if (!enter(g, "wgmma.mma_async", registers, da, db, keeps)) return wait(g);
  auto* sum = digest<N, kTransposedA, kTransposedB, kShared>;
  g.open.push_back({sum, da, db, sum(da, db)});
  int scale = scale_a * scale_b;
  Operand ob = operand(db), oa = kShared ? operand(da) : ob;
  if (kShared) {
    for (int m = 0; m < 64; ++m)
      for (int k = 0; k < 16; ++k) a[m][k] = scale * decode(fetch<kTransposedA>(oa, m, k), kBf16);
  } else {
    for (int m = 0; m < 64; ++m)
      for (int k = 0; k < 16; ++k) {
        uint32_t word = g.rows[m / 16 * 32 + m % 8 * 4 + k % 8 / 2][m % 16 / 8 + k / 8 * 2];
        a[m][k] = scale * decode((uint16_t)(word >> (k % 2 * 16)), kBf16);
      }
  }
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < 16; ++k) b[k][n] = decode(fetch<kTransposedB>(ob, n, k), kBf16);
  multiply<N>(g, a, b);
  ++g.generation;
}

template <int N, bool kBf16, bool kTransposedA, bool kTransposedB>
void wgmma_shared(float* const* registers, uint64_t a, uint64_t b, bool keeps, int scale_a, int scale_b) {
  wgmma<N, kBf16, kTransposedA, kTransposedB, true>(registers, {}, a, b, keeps, scale_a, scale_b);
}

template <int N, bool kBf16, bool kTransposedA, bool kTransposedB>
void wgmma_registers(float* const* registers, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                     uint64_t b, bool keeps, int scale_a, int scale_b) {
  wgmma<N, kBf16, false, kTransposedB, false>(registers, {a0, a1, a2, a3}, 0, b, keeps, scale_a, scale_b);
}

// Do something once all threads of the group are here.
template <typename F>
void meet(const char* what, F once) {
  WarpGroup& g = my_group();
  if (!enter(g, what, nullptr, 0, 0, false)) return wait(g);
  once(g);
  ++g.generation;
}
inline void wgmma_fence() {
  meet("wgmma.fence", [](WarpGroup&) {});
}
inline void wgmma_commit() {
  meet("wgmma.commit_group", [](WarpGroup& g) {
    g.committed.push_back(std::move(g.open));
    g.open.clear();
  });
}
inline void wgmma_wait(unsigned left) {
  meet("wgmma.wait_group", [left](WarpGroup& g) {
    for (; g.committed.size() > left; g.committed.pop_front())
      for (const Flight& f : g.committed.front())
        if (f.digest(f.a, f.b) != f.was)
          fail("wgmma: operands in shared memory were overwritten before the product was waited for");
  });
}

}  // namespace emu
