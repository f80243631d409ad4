// Loops of class_patch_contrast on the CPU: few class tokens against many patches, which are read where they lie. No
// torch header.
#pragma once
#include <cstdint>

namespace wsss {

constexpr int64_t kPatches = 32;      // at once in class_similarity
constexpr int64_t kBlock = 4 * kPatches;  // that stay in the L2 cache between similarity and gradient

// The class tokens of one image and the patches they are compared with. R rows, rounded up to `lanes`; D columns.
struct ClassPairs {
  const float* classes;         // [D, lanes] unit vectors side by side, zero behind the last
  const int32_t* labels;        // [lanes], -1 behind the last
  const float* const* patches;  // [N] rows of D values, multiplied with `scales` unit vectors
  const float* scales;          // [N]
  const int32_t* patch_labels;  // [N]
  int64_t lanes, n, d;          // lanes is a multiple of 16
  float positive, negative;     // weight of a pair in the gradient
  float* weights;               // [N, lanes], filled by class_similarity; null: sums alone
};

// |cos| of the patches [first, last) and all rows, summed over pairs of equal and of other labels; the weights of the
// patches in the gradient with respect to the unit vectors of the rows.
void class_similarity(const ClassPairs& pairs, int64_t first, int64_t last, double& positive, double& negative);

// Adds the weights times the patches [first, last), columns [begin, end), to row r at gradient + r * D.
void class_gradient(const ClassPairs& pairs, int64_t rows, int64_t first, int64_t last, int64_t begin, int64_t end,
                    float* gradient);

}  // namespace wsss
