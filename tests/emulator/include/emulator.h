// Runs CUDA kernels on the CPU, a fiber for each thread of a block, to check what they compute.
//
// Blocks run one after the other, and fibers switch at barriers and warp operations only: races are
// not seen, but uninitialised shared memory, barriers that not all threads reach, and writes behind
// shared memory are. Covers what the generated code uses.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define CUDART_INF_F (std::numeric_limits<float>::infinity())
#define CUDART_NAN_F (std::numeric_limits<float>::quiet_NaN())
#define CUDART_INF (std::numeric_limits<double>::infinity())
#define CUDART_NAN (std::numeric_limits<double>::quiet_NaN())

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    bits = x != x ? 0x7FFF : (uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
  }
  operator float() const {
    uint32_t u = (uint32_t)bits << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }
};
using half = _Float16;
using __half = half;
struct __half2 {
  half x, y;
  __half2() = default;
  __half2(half x, half y) : x(x), y(y) {}
};
using half2 = __half2;
struct float2 { float x, y; };
struct nv_bfloat162 {
  nv_bfloat16 x, y;
  nv_bfloat162() = default;
  nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) : x(x), y(y) {}
};
using __nv_bfloat162 = nv_bfloat162;
using __nv_bfloat16 = nv_bfloat16;
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __bfloat162float(nv_bfloat16 x) { return x; }
inline nv_bfloat16 __float2bfloat16(float x) { return x; }
inline nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline half __float2half_rn(float x) { return (half)x; }
inline half __float2half(float x) { return (half)x; }
inline float __half2float(half x) { return (float)x; }
inline bool __hgt(float a, float b) { return a > b; }
inline bool __hlt(float a, float b) { return a < b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }

namespace emu {

struct Dim { int x, y, z; };
struct Fiber {
  void* sp = nullptr;
  const int* waits = nullptr;  // runs again once this differs from `seen`
  int seen = 0;
  bool done = false;
};
struct Warp {
  int arrived = 0, generation = 0;
  uint64_t slots[32][4];
};

inline constexpr size_t kStack = 256 << 10, kGuard = 4096;
inline Dim block_index, thread_index, block_size;
inline unsigned char* shared;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline int current, arrived, generation, predicate, predicates;
inline void* scheduler;
inline std::function<void()> body;

extern "C" void emu_switch(void** save, void* load);
asm(R"(
.weak emu_switch
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

inline void wait(const int* counter, int seen) {
  Fiber& me = fibers[current];
  me.waits = counter;
  me.seen = seen;
  int index = current;
  emu_switch(&me.sp, scheduler);
  current = index;
  thread_index.x = index;
}

inline void entry() {
  body();
  fibers[current].done = true;
  void* unused;
  emu_switch(&unused, scheduler);
  abort();
}

inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %d)\n", what, block_index.x);
  std::fflush(stderr);
  abort();
}

inline int syncthreads_or(int value) {
  predicate |= value != 0;
  if (++arrived == block_size.x) {
    arrived = 0;
    predicates = predicate;
    predicate = 0;
    ++generation;
  } else {
    wait(&generation, generation);
  }
  return predicates;
}

// Exchange four words between the lanes of a warp.
inline const Warp& exchange(uint64_t a, uint64_t b = 0, uint64_t c = 0, uint64_t d = 0) {
  Warp& warp = warps[thread_index.x / 32];
  int lane = thread_index.x % 32;
  // Nobody may still read the slots of the exchange before.
  if (++warp.arrived == 32) { warp.arrived = 0; ++warp.generation; } else wait(&warp.generation, warp.generation);
  uint64_t values[4] = {a, b, c, d};
  std::memcpy(warp.slots[lane], values, sizeof values);
  if (++warp.arrived == 32) { warp.arrived = 0; ++warp.generation; } else wait(&warp.generation, warp.generation);
  return warp;
}

template <typename T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  const Warp& warp = exchange(word);
  std::memcpy(&value, &warp.slots[lane][0], sizeof(T));
  return value;
}

inline float element(uint64_t word, int half_, bool bf16) {
  uint16_t bits = (uint16_t)(word >> (16 * half_));
  if (bf16) { nv_bfloat16 x; x.bits = bits; return x; }
  half x;
  std::memcpy(&x, &bits, 2);
  return (float)x;
}

template <bool kBf16>
void mma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2,
         uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
  const Warp& w = exchange(a0 | (uint64_t)a1 << 32, a2 | (uint64_t)a3 << 32, b0 | (uint64_t)b1 << 32);
  int lane = thread_index.x % 32;
  float c[4] = {c0, c1, c2, c3};
  for (int n = 0; n < 4; ++n) {
    int row = lane / 4 + 8 * (n / 2), column = lane % 4 * 2 + n % 2;
    double sum = c[n];
    for (int k = 0; k < 16; ++k) {
      int reg = row / 8 + 2 * (k / 8);  // a0: rows 0-7, k 0-7; a1: rows 8-15; a2, a3: k 8-15
      uint64_t aw = w.slots[row % 8 * 4 + k % 8 / 2][reg / 2] >> (32 * (reg % 2));
      uint64_t bw = w.slots[column * 4 + k % 8 / 2][2] >> (32 * (k / 8));
      sum += (double)element(aw, k % 2, kBf16) * element(bw, k % 2, kBf16);
    }
    c[n] = (float)sum;
  }
  d0 = c[0]; d1 = c[1]; d2 = c[2]; d3 = c[3];
}

template <bool kTransposed>
void ldmatrix(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t pointer) {
  if (pointer % 16) fail("ldmatrix: address is no multiple of 16");
  const Warp& w = exchange(pointer);
  int lane = thread_index.x % 32;
  uint32_t* out[4] = {&r0, &r1, &r2, &r3};
  for (int m = 0; m < 4; ++m) {
    uint32_t word = 0;
    for (int n = 0; n < 2; ++n) {
      int row = kTransposed ? lane % 4 * 2 + n : lane / 4;
      int column = kTransposed ? lane / 4 : lane % 4 * 2 + n;
      uint16_t bits;
      std::memcpy(&bits, shared + w.slots[m * 8 + row][0] + 2 * column, 2);
      word |= (uint32_t)bits << (16 * n);
    }
    *out[m] = word;
  }
}

inline void copy(uint32_t to, const void* from, unsigned size) {
  if (to % 16 || (size && (uintptr_t)from % 16)) fail("cp.async: address is no multiple of 16");
  std::memset(shared + to, 0, 16);
  std::memcpy(shared + to, from, size);
}

inline void launch(int grid, int threads, size_t bytes, std::function<void()> work) {
  static std::vector<unsigned char> stacks;
  static std::vector<unsigned char> memory;
  stacks.resize((size_t)threads * kStack);
  memory.resize(bytes + 1024 + kGuard);
  shared = (unsigned char*)(((uintptr_t)memory.data() + 1023) / 1024 * 1024);
  block_size = {threads, 1, 1};
  body = std::move(work);
  for (int block = 0; block < grid; ++block) {
    std::memset(shared, 0xFF, bytes);
    std::memset(shared + bytes, 0xA5, kGuard - 1024);
    block_index = {block, 0, 0};
    fibers.assign(threads, {});
    warps.assign((threads + 31) / 32, {});
    arrived = generation = predicate = 0;
    for (int n = 0; n < threads; ++n) {
      void** top = (void**)(((uintptr_t)stacks.data() + (n + 1) * kStack) / 16 * 16);
      *--top = nullptr;
      *--top = (void*)entry;
      top -= 6;
      fibers[n].sp = top;
    }
    int left = threads;
    while (left) {
      bool moved = false;
      for (int n = 0; n < threads; ++n) {
        Fiber& f = fibers[n];
        if (f.done || (f.waits && *f.waits == f.seen)) continue;
        f.waits = nullptr;
        moved = true;
        current = n;
        thread_index = {n, 0, 0};
        emu_switch(&scheduler, f.sp);
        left -= f.done;
      }
      if (!moved) fail("threads wait for others that are done or elsewhere");
    }
    for (size_t n = bytes; n < bytes + kGuard - 1024; ++n)
      if (shared[n] != 0xA5) fail("written behind shared memory");
  }
}

}  // namespace emu

#define threadIdx emu::thread_index
#define blockIdx emu::block_index
inline void __syncthreads() { emu::syncthreads_or(0); }
inline int __syncthreads_or(int x) { return emu::syncthreads_or(x); }
template <typename T> T __shfl_sync(unsigned, T x, int lane, int) { return emu::shuffle(x, lane); }
template <typename T> T __shfl_xor_sync(unsigned, T x, int m, int) {
  return emu::shuffle(x, (emu::thread_index.x % 32) ^ m);
}
template <typename T> T __shfl_up_sync(unsigned, T x, int n, int) {
  int lane = emu::thread_index.x % 32;
  return emu::shuffle(x, lane >= n ? lane - n : lane);
}
inline unsigned __ballot_sync(unsigned, int x) {
  const emu::Warp& w = emu::exchange(x != 0);
  unsigned votes = 0;
  for (int n = 0; n < 32; ++n) votes |= (unsigned)w.slots[n][0] << n;
  return votes;
}
inline unsigned __cvta_generic_to_shared(const void* p) {
  return (unsigned)((const unsigned char*)p - emu::shared);
}
template <typename T> T atomicAdd(T* p, T x) { T old = *p; *p += x; return old; }

// --- the runtime ---------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess, cudaErrorCudartUnloading };
using cudaStream_t = void*;
struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* d) { *d = 0; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
template <typename F> cudaError_t cudaFuncSetAttribute(F, int, int) { return cudaSuccess; }
template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A... args) {
  emu::launch(c->gridDim.x, c->blockDim.x, c->dynamicSmemBytes, [=] { kernel(args...); });
  return cudaSuccess;
}
