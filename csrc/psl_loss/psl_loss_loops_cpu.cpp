// The inner loops of psl_loss on the CPU: no torch header, one clone per instruction set.
#include "psl_loss/psl_loss.h"
#include "simd.h"

namespace wsss {
namespace {

constexpr int kVecs = kPslBlock / kLanes;

}  // namespace

WSSS_CLONES
bool psl_forward_tile(const PslTile& tile, const float* log_weights, uint8_t* mask, float* top, float* log_sum) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  IntVec broken = {};
  for (int64_t i = 0; i < tile.pixels; i += kPslBlock) {
    const float* z = tile.logits + i;
    Vec highest[kVecs], best[kVecs], sum[kVecs] = {};
    IntVec winner[kVecs] = {};
    for (int v = 0; v < kVecs; ++v) {
      highest[v] = load<Vec>(z + v * kLanes);
      best[v] = highest[v] + log_weights[0];
    }
    for (int64_t k = 1; k < tile.classes; ++k) {
      for (int v = 0; v < kVecs; ++v) {
        const Vec logit = load<Vec>(z + k * tile.stride + v * kLanes), score = logit + log_weights[k];
        const IntVec wins = score > best[v];
        highest[v] = larger(highest[v], logit);
        best[v] = wins ? score : best[v];
        winner[v] = wins ? IntVec{} + static_cast<int32_t>(k) : winner[v];
      }
    }
    for (int64_t k = 0; k < tile.classes; ++k) {
      for (int v = 0; v < kVecs; ++v) {
        const Vec logit = load<Vec>(z + k * tile.stride + v * kLanes);
        sum[v] += exp_not_positive(logit - highest[v]) + logit * 0.0f;  // NaN of what is not finite
      }
    }
    for (int v = 0; v < kVecs; ++v) {
      store(top + i + v * kLanes, highest[v]);
      store(log_sum + i + v * kLanes, log_of_normal(sum[v]));
      broken |= sum[v] != sum[v];
      const Bytes bytes = __builtin_convertvector(winner[v], Bytes);
      __builtin_memcpy(mask + i + v * kLanes, &bytes, sizeof(bytes));
    }
  }
  int32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= broken[lane];
  return any != 0;
}

WSSS_CLONES
void psl_backward_tile(const PslTile& tile, const float* share, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < tile.pixels; i += kPslBlock) {
    const float* z = tile.logits + i;
    Vec highest[kVecs], factor[kVecs] = {};
    for (int v = 0; v < kVecs; ++v) highest[v] = load<Vec>(z + v * kLanes);
    for (int64_t k = 1; k < tile.classes; ++k) {
      for (int v = 0; v < kVecs; ++v) {
        highest[v] = larger(highest[v], load<Vec>(z + k * tile.stride + v * kLanes));
      }
    }
    for (int64_t k = 0; k < tile.classes; ++k) {
      for (int v = 0; v < kVecs; ++v) {
        const Vec e = exp_not_positive(load<Vec>(z + k * tile.stride + v * kLanes) - highest[v]);
        store(out + k * out_stride + i + v * kLanes, e);
        factor[v] += e;
      }
    }
    for (int v = 0; v < kVecs; ++v) factor[v] = load<Vec>(share + i + v * kLanes) / factor[v];
    for (int64_t k = 0; k < tile.classes; ++k) {
      for (int v = 0; v < kVecs; ++v) {
        float* to = out + k * out_stride + i + v * kLanes;
        store(to, load<Vec>(to) * factor[v]);
      }
    }
  }
}

}  // namespace wsss
