// Progressive expansion over packed regions. Defined by kernels/select_regions/reference.py.
//
// Letters: B images, N patches, C classes, P (image, class) pairs, T candidates kept per pair.
#pragma once
#include "radius_mask/radius_mask.h"

namespace wsss {

struct Selection {
  Disc disc;
  float threshold;  // logit above which a patch is covered
  float low, high;  // bounds of the share of the seed's region, both included
  int64_t max_seeds, top;
};

// A ratio with an empty seed region is 0. The counts are exact in float32.
constexpr float kLeastArea = 1e-6f;

// CPU. Winner of each patch: the class with the largest scores[i, c] / peak[c], ties to the lowest; -1 if no score of
// the patch is > 0, or one of the quotients is NaN. peak [C] is the maximum over the patches, NaN left out, or 1 where
// that is not > 0.
void select_peaks(const float* scores, int64_t n, int64_t c, float* peak);
void select_winners(const float* scores, const float* peak, int64_t n, int64_t c, int32_t* winner);
// A packed region: kSelectBlock values to kSelectBlock bits, in an order of its own that is the same for every region.
constexpr int64_t kSelectBlock = 256;
void select_pack(const float* values, int64_t blocks, float threshold, uint64_t* words);
// shared[t] = number of common bits of region t and `seed`; regions [count, words].
void select_overlaps(const uint64_t* regions, const uint64_t* seed, int64_t count, int64_t words, int64_t* shared);

// CUDA, on `stream`. All arrays lie on the device; bytes and layouts as named. `pairs` are the P pairs of one call.
struct SelectArrays {
  const void* logits;    // [B, N, N]
  Scalar type;           // of the logits
  const float* scores;   // [B, N, C]
  const int64_t* pairs;  // [P, 2]
  float* peak;           // [B, C]
  int32_t* winner;       // [B, N]
  int32_t* order;        // [P, T] patches of the candidates
  int32_t* count;        // [P] number of candidates kept
  uint32_t* regions;     // [P, T, words of 32 bits]
  uint8_t* open;         // [P, T]
  bool* members;         // [P, N], zero
  int64_t* seeds;        // [P, max_seeds], -1
};
void select_winners_cuda(const SelectArrays& a, int64_t images, int64_t n, int64_t c, DeviceStream stream);
void select_regions_cuda(const SelectArrays& a, const Selection& s, int64_t num_pairs, int64_t h, int64_t w, int64_t c,
                         DeviceStream stream);

}  // namespace wsss
