// The loops of patch_token_contrast on the CPU, some for class_patch_contrast too: no torch header.
//
// A matrix [rows, columns] is kept in panels of kPanel columns: [columns / kPanel, rows, kPanel], the last one filled
// up with zeros. The unit vectors of tokens are such a matrix, d columns wide.
#pragma once
#include <cstdint>

namespace wsss {

constexpr int64_t kPanel = 32;
constexpr int64_t kStrip = 64;  // columns of the similarity matrix at once; a multiple of kPanel
constexpr int64_t kGroup = 8;   // numbers of rows are multiples of this, filled up with zero vectors
constexpr double kContrastEps = 1e-8;

// `count` tokens that take part, and zero vectors behind them up to `rows`.
struct Units {
  const float* data;
  const int32_t* labels;
  int64_t rows, count;
};

// Columns [begin, begin + width) of the similarity of tokens to each other, without the diagonal; width is a multiple of
// kPanel. Rows before `begin` stand for their mirror image too.
struct Strip {
  Units units;
  int64_t d, begin, width;
  float positive, negative;  // weight of a pair in the gradient
  const float* transposed;   // [width / kPanel, d, kPanel], d filled up to whole panels: see transpose_units
  float* weights;            // [width / kPanel, units.rows, kPanel], filled by similarity; null: sums alone
};

struct PairSums {
  double positive = 0, negative = 0;
};

// Euclidean norm of x [d].
double norm_of(const float* x, int64_t d);
// Divides x [d] by the larger of its norm and kContrastEps; returns the norm.
double normalise(float* x, int64_t d);
// x [d] becomes row `row` of the `rows` rows in `panels`.
void put_row(const float* x, int64_t d, int64_t row, int64_t rows, float* panels);
// Columns [panel * kPanel, + kPanel) of the units [begin, begin + width) become rows of `transposed`, see Strip.
void transpose_units(const Units& units, int64_t begin, int64_t width, int64_t d, int64_t panel, float* transposed);
// |cos| of rows [first, last) and the strip, summed; their weights times sign(cos) if wanted. Multiples of kGroup.
PairSums similarity(const Strip& strip, int64_t first, int64_t last);
// Adds weights * units to columns [panel * kPanel, + kPanel) of gradient, row i at gradient[i]. Rows [0, last).
void add_gradient(const Strip& strip, int64_t last, int64_t panel, float* const* gradient);
// e, the gradient with respect to the unit vector in `row` of `units`, becomes the one with respect to the token.
void through_norm(float* e, const Units& units, int64_t row, int64_t d, double norm);

}  // namespace wsss
