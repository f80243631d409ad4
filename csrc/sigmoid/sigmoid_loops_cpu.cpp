// The loops of the sigmoid on the CPU: no torch header.
#include "sigmoid/sigmoid.h"

#include <cmath>

#include "lanes.h"
#include "simd.h"

namespace wsss {

WSSS_CLONES
void sigmoid_in_place(float* x, int64_t n) {
  using Loose = Lanes<float>::Loose;
  static_assert(kSigmoidBlock == Lanes<float>::count);
  for (int64_t i = 0; i < n; i += kSigmoidBlock) {
    Vec v = *reinterpret_cast<const Loose*>(x + i);
    sigmoid_lanes(v);
    *reinterpret_cast<Loose*>(x + i) = v;
  }
}

void sigmoid_in_place(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 1.0 / (1.0 + std::exp(-x[i]));
}

}  // namespace wsss
