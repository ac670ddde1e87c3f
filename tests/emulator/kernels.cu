// Kernels for the tests of the emulator; those that must fail say with which words.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda.h>
#include <string>
__device__ unsigned shared_address(const void* p) { return __cvta_generic_to_shared(p); }
__device__ void init(void* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ void arrive(void* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" :: "r"(shared_address(barrier)), "r"(1) : "memory");
}
__device__ void expect(void* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ void wait_for(void* barrier, int phase) {
  unsigned int ticks = 0x989680;
  asm volatile(
    "{\n"
    ".reg .pred                P1;\n"
    "LAB_WAIT:\n"
    "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 P1, [%0], %1, %2;\n"
    "@P1                       bra.uni DONE;\n"
    "bra.uni                   LAB_WAIT;\n"
    "DONE:\n"
    "}\n"
    :: "r"(shared_address(barrier)), "r"(phase), "r"(ticks) : "memory");
}

// says: deadlock: threads 0-31 are done; threads 32-127 wait for mbarrier at 1024 to leave phase 0 (0 of 1 arrivals and 512 bytes are missing)
__global__ void waits_for_bytes(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  if (threadIdx.x == 0) { init(memory, 1); expect(memory, 512); }
  __syncthreads();
  if (threadIdx.x >= 32) wait_for(memory, 0);
}

// says: 512 bytes are missing at the mbarrier at 1024
__global__ void leaves_bytes(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  if (threadIdx.x == 0) { init(memory, 1); expect(memory, 512); }
}

// says: threads 0-127 wait for mbarrier at 1024 to leave phase 0 (1 of 3 arrivals
__global__ void waits_for_arrivals(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  if (threadIdx.x == 0) init(memory, 3);
  __syncthreads();
  if (threadIdx.x < 2) arrive(memory);
  wait_for(memory, 0);
}

// says: 3 more arrivals at mbarrier at 1024
__global__ void arrives_too_often(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  if (threadIdx.x == 0) init(memory, 2);
  __syncthreads();
  asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" :: "r"(shared_address(memory)), "r"(3) : "memory");
}

// says: no mbarrier was initialised at 1032
__global__ void forgets_to_initialise(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  arrive(memory + 8);
}

// says: the mbarrier at 1024 was overwritten
__global__ void overwrites(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  if (threadIdx.x == 0) init(memory, 128);
  __syncthreads();
  memory[1] = 0;
  arrive(memory);
}

// says: threads 0-63 wait for barrier 3 (64 of 128 arrived); threads 64-127 wait for barrier 4 (64 of 96 arrived)
__global__ void waits_at_barriers(void** p) {
  if (threadIdx.x < 64) asm volatile("bar.sync %0, %1;" :: "r"(3), "r"(128) : "memory");
  else asm volatile("bar.sync %0, %1;" :: "r"(4), "r"(96) : "memory");
}

// says: barrier 1 expects 128 threads, not 96
__global__ void counts_differently(void** p) {
  int count = threadIdx.x < 64 ? 128 : 96;
  asm volatile("bar.sync %0, %1;" :: "r"(1), "r"(count) : "memory");
}

// says: lanes of warp 0 (16 of 32 arrived)
__global__ void shuffles_in_half_a_warp(void** p) {
  if (threadIdx.x % 32 < 16) __shfl_sync(0xFFFFFFFF, 1, 0, 32);
}

// says: threads 5 wait for memory to change
__global__ void spins(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  if (threadIdx.x == 5) while (atomicAdd((int*)memory, 0) == -1) {}
}

// says: written behind shared memory
__global__ void writes_behind(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  memory[1024 + threadIdx.x * 2] = 1;
}

// says: ldmatrix: shared memory ends before address 2048 + 16
__global__ void reads_behind(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  unsigned a, b, c, d;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(shared_address(memory) + 1024) : "memory");
}

// says: not aligned to the 1024 bytes of its swizzle
__global__ void multiplies_askew(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  float d[4];
  uint64_t a = (1ull << 62) | (64ull << 32) | (shared_address(memory) >> 4), b = a + 8;
  asm volatile("{ .reg .pred ps0; setp.ne.b32 ps0, %6, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, ps0, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b), "r"(0));
}

// says: threads of warp group 0 disagree
__global__ void disagrees(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  float d[4];
  uint64_t a = (1ull << 62) | (64ull << 32) | (shared_address(memory) >> 4), b = a + threadIdx.x / 32 * 64;
  asm volatile("{ .reg .pred ps0; setp.ne.b32 ps0, %6, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, ps0, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b), "r"(0));
}

// Launches a kernel by name. `box` describes a tensor map of the numbers at p[0]: rank, swizzle,
// sizes, strides in bytes, sides of a box.
extern "C" const char* run(const char* called, int threads, unsigned long size, void** p, const uint64_t* box) {
  std::string name = called;
  static CUtensorMap map;
  p[7] = &map;
  if (box) {
    unsigned rank = box[0], sides[5], ones[5] = {1, 1, 1, 1, 1};
    for (unsigned n = 0; n < rank; ++n) sides[n] = box[2 + 2 * rank + n];
    CUresult error = cuTensorMapEncodeTiled(
        &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, rank, p[0], box + 2, box + 3 + rank, sides, ones,
        CUtensorMapInterleave(0), CUtensorMapSwizzle(box[1]), CUtensorMapL2promotion(2), CUtensorMapFloatOOBfill(0));
    const char* message = "";
    if (error) { cuGetErrorString(error, &message); return message; }
  }
  CASES
  return emu::failure.c_str();
}
