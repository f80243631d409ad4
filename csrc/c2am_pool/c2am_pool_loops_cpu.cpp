// The inner loops of c2am_pool on the CPU: no torch header, one clone per instruction set.
#include "c2am_pool/c2am_pool.h"
#include "lanes.h"

namespace wsss {
namespace {

template <class T, int kRows>
WSSS_INLINE void pool(const T* rows, const T* q, const T* rest, int64_t n, T* foreground, T* background) {
  using Vec = typename Lanes<T>::Vec;
  using Loose = typename Lanes<T>::Loose;
  constexpr int64_t lanes = Lanes<T>::count;
  Vec inside[kRows] = {}, outside[kRows] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const Vec a = *reinterpret_cast<const Loose*>(q + i), b = *reinterpret_cast<const Loose*>(rest + i);
    for (int r = 0; r < kRows; ++r) {
      const Vec value = *reinterpret_cast<const Loose*>(rows + r * n + i);
      inside[r] += value * a;
      outside[r] += value * b;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    T sum = 0, other = 0;
    for (int64_t j = i; j < n; ++j) {
      sum += rows[r * n + j] * q[j];
      other += rows[r * n + j] * rest[j];
    }
    for (int64_t j = 0; j < lanes; ++j) {
      sum += inside[r][j];
      other += outside[r][j];
    }
    foreground[r] = sum;
    background[r] = other;
  }
}

template <class T>
WSSS_INLINE void pool_all(const T* rows, int64_t count, const T* q, const T* rest, int64_t n, T* foreground,
                          T* background) {
  int64_t r = 0;
  for (; r + kPoolRows <= count; r += kPoolRows) {
    pool<T, kPoolRows>(rows + r * n, q, rest, n, foreground + r, background + r);
  }
  for (; r < count; ++r) pool<T, 1>(rows + r * n, q, rest, n, foreground + r, background + r);
}

template <class T>
WSSS_INLINE void backward(const T* rows, int64_t count, const T* base, const T* slope, const T* q, int64_t n,
                          T* __restrict__ flow, T* __restrict__ grad) {
  static_assert(kPoolRows == 4);
  if (count == kPoolRows) {
    const T *r0 = rows, *r1 = rows + n, *r2 = rows + 2 * n, *r3 = rows + 3 * n;
    const T s0 = slope[0], s1 = slope[1], s2 = slope[2], s3 = slope[3];
    for (int64_t i = 0; i < n; ++i) flow[i] += (s0 * r0[i] + s1 * r1[i]) + (s2 * r2[i] + s3 * r3[i]);
  } else {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < n; ++i) flow[i] += slope[r] * rows[r * n + i];
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const T b = base[r], s = slope[r];
    for (int64_t i = 0; i < n; ++i) grad[r * n + i] = b + s * q[i];
  }
}

}  // namespace

WSSS_CLONES
void c2am_pool_rows(const float* rows, int64_t count, const float* q, const float* rest, int64_t n, float* foreground,
                    float* background) {
  pool_all(rows, count, q, rest, n, foreground, background);
}
WSSS_CLONES
void c2am_pool_rows(const double* rows, int64_t count, const double* q, const double* rest, int64_t n,
                    double* foreground, double* background) {
  pool_all(rows, count, q, rest, n, foreground, background);
}

WSSS_CLONES
void c2am_pool_backward_rows(const float* rows, int64_t count, const float* base, const float* slope, const float* q,
                             int64_t n, float* flow, float* grad) {
  backward(rows, count, base, slope, q, n, flow, grad);
}
WSSS_CLONES
void c2am_pool_backward_rows(const double* rows, int64_t count, const double* base, const double* slope,
                             const double* q, int64_t n, double* flow, double* grad) {
  backward(rows, count, base, slope, q, n, flow, grad);
}

}  // namespace wsss
