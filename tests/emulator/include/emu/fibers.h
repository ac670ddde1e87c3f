// Fibers: the threads of a block, who runs, who waits for what.
#pragma once
#include <sys/mman.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

struct emu_dim { int x, y, z; };
inline emu_dim threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

// What threads wait for: they go on once the generation changes.
struct Waitable {
  int generation = 0;
  virtual std::string name() const = 0;
  virtual ~Waitable() = default;
};

struct Fiber {
  void* sp = nullptr;
  const Waitable* on = nullptr;
  int seen = 0;
  bool done = false, polls = false;
};

inline constexpr size_t kStack = 256 << 10;
// Rounds in which threads do nothing but look whether something has changed.
inline constexpr int kPatience = 20000;
inline std::vector<Fiber> fibers;
inline int current, block_threads;
inline void* scheduler;
inline std::function<void()> body;
// Why the kernel was given up, or nothing.
inline std::string failure;

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

inline std::string text(long long x) { return std::to_string(x); }

inline void blame(const std::string& what) {
  if (failure.empty()) failure = "emulator: " + what + " (block " + text(blockIdx.x) + ")";
}

// Give the kernel up; the launch returns an error with this text.
[[noreturn]] inline void fail(const std::string& what) {
  blame(what + ", thread " + text(current));
  void* unused;
  emu_switch(&unused, scheduler);
  abort();
}

inline void leave() {
  int index = current;
  emu_dim place = threadIdx;
  emu_switch(&fibers[index].sp, scheduler);
  current = index;
  threadIdx = place;
}

inline void wait(const Waitable& on) {
  fibers[current].on = &on;
  fibers[current].seen = on.generation;
  leave();
}

// Let others run: whoever looks at memory again and again calls this.
inline void poll() {
  fibers[current].polls = true;
  leave();
}

inline void entry() {
  body();
  fibers[current].done = true;
  void* unused;
  emu_switch(&unused, scheduler);
  abort();
}

inline std::string stuck() {
  std::map<std::string, std::string> waits;
  int count = fibers.size();
  for (int n = 0; n < count; ++n) {
    auto what = [](const Fiber& f) {
      return f.done ? std::string() : f.on ? f.on->name() : std::string("memory to change");
    };
    std::string on = what(fibers[n]);
    int last = n;
    while (last + 1 < count && what(fibers[last + 1]) == on) ++last;
    std::string range = n == last ? text(n) : text(n) + "-" + text(last);
    std::string& list = waits[on];
    list += (list.empty() ? "" : ", ") + range;
    n = last;
  }
  std::string said;
  for (auto& [on, threads] : waits) {
    if (!said.empty()) said += "; ";
    said += "threads " + threads + (on.empty() ? " are done" : " wait for " + on);
  }
  return "deadlock: " + said;
}

// Run the threads of one block to their end. `deliver` finishes a copy under way, if there is one.
inline bool run_block(int threads, bool (*deliver)()) {
  static void* stacks = nullptr;
  static size_t size = 0;
  if (size < threads * kStack) {
    if (stacks) munmap(stacks, size);
    size = threads * kStack;
    stacks = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                  -1, 0);
    if (stacks == MAP_FAILED) abort();
  }
  fibers.assign(threads, {});
  for (int n = 0; n < threads; ++n) {
    void** top = (void**)((char*)stacks + (n + 1) * kStack);
    *--top = nullptr;
    *--top = (void*)entry;
    top -= 6;
    fibers[n].sp = top;
  }
  int left = threads, idle = 0;
  while (left) {
    bool moved = false, polled = false;
    for (int n = 0; n < threads; ++n) {
      Fiber& f = fibers[n];
      if (f.done || (f.on && f.on->generation == f.seen)) continue;
      f.on = nullptr;
      f.polls = false;
      current = n;
      threadIdx = {n % blockDim.x, n / blockDim.x % blockDim.y,
                      n / blockDim.x / blockDim.y};
      emu_switch(&scheduler, f.sp);
      if (!failure.empty()) return false;
      left -= f.done;
      (f.polls ? polled : moved) = true;
    }
    if (moved) idle = 0;
    if (moved || !left || deliver()) continue;
    if (!failure.empty()) return false;
    if (polled && ++idle < kPatience) continue;
    blame(stuck());
    return false;
  }
  return true;
}

}  // namespace emu
