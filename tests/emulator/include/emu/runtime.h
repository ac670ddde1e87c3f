// What is called by name: built-in functions of the device, and the runtime on the host.
#pragma once

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
inline unsigned __reduce_or_sync(unsigned mask, unsigned x) { emu::redux_or(x, x, mask); return x; }
inline unsigned __reduce_and_sync(unsigned mask, unsigned x) { emu::redux_and(x, x, mask); return x; }
template <typename T> T __ldg(const T* p) { return *p; }
inline unsigned __cvta_generic_to_shared(const void* p) { return emu::address_of(p); }

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure, cudaErrorCudartUnloading };
using cudaStream_t = void*;
struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emu {

inline constexpr size_t kGuard = 4096, kMost = 232448;
inline cudaError_t error = cudaSuccess;

// What a block must not leave behind.
inline void check_end() {
  for (size_t n = shared_size; n < shared_size + kGuard; ++n)
    if (shared[n] != 0xA5) fail("written behind shared memory");
  std::string done = "threads are done, but ";
  for (auto& event : events) {
    if (!event.unless.empty()) fail(done + event.unless);
    event.happen();
  }
  for (auto& [address, b] : mbarriers)
    if (b.bytes) fail(done + text(b.bytes) + " bytes are missing at the mbarrier at " + text(address));
  for (auto& [thread, s] : stores)
    if (!s.open.empty() || !s.groups.empty())
      fail(done + text(thread) + " has not waited for its copies to global memory");
  for (auto& g : groups)
    if (!g.open.empty() || !g.committed.empty())
      fail(done + "warp group " + text(g.number) + " has not waited for its products");
}

inline void begin(int threads, size_t bytes) {
  static std::vector<unsigned char> memory;
  memory.resize(bytes + 1024 + kGuard);
  shared = (unsigned char*)(((uintptr_t)memory.data() + 1023) / 1024 * 1024);
  shared_size = bytes;
  std::memset(shared, 0xFF, bytes);
  std::memset(shared + bytes, 0xA5, kGuard);
  block_threads = threads;
  warps.assign((threads + 31) / 32, {});
  groups.assign((threads + 127) / 128, {});
  copies.assign(threads, {});
  for (int id = 0; id < 16; ++id) barriers[id] = {}, barriers[id].id = id;
  mbarriers.clear();
  events.clear();
  stores.clear();
}

inline void launch(dim3 grid, dim3 block, size_t bytes, std::function<void()> work) {
  Watch watch;
  int threads = block.x * block.y * block.z;
  failure.clear();
  dice = 1;
  blockDim = {(int)block.x, (int)block.y, (int)block.z};
  gridDim = {(int)grid.x, (int)grid.y, (int)grid.z};
  body = std::move(work);
  long long blocks = (long long)grid.x * grid.y * grid.z;
  try {
    if (threads < 1 || threads > 1024) fail(text(threads) + " threads in a block");
    if (bytes > kMost) fail(text(bytes) + " bytes of shared memory");
    for (long long n = 0; n < blocks; ++n) {
      blockIdx = {(int)(n % grid.x), (int)(n / grid.x % grid.y), (int)(n / grid.x / grid.y)};
      begin(threads, bytes);
      run_block(threads);
      check_end();
    }
  } catch (const GivenUp&) {
  }
  body = nullptr;
  error = failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emu

inline const char* cudaGetErrorString(cudaError_t) { return emu::failure.c_str(); }
inline cudaError_t cudaGetLastError() {
  cudaError_t last = emu::error;
  emu::error = cudaSuccess;
  return last;
}
inline cudaError_t cudaGetDevice(int* d) { *d = 0; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
template <typename F> cudaError_t cudaFuncSetAttribute(F, int, int) { return cudaSuccess; }
template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A... args) {
  emu::launch(c->gridDim, c->blockDim, c->dynamicSmemBytes, [=] { kernel(args...); });
  return emu::error;
}
