// Products of a warp group: 64 rows, N columns, depth 16. They are done when the last of its 128
// threads asks for them, but nobody sees it: accumulators hold NaN until somebody waits, and then the
// operands in shared memory must still be what they were.
#pragma once
#include <list>

namespace emu {

// What the operands of a product are: a number per row and depth, and per depth and column.
struct Numbers {
  uint16_t a[64][16], b[16][256];
};

// A product that nobody has waited for yet, and what its operands in shared memory were.
struct Flight {
  Product product;
  uint64_t a, b, was;
};

// Accumulators of products under way: where they are, by thread, and what they will be, by row.
struct Accumulators {
  int columns;
  long group = 0;  // the last one that adds to them
  std::vector<float*> registers;
  std::vector<float> values;

  // Call put(register, value).
  template <typename F>
  void each(F put) {
    for (int row = 0; row < 64; ++row) {
      // The first of four threads that hold this row, and which half of their registers.
      int first = row / 16 * 32 + row % 8 * 4, half = row % 16 / 8;
      for (int n = 0; n < columns; ++n)
        put(*registers[(first + n % 8 / 2) * (columns / 2) + n / 8 * 4 + half * 2 + n % 2],
            values[row * columns + n]);
    }
  }
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
  std::list<Accumulators> flying;
  long commits = 0;
  std::string name() const override {
    return std::string(what) + " of warp group " + text(number) + " (" + text(arrived) +
           " of 128 threads arrived)";
  }
};
inline std::vector<WarpGroup> groups;

inline WarpGroup& my_group() {
  int number = current / 128;
  if (cluster_threads < (number + 1) * 128) fail("wgmma: a warp group has 128 threads");
  groups[number].number = number;
  return groups[number];
}

// What a descriptor says: where lines of `pitch` bytes lie, eight by eight.
struct Operand {
  uint32_t address, leading, stride, pitch, mask;

  explicit Operand(uint64_t descriptor) {
    static constexpr uint32_t kPitch[4] = {0, 128, 64, 32};
    address = (descriptor & 0x3FFF) << 4;
    leading = (descriptor >> 16 & 0x3FFF) << 4;
    stride = (descriptor >> 32 & 0x3FFF) << 4;
    pitch = kPitch[descriptor >> 62];
    if (!pitch) fail("wgmma: a descriptor without a swizzle");
    if (descriptor >> 49 & 7) fail("wgmma: a descriptor with a base offset");
    mask = pitch / 16 - 1;
    // Rows of the pattern are numbered by address, and it starts with row 0.
    if (address >> 7 & mask)
      fail("wgmma: an operand at " + text(address) + ", which is not aligned to the " +
           text(8 * pitch) + " bytes of its swizzle");
  }

  // Call put(line, depth, bits) for the rows or columns up to `lines` and 16 of the depth.
  template <typename F>
  void each(bool transposed, int lines, F put) const {
    uint32_t width = pitch / 2;  // lines next to one another, if transposed
    for (int n = 0; n < lines * 2; ++n) {
      // Eight numbers lie together.
      uint32_t line = transposed ? n % (lines / 8) * 8 : n / 2;
      uint32_t depth = transposed ? n / (lines / 8) : n % 2 * 8;
      uint32_t from = address;
      if (transposed)
        from += line / width * leading + line % width * 2 + depth / 8 * stride + depth % 8 * pitch;
      else
        from += line / 8 * stride + line % 8 * pitch + depth * 2;
      from ^= (from >> 7 & mask) << 4;
      uint16_t bits[8];
      std::memcpy(bits, at(from, 16, "wgmma"), 16);
      for (int i = 0; i < 8; ++i) transposed ? put(line + i, depth, bits[i]) : put(line, depth + i, bits[i]);
    }
  }
};

// Read what lies in shared memory.
inline void read(const Product& p, uint64_t a, uint64_t b, Numbers& to) {
  Operand right(b), left(p.in_registers ? b : a);
  right.each(p.transposed_b, p.columns, [&](int n, int k, uint16_t x) { to.b[k][n] = x; });
  if (p.in_registers) return;
  left.each(p.transposed_a, 64, [&](int m, int k, uint16_t x) { to.a[m][k] = x; });
}

inline uint64_t digest(const Product& p, const Numbers& x) {
  uint64_t sum = 0;
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < p.columns; ++n) sum = sum * 0x9E3779B97F4A7C15 + x.b[k][n];
    for (int m = 0; !p.in_registers && m < 64; ++m) sum = sum * 0x9E3779B97F4A7C15 + x.a[m][k];
  }
  return sum;
}

inline constexpr uint32_t kPending = 0x7FFFDEAD;  // NaN

inline bool pending(const float& x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits == kPending;
}

// The accumulators that the threads of a group have brought.
inline Accumulators& accumulators(WarpGroup& g, int columns) {
  for (Accumulators& one : g.flying) {
    if (one.registers[0] != g.registers[0][0]) continue;
    if (one.columns != columns) fail("wgmma: accumulators of another shape are under way");
    return one;
  }
  Accumulators& made = g.flying.emplace_back();
  made.columns = columns;
  made.values.resize(64 * columns);
  for (float* const* mine : g.registers)
    made.registers.insert(made.registers.end(), mine, mine + columns / 2);
  made.each([](float& from, float& to) {
    to = from;
    std::memcpy(&from, &kPending, 4);
  });
  return made;
}

// Let threads see the accumulators of groups up to the last `left`.
inline void land(WarpGroup& g, long left) {
  for (auto one = g.flying.begin(); one != g.flying.end();) {
    if (one->group >= g.commits - left) {
      ++one;
      continue;
    }
    one->each([](float& to, float& from) {
      if (!pending(to)) fail("wgmma: accumulators were written before the product was waited for");
      to = from;
    });
    one = g.flying.erase(one);
  }
}

typedef float Vector __attribute__((vector_size(32), aligned(4)));

inline void multiply(const Product& p, const Numbers& x, int scale, bool keeps, float* values) {
  alignas(32) static float b[16][256];
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < p.columns; ++n) b[k][n] = decode(x.b[k][n], p.bf16);
  if (!keeps) std::fill(values, values + 64 * p.columns, 0.0f);
  for (int row = 0; row < 64; ++row) {
    Vector* sum = (Vector*)(values + row * p.columns);
    for (int k = 0; k < 16; ++k) {
      float a = scale * decode(x.a[row][k], p.bf16);
      for (int n = 0; n < p.columns / 8; ++n) sum[n] += a * ((Vector*)b[k])[n];
    }
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

void wgmma(const Product& p, float* const* registers, const uint32_t (&rows)[4], uint64_t a,
           uint64_t b, bool keeps, int scale_a, int scale_b) {
  if (p.columns % 8 || p.columns < 8 || p.columns > 256) fail("wgmma: " + text(p.columns) + " columns");
  WarpGroup& g = my_group();
  std::memcpy(g.rows[current % 128], rows, sizeof rows);
  if (!enter(g, "wgmma.mma_async", registers, a, b, keeps)) return wait(g);
  static Numbers x;
  read(p, a, b, x);
  g.open.push_back({p, a, b, digest(p, x)});
  for (int m = 0; p.in_registers && m < 64; ++m)
    for (int k = 0; k < 16; ++k)
      x.a[m][k] = g.rows[m / 16 * 32 + m % 8 * 4 + k % 8 / 2][m % 16 / 8 + k / 8 * 2] >> (k % 2 * 16);
  Accumulators& sums = accumulators(g, p.columns);
  sums.group = g.commits;
  multiply(p, x, scale_a * scale_b, keeps, sums.values.data());
  ++g.generation;
}

// Do something once all threads of the group are here.
template <typename F>
void meet(const char* what, F once) {
  WarpGroup& g = my_group();
  if (!enter(g, what, nullptr, 0, 0, false)) return wait(g);
  once(g);
  ++g.generation;
}
void wgmma_fence() {
  meet("wgmma.fence", [](WarpGroup&) {});
}
void wgmma_commit() {
  meet("wgmma.commit_group", [](WarpGroup& g) {
    g.committed.push_back(std::move(g.open));
    g.open.clear();
    ++g.commits;
  });
}
void wgmma_wait(unsigned left) {
  meet("wgmma.wait_group", [left](WarpGroup& g) {
    for (; g.committed.size() > left; g.committed.pop_front())
      for (const Flight& f : g.committed.front()) {
        static Numbers x;
        read(f.product, f.a, f.b, x);
        if (digest(f.product, x) != f.was)
          fail("wgmma: operands in shared memory were overwritten before the product was waited for");
      }
    land(g, left);
  });
}

}  // namespace emu
