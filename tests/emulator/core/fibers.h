// Fibers: the threads of a block, who runs, who waits for what.
#pragma once
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>

#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

emu_dim threadIdx, blockIdx, blockDim, gridDim;

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
int current;
int seconds = 10;
inline int block_threads;
inline void* scheduler;
inline void (*body)(const void*);
inline const void* work;
// Why the kernel was given up, or nothing.
inline std::string failure;
struct GivenUp {};
inline bool running;  // a thread, not the scheduler
inline unsigned long switches;

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

[[noreturn]] void fail(const std::string& what) {
  blame(running ? what + ", thread " + text(current) : what);
  if (!running) throw GivenUp();
  void* unused;
  emu_switch(&unused, scheduler);
  abort();
}
void fail(const char* what) { fail(std::string(what)); }
const char* failure_text() { return failure.c_str(); }

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

void poll() {
  fibers[current].polls = true;
  leave();
}

inline void entry() {
  body(work);
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

// Whether something happens at once or as late as it can. Runs are alike.
inline uint32_t dice;
inline uint32_t roll() { return (dice = dice * 1664525 + 1013904223) >> 16; }
inline bool at_once() { return roll() & 1; }

// What happens when no thread can go on without it, the oldest first.
struct Event {
  std::function<void()> happen;
  std::string unless;  // what is wrong if it has not happened when all threads are done
};
inline std::deque<Event> events;

inline bool happen() {
  if (events.empty()) return false;
  Event next = std::move(events.front());
  events.pop_front();
  next.happen();
  return true;
}

// Gives up a thread that computes for long without waiting for anything.
struct Watch {
  struct sigaction before;
  static inline unsigned long seen;
  static inline pthread_t owner;
  static void look(int) {
    // Any thread of the process may get the signal.
    if (!pthread_equal(pthread_self(), owner)) return (void)pthread_kill(owner, SIGVTALRM);
    if (running && switches == seen) fail("a thread runs for ever");
    seen = switches;
  }
  static void every(int period) {
    itimerval time = {{period, 0}, {period, 0}};
    setitimer(ITIMER_VIRTUAL, &time, nullptr);
  }
  Watch() {
    owner = pthread_self();
    struct sigaction now = {};
    now.sa_handler = look;
    now.sa_flags = SA_NODEFER | SA_RESTART;
    sigaction(SIGVTALRM, &now, &before);
    every(seconds);
  }
  ~Watch() {
    every(0);
    sigaction(SIGVTALRM, &before, nullptr);
  }
};

inline void prepare(int threads) {
  static char* stacks = nullptr;
  static size_t size = 0;
  if (size < threads * kStack) {
    if (stacks) munmap(stacks, size);
    size = threads * kStack;
    stacks = (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) abort();
  }
  fibers.assign(threads, {});
  for (int n = 0; n < threads; ++n) {
    void** top = (void**)(stacks + (n + 1) * kStack);
    *--top = nullptr;
    *--top = (void*)entry;
    top -= 6;
    fibers[n].sp = top;
  }
}

// Run the threads of one block to their end.
inline void run_block(int threads) {
  prepare(threads);
  int left = threads, idle = 0;
  while (left) {
    bool moved = false, polled = false;
    // Warps take turns at being first.
    int first = roll() % ((threads + 31) / 32) * 32;
    for (int i = 0; i < threads; ++i) {
      int n = (first + i) % threads;
      Fiber& f = fibers[n];
      if (f.done || (f.on && f.on->generation == f.seen)) continue;
      f.on = nullptr;
      f.polls = false;
      current = n;
      threadIdx = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
      ++switches;
      running = true;
      emu_switch(&scheduler, f.sp);
      running = false;
      if (!failure.empty()) throw GivenUp();
      left -= f.done;
      (f.polls ? polled : moved) = true;
    }
    if (moved) idle = 0;
    if (moved || !left || happen()) continue;
    if (polled && ++idle < kPatience) continue;
    fail(stuck());
  }
}

}  // namespace emu
