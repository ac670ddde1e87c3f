// Launches: block after block, and what a block must not leave behind.
#pragma once

namespace emu {

inline constexpr size_t kGuard = 4096, kMost = 232448;
inline cudaError_t error = cudaSuccess;

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

cudaError_t launch(dim3 grid, dim3 block, size_t bytes, void (*call)(const void*), const void* data) {
  Watch watch;
  int threads = block.x * block.y * block.z;
  failure.clear();
  dice = 1;
  lazy = false;
  blockDim = {(int)block.x, (int)block.y, (int)block.z};
  gridDim = {(int)grid.x, (int)grid.y, (int)grid.z};
  body = call;
  work = data;
  long long blocks = (long long)grid.x * grid.y * grid.z;
  try {
    if (threads < 1 || threads > 1024) fail(text(threads) + " threads in a block");
    if (bytes > kMost) fail(text(bytes) + " bytes of shared memory");
    for (long long n = 0; n < blocks; ++n) {
      blockIdx = {(int)(n % grid.x), (int)(n / grid.x % grid.y), (int)(n / grid.x / grid.y)};
      begin(threads, bytes);
      run_block();
      check_end();
    }
  } catch (const GivenUp&) {
  }
  return error = failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emu

cudaError_t cudaGetLastError() {
  cudaError_t last = emu::error;
  emu::error = cudaSuccess;
  return last;
}
