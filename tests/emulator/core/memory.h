// Asynchronous copies of a thread.
#pragma once

namespace emu {

struct Copy {
  unsigned char* to;
  const void* from;
  unsigned whole, size;

  void happen() const {
    std::memset(to, 0, whole);
    std::memcpy(to, from, size);
  }
};
struct Copies {
  std::deque<Copy> left;
  unsigned long issued = 0;
  std::deque<unsigned long> groups;  // how many had been issued at their ends

  void finish(unsigned long until) {
    for (; issued - left.size() < until; left.pop_front()) left.front().happen();
  }
};
inline std::vector<Copies> copies;  // of each thread

void copy(uint32_t to, const void* from, unsigned whole, unsigned size) {
  if (size > whole) fail("cp.async: more bytes than it copies");
  if (size && (uintptr_t)from % whole) fail("cp.async: the global address is not aligned");
  Copies& mine = copies[current];
  mine.left.push_back({at(to, whole, "cp.async", whole), from, whole, size});
  ++mine.issued;
  // Copies keep no order: this one may overtake those before. It happens again when it must.
  if (at_once()) mine.left.back().happen();
}
void copy_commit() { copies[current].groups.push_back(copies[current].issued); }
void copy_wait(unsigned groups) {
  Copies& mine = copies[current];
  for (; mine.groups.size() > groups; mine.groups.pop_front()) mine.finish(mine.groups.front());
}
void copy_wait_all() {
  copies[current].groups.clear();
  copies[current].finish(copies[current].issued);
}

void mbarrier_arrive_copies(uint32_t address) {
  mbarrier(address, "cp.async.mbarrier.arrive");
  Copies& mine = copies[current];
  auto arrive = [&mine, until = mine.issued, address] {
    mine.finish(until);
    mbarrier_count(address, 1);
  };
  if (at_once())
    arrive();
  else
    later(arrive, "");
  pause();
}

}  // namespace emu
