// Launches: cluster after cluster, and what its blocks must not leave behind.
#pragma once

namespace emu {

inline constexpr size_t kGuard = 4096, kMost = 232448;
inline cudaError_t error = cudaSuccess;

inline void check_end() {
  for (int block = 0; block < cluster_blocks; ++block) {
    enter(block);
    for (size_t n = shared_size; n < shared_size + kGuard; ++n)
      if (shared[n] != 0xA5) fail("written behind shared memory");
  }
  std::string done = "threads are done, but ";
  for (auto& event : events) {
    if (!event.unless.empty()) fail(done + event.unless);
    enter(event.block);
    event.happen();
  }
  for (auto& block : blocks)
    for (auto& [address, b] : block.mbarriers)
      if (b.bytes) fail(done + text(b.bytes) + " bytes are missing at the mbarrier at " + text(address));
  for (auto& [thread, s] : stores)
    if (!s.open.empty() || !s.groups.empty())
      fail(done + text(thread) + " has not waited for its copies to global memory");
  for (auto& g : groups)
    if (!g.open.empty() || !g.committed.empty())
      fail(done + "warp group " + text(g.number) + " has not waited for its products");
}

inline void begin(long long first, int threads, size_t bytes) {
  shared_size = bytes;
  block_threads = threads;
  cluster_threads = threads * cluster_blocks;
  blocks.resize(cluster_blocks);
  for (Block& b : blocks) {
    b.memory.resize(bytes + 1024 + kGuard);
    b.shared = (unsigned char*)(((uintptr_t)b.memory.data() + 1023) / 1024 * 1024);
    std::memset(b.shared, 0xFF, bytes);
    std::memset(b.shared + bytes, 0xA5, kGuard);
    b.place = {(int)(first % gridDim.x), (int)(first / gridDim.x % gridDim.y),
               (int)(first / gridDim.x / gridDim.y)};
    ++first;
    b.left = threads;
    for (int id = 0; id < 16; ++id) b.barriers[id] = {}, b.barriers[id].id = id;
    b.mbarriers.clear();
  }
  gathering = {};
  gathered.assign(cluster_threads, -1);
  warps.assign((cluster_threads + 31) / 32, {});
  groups.assign((cluster_threads + 127) / 128, {});
  copies.assign(cluster_threads, {});
  enter(0);
  events.clear();
  stores.clear();
}

cudaError_t launch(dim3 grid, dim3 block, size_t bytes, void (*call)(const void*), const void* data,
                   int cluster) {
  Watch watch;
  int threads = block.x * block.y * block.z;
  failure.clear();
  dice = 1;
  lazy = false;
  blockDim = {(int)block.x, (int)block.y, (int)block.z};
  gridDim = {(int)grid.x, (int)grid.y, (int)grid.z};
  body = call;
  work = data;
  long long count = (long long)grid.x * grid.y * grid.z;
  cluster_blocks = cluster;
  try {
    if (threads < 1 || threads > 1024) fail(text(threads) + " threads in a block");
    if (bytes > kMost) fail(text(bytes) + " bytes of shared memory");
    if (grid.x % cluster) fail(text(grid.x) + " blocks in clusters of " + text(cluster));
    if (cluster > 1 && threads % 128) fail("clusters of blocks of " + text(threads) + " threads");
    for (long long n = 0; n < count; n += cluster) {
      begin(n, threads, bytes);
      run_cluster();
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
