// What the threads of a block share, and blocks of a cluster: memory, barriers, mbarriers in it.
#pragma once

namespace emu {

// The window of shared memory begins behind what the system reserves.
inline constexpr uint32_t kWindow = 1024;
unsigned char* shared;
inline size_t shared_size;

unsigned char* at(uint32_t address, size_t bytes, const char* what, uint32_t aligned) {
  if (address < kWindow || address + bytes > kWindow + shared_size)
    fail(std::string(what) + ": shared memory ends before address " + text(address) + " + " +
         text(bytes));
  if (address % aligned)
    fail(std::string(what) + ": address " + text(address) + " is no multiple of " + text(aligned));
  return shared + (address - kWindow);
}

uint32_t address_of(const void* p) {
  return (uint32_t)((const unsigned char*)p - shared) + kWindow;
}

struct Barrier : Waitable {
  int id = 0, arrived = 0, expected = 0;
  int outcome[3] = {};  // of the last time: any, all, sum
  int any = 0, all = 1, sum = 0;
  int by_warp[32] = {};
  std::string name() const override {
    return "barrier " + text(id) + " (" + text(arrived) + " of " + text(expected) + " arrived)";
  }
};

struct MBarrier : Waitable {
  uint32_t address = 0;
  int count = 0, pending = 0;
  long long bytes = 0;
  std::string name() const override {
    return "mbarrier at " + text(address) + " to leave phase " + text(generation) + " (" +
           text(pending) + " of " + text(count) + " arrivals and " + text(bytes) +
           " bytes are missing)";
  }
};
struct Block {
  std::vector<unsigned char> memory;
  unsigned char* shared;
  emu_dim place;
  int left;  // threads that are not done
  Barrier barriers[16];
  std::map<uint32_t, MBarrier> mbarriers;
};
inline std::vector<Block> blocks;  // of the cluster

inline Block& own() { return blocks[here]; }

void enter(int block) {
  here = block;
  shared = own().shared;
  blockIdx = own().place;
}

void end_thread() { --own().left; }

// Do something in the place of another block of the cluster.
template <typename F>
void elsewhere(int block, const char* what, F act) {
  if (block < 0 || block >= cluster_blocks)
    fail(std::string(what) + ": there is no block " + text(block) + " in the cluster");
  if (!blocks[block].left) fail(std::string(what) + ": block " + text(block) + " of the cluster has ended");
  int mine = here;
  enter(block);
  act();
  enter(mine);
}

struct Gathering : Waitable {
  int arrived = 0;
  std::string name() const override {
    return "the cluster (" + text(arrived) + " of " + text(cluster_threads) + " arrived)";
  }
};
inline Gathering gathering;
inline std::vector<int> gathered;  // by thread, the generation at which it arrived, or -1

void cluster_arrive() {
  if (gathered[current] >= 0) fail("barrier.cluster.arrive: this thread has not waited before");
  gathered[current] = gathering.generation;
  if (++gathering.arrived < cluster_threads) return;
  gathering.arrived = 0;
  ++gathering.generation;
}

void cluster_wait() {
  if (gathered[current] < 0) fail("barrier.cluster.wait: this thread has not arrived");
  if (gathering.generation == gathered[current]) wait(gathering);
  gathered[current] = -1;
}

inline bool barrier_enter(uint32_t id, uint32_t count, const char* what) {
  if (id > 15) fail(std::string(what) + ": there is no barrier " + text(id));
  if (count % 32 || !count || (int)count > (block_threads + 31) / 32 * 32)
    fail(std::string(what) + ": " + text(count) + " threads at barrier " + text(id));
  Barrier& b = own().barriers[id];
  if (b.arrived && b.expected != (int)count)
    fail(std::string(what) + ": barrier " + text(id) + " expects " + text(b.expected) +
         " threads, not " + text(count));
  b.expected = count;
  ++b.by_warp[current % block_threads / 32];
  int rest = block_threads % 32;  // the threads that the last warp lacks
  ++b.arrived;
  if (rest && current == block_threads - 1) b.arrived += 32 - rest, b.by_warp[current % block_threads / 32] += 32 - rest;
  if (b.arrived < b.expected) return false;
  for (int& n : b.by_warp) {
    if (n % 32) fail(std::string(what) + ": part of a warp is at barrier " + text(id));
    n = 0;
  }
  b.arrived = 0;
  b.outcome[0] = b.any, b.outcome[1] = b.all, b.outcome[2] = b.sum;
  b.any = b.sum = 0, b.all = 1;
  ++b.generation;
  return true;
}

void barrier_sync(uint32_t id, uint32_t count) {
  if (!barrier_enter(id, count, "bar.sync")) wait(own().barriers[id]);
}

void barrier_sync(uint32_t id) { barrier_sync(id, (block_threads + 31) / 32 * 32); }

void barrier_arrive(uint32_t id, uint32_t count) {
  barrier_enter(id, count, "bar.arrive");
  pause();
}

int syncthreads(int value, int which) {
  Barrier& b = own().barriers[0];
  b.any |= value != 0, b.all &= value != 0, b.sum += value != 0;
  barrier_sync(0);
  return b.outcome[which];
}

inline constexpr uint64_t kMark = 0x4D42617272696572;

inline MBarrier& mbarrier(uint32_t address, const char* what) {
  uint64_t mark;
  std::memcpy(&mark, at(address, 8, what, 8), 8);
  auto found = own().mbarriers.find(address);
  if (found == own().mbarriers.end())
    fail(std::string(what) + ": no mbarrier was initialised at " + text(address));
  if (mark != kMark) fail(std::string(what) + ": the mbarrier at " + text(address) + " was overwritten");
  return found->second;
}

void mbarrier_init(uint32_t address, uint32_t count) {
  if (!count || count >= 1 << 20) fail("mbarrier.init: " + text(count) + " arrivals");
  std::memcpy(at(address, 8, "mbarrier.init", 8), &kMark, 8);
  MBarrier& b = own().mbarriers[address];
  if (b.bytes) fail("mbarrier.init: bytes are missing at " + text(address));
  b.address = address;
  b.generation = 0;
  b.count = b.pending = count;
}

void mbarrier_inval(uint32_t address) {
  mbarrier(address, "mbarrier.inval");
  own().mbarriers.erase(address);
}

inline void mbarrier_advance(MBarrier& b) {
  if (b.pending || b.bytes) return;
  b.pending = b.count;
  ++b.generation;
}

void mbarrier_expect(uint32_t address, uint32_t bytes) {
  MBarrier& b = mbarrier(address, "mbarrier.expect_tx");
  b.bytes += bytes;
  if (b.bytes >= 1 << 20) fail("mbarrier.expect_tx: too many bytes at " + text(address));
}

inline void mbarrier_complete(uint32_t address, uint32_t bytes) {
  MBarrier& b = mbarrier(address, "complete_tx");
  b.bytes -= bytes;
  mbarrier_advance(b);
}

inline void mbarrier_count(uint32_t address, uint32_t count) {
  MBarrier& b = mbarrier(address, "mbarrier.arrive");
  if ((int)count > b.pending || !count)
    fail("mbarrier.arrive: " + text(count) + " more arrivals at " + b.name());
  b.pending -= count;
  mbarrier_advance(b);
}

void mbarrier_arrive(uint32_t address, uint32_t count) {
  pause();
  mbarrier_count(address, count);
  pause();
}

// Addresses of the cluster have the number of the block, from 1 on, in their highest byte.
void cluster_address(uint32_t& to, uint32_t address, uint32_t rank) {
  to = address | (rank + 1) << 24;
}

void mbarrier_arrive_cluster(uint32_t address, uint32_t count) {
  pause();
  elsewhere((int)(address >> 24) - 1, "mbarrier.arrive",
            [=] { mbarrier_count(address & 0xFFFFFF, count); });
  pause();
}

void mbarrier_arrive_expect(uint32_t address, uint32_t bytes) {
  mbarrier_expect(address, bytes);
  mbarrier_arrive(address);
}

inline bool mbarrier_passed(const MBarrier& b, uint32_t parity) {
  return (uint32_t)(b.generation & 1) != parity;
}

void mbarrier_wait(bool& done, uint32_t address, uint32_t parity) {
  if (parity > 1) fail("mbarrier.try_wait: parity " + text(parity));
  pause();
  MBarrier& b = mbarrier(address, "mbarrier.try_wait");
  while (!mbarrier_passed(b, parity)) wait(b);
  done = true;
}

void mbarrier_test(bool& done, uint32_t address, uint32_t parity) {
  poll();
  done = mbarrier_passed(mbarrier(address, "mbarrier.test_wait"), parity);
}

}  // namespace emu
