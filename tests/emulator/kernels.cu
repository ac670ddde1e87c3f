// Kernels for the tests of the emulator; those that must fail say with which words, in blocks of 128
// threads and 10240 bytes of shared memory.
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
__device__ void arrive_at(void* barrier, unsigned rank) {
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0], %1;" :: "r"(there), "r"(1) : "memory");
}
__device__ void gather_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ void product_8(float (&d)[4], uint64_t a, uint64_t b) {
  asm volatile("{ .reg .pred ps0; setp.ne.b32 ps0, %6, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, ps0, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b), "r"(0));
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

// says: bar.sync: barrier 1 expects
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
  memory[10240 + threadIdx.x * 2] = 1;
}

// says: ldmatrix: shared memory ends before address 11264 + 16
__global__ void reads_behind(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  unsigned a, b, c, d;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(shared_address(memory) + 10240) : "memory");
}

// says: not aligned to the 1024 bytes of its swizzle
__global__ void multiplies_askew(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  float d[4];
  uint64_t a = (1ull << 62) | (64ull << 32) | (shared_address(memory) >> 4), b = a + 8;
  product_8(d, a, b);
}

// says: threads of warp group 0 disagree
__global__ void disagrees(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  float d[4];
  uint64_t a = (1ull << 62) | (64ull << 32) | (shared_address(memory) >> 4), b = a + threadIdx.x / 32 * 64;
  product_8(d, a, b);
}

// says: operands in shared memory were overwritten before the product was waited for
__global__ void overwrites_an_operand(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  float d[4];
  for (int i = threadIdx.x; i < 10240; i += 128) memory[i] = 0;
  __syncthreads();
  uint64_t a = (1ull << 62) | (64ull << 32) | (shared_address(memory) >> 4), b = a + 512;
  product_8(d, a, b);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  if (threadIdx.x == 5) memory[8192 + 1] = 1;
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// says: threads are done, but warp group 0 has not waited for its products
__global__ void waits_for_no_product(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  float d[4];
  uint64_t a = (1ull << 62) | (64ull << 32) | (shared_address(memory) >> 4), b = a + 512;
  product_8(d, a, b);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// says: a thread runs for ever, thread 3
__global__ void runs_for_ever(void** p) {
  if (threadIdx.x == 3) while (true) asm volatile("");
}

// says: there is no barrier 16
__global__ void uses_too_many_barriers(void** p) {
  asm volatile("bar.sync %0, %1;" :: "r"(16), "r"(128) : "memory");
}

// says: part of a warp is at barrier 2
__global__ void brings_half_warps(void** p) {
  if (threadIdx.x % 32 < 16) asm volatile("bar.sync %0, %1;" :: "r"(2), "r"(64) : "memory");
}

// Bring matrices to shared memory and back; each way also transposed.
__global__ void moves_matrices(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  int lane = threadIdx.x;
  const uint16_t* in = (const uint16_t*)p[0];
  uint32_t r[4];
  for (int m = 0; m < 4; ++m) std::memcpy(&r[m], in + m * 64 + lane * 2, 4);
  unsigned to = shared_address(memory + lane * 48);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" : : "r"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" : : "r"(to + 16), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
  __syncwarp();
  std::memcpy((uint16_t*)p[1] + lane * 8, memory + lane * 48, 16);
  std::memcpy((uint16_t*)p[2] + lane * 8, memory + lane * 48 + 16, 16);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(to) : "memory");
  for (int m = 0; m < 4; ++m) std::memcpy((uint16_t*)p[3] + m * 64 + lane * 2, &r[m], 4);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(to) : "memory");
  for (int m = 0; m < 4; ++m) std::memcpy((uint16_t*)p[4] + m * 64 + lane * 2, &r[m], 4);
}

__device__ unsigned elected() {
  uint32_t pred = 0;
  asm volatile(
    "{\n"
    ".reg .pred %%px;\n"
    "     elect.sync _|%%px, %1;\n"
    "@%%px mov.s32 %0, 1;\n"
    "}\n"
    : "+r"(pred)
    : "r"(0xFFFFFFFF));
  return pred;
}

// What lanes know of one another: the whole warp, and its halves on their own.
__global__ void asks_around(void** p) {
  int lane = threadIdx.x, x = ((const int*)p[0])[lane], n = 0;
  int* out = (int*)p[1] + lane * 16;
  unsigned u, half = lane < 16 ? 0xFFFF : 0xFFFF0000;
  asm volatile("redux.sync.add.s32 %0, %1, %2;" : "=r"(out[n++]) : "r"(x), "r"(0xFFFFFFFF));
  asm volatile("redux.sync.min.s32 %0, %1, %2;" : "=r"(out[n++]) : "r"(x), "r"(0xFFFFFFFF));
  asm volatile("redux.sync.max.s32 %0, %1, %2;" : "=r"(out[n++]) : "r"(x), "r"(0xFFFFFFFF));
  asm volatile("redux.sync.or.b32 %0, %1, %2;" : "=r"(out[n++]) : "r"(x), "r"(0xFFFFFFFF));
  asm volatile("redux.sync.xor.b32 %0, %1, %2;" : "=r"(out[n++]) : "r"(x), "r"(0xFFFFFFFF));
  out[n++] = elected();
  if (lane < 16) out[n] = __reduce_add_sync(half, x);
  else out[n] = __reduce_add_sync(half, x);
  ++n;
  out[n++] = __ballot_sync(0xFFFFFFFF, x > 0);
  out[n++] = __any_sync(half, x == 7) + 2 * __all_sync(half, x < 1000);
  out[n++] = __shfl_sync(0xFFFFFFFF, x, lane * 5, 32);
  out[n++] = __shfl_xor_sync(0xFFFFFFFF, x, 9, 32);
  out[n++] = __shfl_up_sync(0xFFFFFFFF, x, 3, 32);
  out[n++] = __shfl_down_sync(0xFFFFFFFF, x, 4, 32);
  out[n++] = __popc(x) + 100 * __ffs(x);
}

__global__ void raises_two(void** p) {
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(((float*)p[1])[threadIdx.x]) : "f"(((const float*)p[0])[threadIdx.x]));
}

// Bring 16 bytes through registers and shared memory, in vectors of all kinds.
__global__ void moves_vectors(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  const char* from = (const char*)p[0] + threadIdx.x * 16;
  char* to = (char*)p[1] + threadIdx.x * 16;
  unsigned a, b, c, d, at = shared_address(memory + threadIdx.x * 16);
  uint64_t e, f;
  uint16_t low;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "l"(from), "l"(0ull) : "memory");
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" : : "r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
  asm volatile("ld.shared::cta.v2.b64 {%0, %1}, [%2];" : "=l"(e), "=l"(f) : "r"(at) : "memory");
  asm volatile("st.global.v2.b64 [%0], {%1, %2};" : : "l"(to), "l"(e), "l"(f) : "memory");
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(low) : "r"(at + 6) : "memory");
  asm volatile("st.global.L1::no_allocate.b16 [%0], %1;" : : "l"(to), "h"(low) : "memory");
}

// Copy in three groups; read each once it must be there.
__global__ void copies_in_groups(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  int tid = threadIdx.x;
  void* barrier = memory + 4 * 2048;
  if (tid == 0) init(barrier, 128);
  __syncthreads();
  for (int n = 0; n < 4; ++n) {
    const char* from = (const char*)p[0] + (n * 128 + tid) * 16;
    unsigned to = shared_address(memory + (n * 128 + tid) * 16);
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2, %3;" : : "r"(to), "l"(from), "r"(n == 1 ? 6 : 16), "l"(0ull) : "memory");
    if (n < 3) asm volatile("cp.async.commit_group;");
    if (n == 3) asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" : : "r"(shared_address(barrier)) : "memory");
  }
  auto read = [&](int n) { std::memcpy((char*)p[1] + (n * 128 + tid) * 16, memory + (n * 128 + (tid ^ 64)) * 16, 16); };
  asm volatile("cp.async.wait_group 2;" ::: "memory");
  __syncthreads();
  read(0);
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  read(1);
  read(2);
  wait_for(barrier, 0);
  read(3);
}

// Two groups hand a number to and fro, at barriers of the caller's choice.
__global__ void meets(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  const int* id = (const int*)p[0];
  int* x = (int*)memory;
  int late = threadIdx.x >= 64;
  asm volatile("setmaxnreg.dec.sync.aligned.u32 72;" ::: "memory");
  for (int n = 0; n < 5; ++n) {
    if (late) asm volatile("bar.sync %0, %1;" :: "r"(id[0]), "r"(id[2]) : "memory");
    if (threadIdx.x == 64 * late) *x = n == 0 && !late ? 1 : late ? *x * 2 : *x + 3;
    asm volatile("bar.arrive %0, %1;" :: "r"(id[late]), "r"(id[2]) : "memory");
    if (!late) asm volatile("bar.sync %0, %1;" :: "r"(id[1]), "r"(id[2]) : "memory");
  }
  if (threadIdx.x == 0) *(int*)p[1] = *x;
}

// Threads wait for one another by looking at memory.
__global__ void spins_for_a_while(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  int *x = (int*)memory, tid = threadIdx.x, seen = 0;
  void* barrier = memory + 64;
  if (tid < 4) x[tid] = 0;
  if (tid == 0) init(barrier, 1);
  __syncthreads();
  if (tid < 32) while (atomicAdd(&x[0], 0) == 0) {}
  else if (tid < 64) while (seen == 0) asm volatile("ld.acquire.cta.shared.s32 %0, [%1];" : "=r"(seen) : "r"(shared_address(x)) : "memory");
  else if (tid == 127) {
    for (int n = 0; n < 100; ++n) __nanosleep(20);
    __threadfence();
    atomicExch(&x[0], 1);
    arrive(barrier);
  } else {
    while (!seen)
      asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }" : "=r"(seen) : "r"(shared_address(barrier)), "r"(0) : "memory");
  }
  atomicAdd(&x[1], tid);
  atomicOr(&x[2], 1 << tid % 32);
  atomicMax(&x[3], tid);
  __syncthreads();
  if (tid < 4) ((int*)p[0])[tid] = x[tid];
}

// A ring of two buffers: one thread fetches rows, the others add them up.
__global__ void keeps_a_ring(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  void *full[2], *empty[2];
  int tid = threadIdx.x, rows = ((const int*)p[1])[0], sum = 0;
  for (int n = 0; n < 2; ++n) full[n] = memory + 2048 + n * 8, empty[n] = memory + 2064 + n * 8;
  if (tid == 0) for (int n = 0; n < 2; ++n) init(full[n], 1), init(empty[n], 64);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncthreads();
  for (int n = 0; n < rows; ++n) {
    int side = n % 2, turn = n / 2 % 2;
    if (tid == 64) {
      wait_for(empty[side], turn ^ 1);
      expect(full[side], 128);
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" : : "r"(shared_address(memory + side * 1024)), "l"(p[7]), "r"(0), "r"(n), "r"(shared_address(full[side])) : "memory");
    } else if (tid < 64) {
      wait_for(full[side], turn);
      sum += ((const uint16_t*)(memory + side * 1024))[tid] * (n + 1);
      arrive(empty[side]);
    }
  }
  if (tid < 64) ((int*)p[2])[tid] = sum;
}

// Reads boxes without waiting for them.
__global__ void reads_too_early(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  void* barrier = memory + 16 * 128;
  if (threadIdx.x) return;
  init(barrier, 1);
  expect(barrier, 16 * 128);
  for (int n = 0; n < 16; ++n)
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" : : "r"(shared_address(memory + n * 128)), "l"(p[7]), "r"(0), "r"(n), "r"(shared_address(barrier)) : "memory");
  for (int n = 0; n < 16; ++n) ((uint16_t*)p[1])[n] = *(uint16_t*)(memory + n * 128);
  wait_for(barrier, 0);
}

// Clusters of two blocks, of which each copies a box for both and reads both boxes.
__global__ void pair_shares_boxes(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  int rank = blockIdx.x, tid = threadIdx.x;
  void *full = memory + 2048, *seen = memory + 2056;
  if (tid == 0) init(full, 1), init(seen, 64);
  gather_cluster();
  if (tid == 0) {
    expect(full, 256);
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" : : "r"(shared_address(memory + rank * 1024)), "l"(p[7]), "r"(0), "r"(rank), "r"(shared_address(full)), "h"((uint16_t)3) : "memory");
  }
  wait_for(full, 0);
  if (tid < 64) {
    int sum = 0;
    for (int n = 0; n < 2; ++n) sum += ((const uint16_t*)(memory + n * 1024))[tid] * (n + 1 + rank);
    ((int*)p[1])[rank * 64 + tid] = sum;
    arrive_at(seen, 1 - rank);
  }
  wait_for(seen, 0);
  gather_cluster();
}

// says: mbarrier.arrive: there is no block 2 in the cluster
__global__ void pair_arrives_beyond(void** p) {
  extern __shared__ __align__(64) unsigned char memory[];
  if (threadIdx.x == 0) init(memory, 1), arrive_at(memory, 2);
}

// says: wait for the cluster (128 of 256 arrived)
__global__ void pair_meets_nobody(void** p) {
  if (blockIdx.x == 0) gather_cluster();
}

// says: barrier.cluster.arrive: this thread has not waited before
__global__ void pair_arrives_twice(void** p) {
  for (int n = 0; n < 2; ++n) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Launches a kernel by name. `box` describes a tensor map of the numbers at p[0]: rank, swizzle,
// sizes, strides in bytes, sides of a box.
extern "C" const char* run(const char* called, int threads, unsigned long size, void** p, const uint64_t* box) {
  std::string name = called;
  emu::seconds = 1;
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
  return emu::failure_text();
}
