// Vectors of the region loops, 32 bytes each, for float and for double. Included by CPU loops alone.
#pragma once
#include <cstdint>

#include "clones.h"

namespace wsss {

// `Loose` may lie anywhere in memory, `Index` holds as many int32.
template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int count = 8;
  typedef float Vec __attribute__((vector_size(32)));
  typedef float Loose __attribute__((vector_size(32), aligned(4)));
  typedef int32_t Index __attribute__((vector_size(32)));
  typedef int32_t LooseIndex __attribute__((vector_size(32), aligned(4)));
};
template <>
struct Lanes<double> {
  static constexpr int count = 4;
  typedef double Vec __attribute__((vector_size(32)));
  typedef double Loose __attribute__((vector_size(32), aligned(8)));
  typedef int32_t Index __attribute__((vector_size(16)));
};

}  // namespace wsss
