// Memory that is filled once, in pieces.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace wsss {

// A large allocation is mapped anew each time, and each of its pages costs a fault when it is first written. Asked for
// just before a piece is written, its pages come in one call, and from the cache.
class FreshPages {
 public:
  explicit FreshPages(size_t bytes) : mapped_(bytes >= kMapped) {}
  void before_writing(void* data, size_t bytes) const {
#ifdef __linux__
    constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE; an older Linux knows no such advice, which does no harm
    if (!mapped_) return;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data) & ~(kPage - 1);
    madvise(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(data) + bytes - begin, kPopulateWrite);
#else
    (void)data;
    (void)bytes;
#endif
  }

 private:
  static constexpr uintptr_t kPage = 4096;
  static constexpr size_t kMapped = size_t{32} << 20;  // the most that glibc may serve out of its heap
  bool mapped_;
};

}  // namespace wsss
