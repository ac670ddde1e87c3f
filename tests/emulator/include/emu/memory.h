// Loads, stores, atomic operations and asynchronous copies of a thread.
#pragma once

namespace emu {

template <typename T, typename... V>
void ld_global(const void* from, V&... to) {
  if ((uintptr_t)from % (sizeof(T) * sizeof...(V))) fail("ld: the address is not aligned");
  const T* p = (const T*)from;
  ((std::memcpy(&to, p++, sizeof(T))), ...);
}
template <typename T, typename... V>
void st_global(void* to, V... from) {
  if ((uintptr_t)to % (sizeof(T) * sizeof...(V))) fail("st: the address is not aligned");
  T* p = (T*)to;
  ((std::memcpy(p++, &from, sizeof(T))), ...);
}
template <typename T, typename... V>
void ld_shared(uint32_t from, V&... to) {
  constexpr size_t size = sizeof(T) * sizeof...(V);
  ld_global<T>(at(from, size, "ld.shared", size), to...);
}
template <typename T, typename... V>
void st_shared(uint32_t to, V... from) {
  constexpr size_t size = sizeof(T) * sizeof...(V);
  st_global<T>(at(to, size, "st.shared", size), from...);
}

// cp.async: `size` bytes, and zeros up to `whole`.
struct Copy {
  unsigned char* to;
  const void* from;
  unsigned whole, size;
};
struct Copies {
  std::deque<Copy> left;
  unsigned long issued = 0;
  std::deque<unsigned long> groups;  // how many had been issued at their ends

  void finish(unsigned long until) {
    for (; issued - left.size() < until; left.pop_front()) {
      const Copy& c = left.front();
      std::memset(c.to, 0, c.whole);
      std::memcpy(c.to, c.from, c.size);
    }
  }
};
inline std::vector<Copies> copies;  // of each thread

inline void copy(uint32_t to, const void* from, unsigned whole, unsigned size) {
  if (size > whole) fail("cp.async: more bytes than it copies");
  if (size && (uintptr_t)from % whole) fail("cp.async: the global address is not aligned");
  Copies& mine = copies[current];
  mine.left.push_back({at(to, whole, "cp.async", whole), from, whole, size});
  ++mine.issued;
  if (at_once()) mine.finish(mine.issued);
}
inline void copy(uint32_t to, const void* from, unsigned whole) { copy(to, from, whole, whole); }
inline void copy_commit() { copies[current].groups.push_back(copies[current].issued); }
inline void copy_wait(unsigned groups) {
  Copies& mine = copies[current];
  for (; mine.groups.size() > groups; mine.groups.pop_front()) mine.finish(mine.groups.front());
}
inline void copy_wait_all() {
  copies[current].groups.clear();
  copies[current].finish(copies[current].issued);
}

// Arrive once the copies that this thread has issued are done.
inline void mbarrier_arrive_copies(uint32_t address) {
  mbarrier(address, "cp.async.mbarrier.arrive");
  Copies& mine = copies[current];
  auto arrive = [&mine, until = mine.issued, address] {
    mine.finish(until);
    mbarrier_arrive(address);
  };
  if (at_once()) return arrive();
  events.push_back({arrive, ""});
}

}  // namespace emu

template <typename T, typename U> T atomicAdd(T* p, U x) {
  if (!x) emu::poll();
  T old = *p;
  *p = (T)(old + x);
  return old;
}
template <typename T, typename U> T atomicOr(T* p, U x) {
  if (!x) emu::poll();
  T old = *p;
  *p = (T)(old | x);
  return old;
}
template <typename T, typename U> T atomicAnd(T* p, U x) { T old = *p; *p = (T)(old & x); return old; }
template <typename T, typename U> T atomicMax(T* p, U x) { T old = *p; if ((T)x > old) *p = x; return old; }
template <typename T, typename U> T atomicMin(T* p, U x) { T old = *p; if ((T)x < old) *p = x; return old; }
template <typename T, typename U> T atomicExch(T* p, U x) {
  emu::poll();
  T old = *p;
  *p = x;
  return old;
}
template <typename T, typename U, typename V> T atomicCAS(T* p, U expected, V x) {
  emu::poll();
  T old = *p;
  if (old == (T)expected) *p = x;
  return old;
}
