// What the lanes of a warp do together.
#pragma once

namespace emu {

// A place where the lanes of a mask meet and see one another's words.
struct Exchange : Waitable {
  int warp = 0, arrived = 0;
  uint32_t mask = 0;
  uint64_t slots[2][32][5];
  uint16_t rows[2][32][8];  // of matrices, by lane
  std::string name() const override {
    return "lanes of warp " + text(warp) + " (" + text(arrived) + " of " +
           text(__builtin_popcount(mask)) + " arrived)";
  }
};
struct Warp {
  Exchange all;
  std::map<uint32_t, Exchange> some;
};
inline std::vector<Warp> warps;

inline Exchange& place_of(uint32_t mask) {
  int number = current / 32, left = cluster_threads - number * 32;
  if (!(mask >> lane() & 1)) fail("an operation of a warp without the lane that asks for it");
  if (left < 32) mask &= (1u << left) - 1;
  Exchange& x = mask == kAll ? warps[number].all : warps[number].some[mask];
  x.warp = number;
  x.mask = mask;
  return x;
}

// Bring words to the others. The last lane does something for all before they go on. Returns which
// of two buffers was used: who reads the other one has not arrived here yet.
template <typename F>
int meet_lanes(Exchange& x, const uint64_t (&values)[5], F once) {
  int side = x.generation & 1;
  std::memcpy(x.slots[side][lane()], values, sizeof values);
  if (++x.arrived < __builtin_popcount(x.mask)) {
    wait(x);
    return side;
  }
  x.arrived = 0;
  once(side);
  ++x.generation;
  return side;
}

Words exchange(uint32_t mask, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e) {
  Exchange& x = place_of(mask);
  return x.slots[meet_lanes(x, {a, b, c, d, e}, [](int) {})];
}

unsigned ballot(uint32_t mask, bool value) {
  Words words = exchange(mask, value);
  unsigned votes = 0;
  for (int n = 0; n < 32; ++n)
    if (mask >> n & 1) votes |= (unsigned)words[n][0] << n;
  return votes;
}

inline uint64_t pair(uint32_t low, uint32_t high) { return low | (uint64_t)high << 32; }
inline float element(uint64_t word, int half_, bool bf16) {
  return decode((uint16_t)(word >> (16 * half_)), bf16);
}

void mma(bool bf16, float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1,
         uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
  Words w = exchange(kAll, pair(a0, a1), pair(a2, a3), pair(b0, b1));
  float c[4] = {c0, c1, c2, c3};
  for (int n = 0; n < 4; ++n) {
    int row = lane() / 4 + 8 * (n / 2), column = lane() % 4 * 2 + n % 2;
    double sum = c[n];
    for (int k = 0; k < 16; ++k) {
      int reg = row / 8 + 2 * (k / 8);  // a0: rows 0-7, k 0-7; a1: rows 8-15; a2, a3: k 8-15
      uint64_t aw = w[row % 8 * 4 + k % 8 / 2][reg / 2] >> (32 * (reg % 2));
      uint64_t bw = w[column * 4 + k % 8 / 2][2] >> (32 * (k / 8));
      sum += (double)element(aw, k % 2, bf16) * element(bw, k % 2, bf16);
    }
    c[n] = (float)sum;
  }
  d0 = c[0]; d1 = c[1]; d2 = c[2]; d3 = c[3];
}

// Matrices of 8 x 8, whose rows lie where lanes say; a lane has two neighbours of each. Call
// move(lane with the row, column, matrix, which of two) for a lane.
template <typename F>
void each_of_matrices(int of, bool transposed, F move) {
  for (int m = 0; m < 4; ++m) {
    for (int n = 0; n < 2; ++n) {
      int row = transposed ? of % 4 * 2 + n : of / 4, column = transposed ? of / 4 : of % 4 * 2 + n;
      move(m * 8 + row, column, m, n);
    }
  }
}

void ldmatrix(bool transposed, uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3,
              uint32_t pointer) {
  uint32_t* out[4] = {&r0, &r1, &r2, &r3};
  Exchange& x = place_of(kAll);
  int side = meet_lanes(x, {pointer}, [&](int side) {
    for (int n = 0; n < 32; ++n)
      std::memcpy(x.rows[side][n], at((uint32_t)x.slots[side][n][0], 16, "ldmatrix", 16), 16);
  });
  for (uint32_t* r : out) *r = 0;
  each_of_matrices(lane(), transposed, [&](int row, int column, int m, int n) {
    *out[m] |= (uint32_t)x.rows[side][row][column] << (16 * n);
  });
}

void stmatrix(bool transposed, uint32_t pointer, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  Exchange& x = place_of(kAll);
  meet_lanes(x, {pointer, r0, r1, r2, r3}, [&](int side) {
    for (int from = 0; from < 32; ++from)
      each_of_matrices(from, transposed, [&](int row, int column, int m, int n) {
        x.rows[side][row][column] = (uint16_t)(x.slots[side][from][1 + m] >> (16 * n));
      });
    for (int n = 0; n < 32; ++n)
      std::memcpy(at((uint32_t)x.slots[side][n][0], 16, "stmatrix", 16), x.rows[side][n], 16);
  });
}

}  // namespace emu
