// Sigmoid within a disc, and the disc itself for the other ops of regions. Defined by kernels/radius_mask/reference.py.
//
// Letters: B batch, h w patch grid, N = h * w. Patches are numbered row by row.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "host_device.h"
#include "scalar.h"

namespace wsss {

#ifdef __CUDACC__
#define WSSS_BOTH __host__ __device__
#else
#define WSSS_BOTH
#endif

// Two patches are within the disc if their squared distance (Chebyshev: the larger of |dy| and |dx|) is <= limit.
struct Disc {
  int64_t limit;
  bool chebyshev;

  WSSS_BOTH bool contains(int64_t dy, int64_t dx) const {
    if (!chebyshev) return dy * dy + dx * dx <= limit;
    const int64_t ay = dy < 0 ? -dy : dy, ax = dx < 0 ? -dx : dx;
    return (ay < ax ? ax : ay) <= limit;
  }
};

// For each row distance that the disc reaches, below h, the largest column distance inside it, at most w-1.
inline std::vector<int64_t> half_widths(const Disc& disc, int64_t h, int64_t w) {
  std::vector<int64_t> half;
  for (int64_t dy = 0; dy < h && disc.contains(dy, 0); ++dy) {
    const int64_t rest = disc.chebyshev ? disc.limit : disc.limit - dy * dy;
    int64_t reach = w - 1;
    if (disc.chebyshev) {
      if (rest < reach) reach = rest;
    } else if (rest < reach * reach) {
      reach = static_cast<int64_t>(std::sqrt(static_cast<double>(rest)));
      while (reach * reach > rest) --reach;
      while ((reach + 1) * (reach + 1) <= rest) ++reach;
    }
    half.push_back(reach);
  }
  return half;
}

// Calls f(begin, end) for each row of patches inside the disc of `patch`, in ascending order.
template <class F>
inline void for_each_span(int64_t patch, int64_t h, int64_t w, const std::vector<int64_t>& half, F f) {
  const int64_t rows = static_cast<int64_t>(half.size()), y0 = patch / w, x0 = patch % w;
  const int64_t last = y0 + rows < h ? y0 + rows : h;
  for (int64_t y = y0 - rows + 1 > 0 ? y0 - rows + 1 : 0; y < last; ++y) {
    const int64_t reach = half[y < y0 ? y0 - y : y - y0];
    f(y * w + (x0 > reach ? x0 - reach : 0), y * w + (x0 + reach < w ? x0 + reach + 1 : w));
  }
}

// CPU. to = sigmoid(from), or grad * y * (1 - y), over the runs [begin, end), ascending. Up to kSigmoidBlock - 1
// elements (sigmoid/sigmoid.h) behind a run are read too; as many behind the last one are written, with 0.
struct Span {
  int64_t begin, end;
};
void sigmoid_spans(const float* from, const std::vector<Span>& spans, float* to);
void zero_spans(const std::vector<Span>& spans, float* to);
void sigmoid_gradient_spans(const float* grad, const float* y, const std::vector<Span>& spans, float* to);

// CUDA, on `stream`. logits, out, grad and result [rows, N] of the given type; rows = B * N.
void radius_mask_cuda(const void* logits, void* out, Scalar type, int64_t rows, int64_t h, int64_t w, const Disc& disc,
                      DeviceStream stream);
void radius_mask_backward_cuda(const void* grad, const void* out, void* result, Scalar type, int64_t rows, int64_t h,
                               int64_t w, const Disc& disc, DeviceStream stream);

}  // namespace wsss
