// Fibers: the threads of the blocks of a cluster, who runs, who waits for what.
#pragma once
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>

#include <algorithm>
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
  bool done = false, polls = false, pauses = false;
};

inline constexpr size_t kStack = 256 << 10;
// Turns of warps that do nothing but look whether something has changed.
inline constexpr int kPatience = 20000;
inline std::vector<Fiber> fibers;
int current;
int seconds = 10;
inline int block_threads, cluster_blocks, cluster_threads;
int here;
// Make a block of the cluster the one at hand.
void enter(int block);
// Note that a thread of the block at hand is done.
void end_thread();
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

// Dice decide who runs and what is late. They always fall alike, so runs do too.
inline uint32_t dice;
inline uint32_t roll() { return (dice = dice * 1664525 + 1013904223) >> 16; }
inline bool one_in(unsigned n) { return roll() % n == 0; }
// Whether a copy happens at once: for a while nearly all do, then nearly none.
inline bool lazy;
inline bool at_once() { return one_in(8) == lazy; }

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

inline bool can_run(const Fiber& f) { return !f.done && !(f.on && f.on->generation == f.seen); }

// Perhaps let others run, where it is easy to forget that they may. Only for the last lane of a
// warp: lanes go on together where they can, as they do on a GPU though nothing says so.
inline void pause() {
  if (!one_in(4)) return;
  int first = current / 32 * 32;
  for (int n = first; n < std::min(first + 32, cluster_threads); ++n)
    if (n != current && !fibers[n].done) return;
  fibers[current].pauses = true;
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

// What happens at some time, at the latest when no thread can go on without it.
struct Event {
  int block;
  std::function<void()> happen;
  std::string unless;  // what is wrong if it has not happened when all threads are done
};
inline std::deque<Event> events;

// Let something happen to the block at hand.
inline void later(std::function<void()> happen, const std::string& unless) {
  events.push_back({here, std::move(happen), unless});
}

inline bool happen() {
  if (events.empty()) return false;
  // Mostly the oldest: drawn at random, nearly all would be over before the last of a few is.
  auto one = events.begin() + (one_in(8) ? roll() % events.size() : 0);
  Event next = std::move(*one);
  events.erase(one);
  enter(next.block);
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

enum Progress { kNone, kPolled, kMoved };

// Let a warp go on for as long as it can.
inline Progress run_warp(int warp, int& left) {
  Progress made = kNone;
  int first = warp * 32, last = std::min(first + 32, cluster_threads);
  for (int n = first; n < last; ++n) fibers[n].polls = fibers[n].pauses = false;
  for (bool again = true; again;) {
    again = false;
    for (int n = first; n < last; ++n) {
      Fiber& f = fibers[n];
      if (!can_run(f) || f.polls || f.pauses) continue;
      f.on = nullptr;
      current = n;
      enter(n / block_threads);
      int own = n % block_threads;
      threadIdx = {own % blockDim.x, own / blockDim.x % blockDim.y, own / blockDim.x / blockDim.y};
      ++switches;
      running = true;
      emu_switch(&scheduler, f.sp);
      running = false;
      if (!failure.empty()) throw GivenUp();
      left -= f.done;
      if (f.done) end_thread();
      again = true;
      made = std::max(made, f.polls ? kPolled : kMoved);
    }
  }
  return made;
}

// Run the threads of a cluster to their end. The first warp that can go on does, so that some get
// far ahead of others; which comes first changes now and then.
inline void run_cluster() {
  prepare(cluster_threads);
  std::vector<int> order((cluster_threads + 31) / 32);
  for (size_t n = 0; n < order.size(); ++n) order[n] = n;
  int left = cluster_threads, idle = 0;
  while (left) {
    if (one_in(8)) std::swap(order[roll() % order.size()], order[roll() % order.size()]);
    if (one_in(16)) lazy = !lazy;
    if (one_in(32)) happen();
    Progress made = kNone;
    for (size_t n = 0; n < order.size() && made == kNone; ++n) {
      made = run_warp(order[n], left);
      if (made == kPolled) std::rotate(order.begin() + n, order.begin() + n + 1, order.end());
    }
    idle = made == kPolled ? idle + 1 : 0;
    // Whoever looks at memory may be waiting for a copy.
    if (made == kMoved || (made == kPolled && idle % 64)) continue;
    if (left && !happen() && (made == kNone || idle > kPatience)) fail(stuck());
  }
}

}  // namespace emu
