// The sigmoid on the CPU.
#pragma once
#include <cstdint>

namespace wsss {

// x becomes 1 / (1 + exp(-x)); relative error below 4e-7. `n` is rounded up to kSigmoidBlock, x has room for that.
constexpr int64_t kSigmoidBlock = 8;
void sigmoid_in_place(float* x, int64_t n);
void sigmoid_in_place(double* x, int64_t n);

}  // namespace wsss
