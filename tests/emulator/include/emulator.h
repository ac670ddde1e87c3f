// What kernels see of the emulator: instructions and built-in functions, and the runtime that starts
// kernels. The work is done in `core`, which is compiled once.
#pragma once
#include "numbers.h"

struct emu_dim { int x, y, z; };
extern emu_dim threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

extern int current;            // the thread that runs, by number in its cluster
extern int here;               // its block, by number in the cluster
extern unsigned char* shared;  // of the block
// Of computing, after which a thread that has not waited for anything is given up.
extern int seconds;

inline int lane() { return current % 32; }

// Give the kernel up; the launch returns an error with this text.
[[noreturn]] void fail(const char* what);
const char* failure_text();
// Let others run: whoever looks at memory again and again calls this.
void poll();

// --- memory --------------------------------------------------------------------------------------

// The memory at an address of shared memory, which must hold so many bytes.
unsigned char* at(uint32_t address, size_t bytes, const char* what, uint32_t aligned = 1);
uint32_t address_of(const void* p);

template <typename T, typename... V>
void ld_global(const void* from, V&... to) {
  if ((uintptr_t)from % (sizeof(T) * sizeof...(V))) fail("ld: the address is not aligned");
  const T* p = (const T*)from;
  ((std::memcpy(&to, p++, sizeof(T))), ...);
}
template <typename T, typename... V>
void st_global(const void* place, V... from) {
  void* to = const_cast<void*>(place);  // helpers take every address as one of constants
  if ((uintptr_t)to % (sizeof(T) * sizeof...(V))) fail("st: the address is not aligned");
  T* p = (T*)to;
  ((std::memcpy(p++, &from, sizeof(T))), ...);
}
template <typename T, typename... V>
void ld_shared(uint32_t from, V&... to) {
  constexpr size_t size = sizeof(T) * sizeof...(V);
  ld_global<T>(at(from, size, "ld.shared", size), to...);
}
template <typename T, typename... V>
void st_shared(uint32_t to, V... from) {
  constexpr size_t size = sizeof(T) * sizeof...(V);
  st_global<T>(at(to, size, "st.shared", size), from...);
}

// cp.async: `size` bytes, and zeros up to `whole`.
void copy(uint32_t to, const void* from, unsigned whole, unsigned size);
inline void copy(uint32_t to, const void* from, unsigned whole) { copy(to, from, whole, whole); }
void copy_commit();
void copy_wait(unsigned groups);
void copy_wait_all();

void tensor_load(int rank, uint32_t to, const void* map, const int* place, uint32_t barrier);
// To one place in the shared memory of each block of a mask.
void tensor_load_cluster(int rank, uint32_t to, const void* map, const int* place, uint32_t barrier,
                         uint32_t mask);
void tensor_store(int rank, const void* map, const int* place, uint32_t from);
void bulk_commit();
void bulk_wait(unsigned groups);

// --- barriers ------------------------------------------------------------------------------------

void barrier_sync(uint32_t id);  // of the whole block
void barrier_sync(uint32_t id, uint32_t count);
void barrier_arrive(uint32_t id, uint32_t count);
// Returns whether `value` is true anywhere (0) or everywhere (1), or in how many threads (2).
int syncthreads(int value, int which);

void mbarrier_init(uint32_t address, uint32_t count);
void mbarrier_inval(uint32_t address);
void mbarrier_expect(uint32_t address, uint32_t bytes);
void mbarrier_arrive(uint32_t address, uint32_t count = 1);
void mbarrier_arrive_expect(uint32_t address, uint32_t bytes);
// Arrive once the copies that this thread has issued are done.
void mbarrier_arrive_copies(uint32_t address);
void mbarrier_wait(bool& done, uint32_t address, uint32_t parity);
void mbarrier_test(bool& done, uint32_t address, uint32_t parity);

// The address of something in the shared memory of another block of the cluster.
void cluster_address(uint32_t& to, uint32_t address, uint32_t rank);
void mbarrier_arrive_cluster(uint32_t address, uint32_t count);
void cluster_arrive();
void cluster_wait();

// --- warps ---------------------------------------------------------------------------------------

inline constexpr uint32_t kAll = 0xFFFFFFFF;
using Words = uint64_t (&)[32][5];

// What every lane of a mask brings.
Words exchange(uint32_t mask, uint64_t a = 0, uint64_t b = 0, uint64_t c = 0, uint64_t d = 0,
               uint64_t e = 0);

inline void warp_sync(uint32_t mask = kAll) { exchange(mask); }
unsigned ballot(uint32_t mask, bool value);
inline void elect(bool& elected, uint32_t mask) {
  exchange(mask);
  elected = lane() == __builtin_ctz(mask);
}

template <typename T>
T shuffle(uint32_t mask, T value, int from) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  Words words = exchange(mask, word);
  if (mask >> from & 1) std::memcpy(&value, &words[from][0], sizeof(T));
  return value;
}

template <typename T, typename F>
T reduce(uint32_t mask, T value, F join) {
  Words words = exchange(mask, (uint64_t)value);
  bool first = true;
  for (int n = 0; n < 32; ++n) {
    if (!(mask >> n & 1)) continue;
    value = first ? (T)words[n][0] : join(value, (T)words[n][0]);
    first = false;
  }
  return value;
}
template <typename T> void redux_add(T& to, T x, uint32_t mask) {
  to = reduce(mask, x, [](T a, T b) { return (T)(a + b); });
}
template <typename T> void redux_min(T& to, T x, uint32_t mask) {
  to = reduce(mask, x, [](T a, T b) { return a < b ? a : b; });
}
template <typename T> void redux_max(T& to, T x, uint32_t mask) {
  to = reduce(mask, x, [](T a, T b) { return a > b ? a : b; });
}
template <typename T> void redux_or(T& to, T x, uint32_t mask) {
  to = reduce(mask, x, [](T a, T b) { return (T)(a | b); });
}
template <typename T> void redux_and(T& to, T x, uint32_t mask) {
  to = reduce(mask, x, [](T a, T b) { return (T)(a & b); });
}
template <typename T> void redux_xor(T& to, T x, uint32_t mask) {
  to = reduce(mask, x, [](T a, T b) { return (T)(a ^ b); });
}

void mma(bool bf16, float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1,
         uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3);
void ldmatrix(bool transposed, uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3,
              uint32_t pointer);
void stmatrix(bool transposed, uint32_t pointer, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3);

// --- warp groups ---------------------------------------------------------------------------------

// 64 rows, `columns`, depth 16.
struct Product {
  int columns;
  bool bf16, transposed_a, transposed_b, in_registers;
};
void wgmma(const Product& product, float* const* registers, const uint32_t (&rows)[4], uint64_t a,
           uint64_t b, bool keeps, int scale_a, int scale_b);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(unsigned groups);

}  // namespace emu

// --- built-in functions --------------------------------------------------------------------------

inline void __syncthreads() { emu::barrier_sync(0); }
inline int __syncthreads_or(int x) { return emu::syncthreads(x, 0); }
inline int __syncthreads_and(int x) { return emu::syncthreads(x, 1); }
inline int __syncthreads_count(int x) { return emu::syncthreads(x, 2); }
inline void __syncwarp(unsigned mask = emu::kAll) { emu::warp_sync(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emu::poll(); }
template <typename T> T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
  return emu::shuffle(mask, x, emu::lane() / width * width + from % width);
}
template <typename T> T __shfl_xor_sync(unsigned mask, T x, int with, int = 32) {
  return emu::shuffle(mask, x, emu::lane() ^ with);
}
template <typename T> T __shfl_up_sync(unsigned mask, T x, int n, int = 32) {
  int lane = emu::lane();
  return emu::shuffle(mask, x, lane >= n ? lane - n : lane);
}
template <typename T> T __shfl_down_sync(unsigned mask, T x, int n, int = 32) {
  int lane = emu::lane();
  return emu::shuffle(mask, x, lane + n < 32 ? lane + n : lane);
}
inline unsigned __ballot_sync(unsigned mask, int x) { return emu::ballot(mask, x); }
inline int __any_sync(unsigned mask, int x) { return emu::ballot(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return emu::ballot(mask, x) == mask; }
template <typename T> T __reduce_add_sync(unsigned mask, T x) { emu::redux_add(x, x, mask); return x; }
template <typename T> T __reduce_min_sync(unsigned mask, T x) { emu::redux_min(x, x, mask); return x; }
template <typename T> T __reduce_max_sync(unsigned mask, T x) { emu::redux_max(x, x, mask); return x; }
template <typename T> T __reduce_or_sync(unsigned mask, T x) { emu::redux_or(x, x, mask); return x; }
template <typename T> T __reduce_and_sync(unsigned mask, T x) { emu::redux_and(x, x, mask); return x; }
template <typename T> T __ldg(const T* p) { return *p; }
inline unsigned __cvta_generic_to_shared(const void* p) { return emu::address_of(p); }

// Whoever changes nothing, or swaps, may be waiting for another thread.
template <typename T, typename U> T atomicAdd(T* p, U x) {
  if (!x) emu::poll();
  T old = *p;
  *p = (T)(old + x);
  return old;
}
template <typename T, typename U> T atomicOr(T* p, U x) {
  if (!x) emu::poll();
  T old = *p;
  *p = (T)(old | x);
  return old;
}
template <typename T, typename U> T atomicAnd(T* p, U x) { T old = *p; *p = (T)(old & x); return old; }
template <typename T, typename U> T atomicMax(T* p, U x) { T old = *p; if ((T)x > old) *p = x; return old; }
template <typename T, typename U> T atomicMin(T* p, U x) { T old = *p; if ((T)x < old) *p = x; return old; }
template <typename T, typename U> T atomicExch(T* p, U x) {
  emu::poll();
  T old = *p;
  *p = x;
  return old;
}
template <typename T, typename U, typename V> T atomicCAS(T* p, U expected, V x) {
  emu::poll();
  T old = *p;
  if (old == (T)expected) *p = x;
  return old;
}

// --- the runtime ---------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure, cudaErrorCudartUnloading };
using cudaStream_t = void*;
struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
enum { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute { int id; struct { dim3 clusterDim; } val; };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
inline const char* cudaGetErrorString(cudaError_t) { return emu::failure_text(); }
cudaError_t cudaGetLastError();
inline cudaError_t cudaGetDevice(int* d) { *d = 0; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
template <typename F> cudaError_t cudaFuncSetAttribute(F, int, int) { return cudaSuccess; }

namespace emu {

cudaError_t launch(dim3 grid, dim3 block, size_t bytes, void (*call)(const void*), const void* work,
                   int cluster);
template <typename F>
cudaError_t launch(dim3 grid, dim3 block, size_t bytes, const F& work, int cluster = 1) {
  return launch(grid, block, bytes, [](const void* f) { (*(const F*)f)(); }, &work, cluster);
}

}  // namespace emu

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A... args) {
  int cluster = c->numAttrs ? c->attrs[0].val.clusterDim.x : 1;
  return emu::launch(c->gridDim, c->blockDim, c->dynamicSmemBytes, [=] { kernel(args...); }, cluster);
}

// --- tensor maps ---------------------------------------------------------------------------------

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_UINT16, CU_TENSOR_MAP_DATA_TYPE_UINT32,
  CU_TENSOR_MAP_DATA_TYPE_INT32, CU_TENSOR_MAP_DATA_TYPE_UINT64, CU_TENSOR_MAP_DATA_TYPE_INT64,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B,
  CU_TENSOR_MAP_SWIZZLE_128B
};
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
struct alignas(64) CUtensorMap {
  unsigned char* data;
  uint64_t dims[5], strides[5];  // strides in bytes, of the first dimension too
  uint16_t box[5];
  uint8_t rank, swizzle;
};
CUresult cuGetErrorString(CUresult, const char** to);
CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* dims,
    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
    CUtensorMapFloatOOBfill fill);
