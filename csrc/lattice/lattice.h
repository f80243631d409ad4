// Permutohedral lattice on the CPU: the index of one set of points, and the torch-free loops over it.
// kernels/lattice.py is the definition.
//
// Letters: n points, d dimensions, M lattice vertices in use. Values are rows of `width` floats with zeros in the
// surplus: 1, 4 or a multiple of 8. Every sum of a vertex is in the order of the points, whatever the threads.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <new>
#include <utility>
#include <vector>

namespace wsss {

constexpr char kLatticeTooSmall[] =
    "lattice: the features span too many cells; the standard deviations are too small for this image";
constexpr float kLatticeMaxFeature = 1e5f;  // beyond it float32 cannot tell the cells apart
constexpr int kMaxCorners = 6;
// With a ring of ghosts the cells are smaller by sqrt(1/4 + 2 * 3/4), and there are two blurs.
constexpr int kRingBlurs = 2;
constexpr double kRingScale = 1.3228756555322954;

// Width of the rows that hold so many values.
inline int64_t lattice_width(int64_t values) { return values <= 4 ? 4 : (values + 7) / 8 * 8; }

// Uninitialised memory at a cache line.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) {
    if (size == 0) return;
    data_ = static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { std::free(data_); }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
};

struct LatticeEntry {
  int32_t point;
  float weight;
};

class Lattice {
 public:
  // features: d planes of padded_points(n) floats, finite, divided by the standard deviations; d is 2 or 5.
  // `ring`: with the neighbours of the vertices in use as further vertices; features times kRingScale.
  // Throws c10::ValueError when they span too many cells.
  Lattice(const Buffer<float>& features, int64_t n, int d, bool ring = false);
  static int64_t padded_points(int64_t n) { return (n + 7) / 8 * 8; }

  // Turns the filter into n_i K_ij n_j with n = (K 1 + 1e-20)^-1/2.
  void normalise();

  int64_t table_size(int64_t width) const { return num_vertices * width; }
  // table [M, width] = sums of the rows [n, width] of all points, over all threads.
  void splat(const float* rows, int64_t width, float* table) const;
  void blur(float* table, int64_t width) const;
  // rows of the points [begin, end) = base + factor * table; `base` and `rows` are the rows of `begin` and may be equal.
  void slice(const float* table, int64_t width, float factor, int64_t begin, int64_t end, const float* base,
             float* rows) const;
  // table += the rows of the points [begin, end), on this thread.
  void splat_some(const float* rows, int64_t width, int64_t begin, int64_t end, float* table) const;
  // The factor of `slice` that makes the blur's sum right.
  float slice_factor() const { return 1.0f / (1.0f + 1.0f / static_cast<float>(1 << (num_corners - 1))); }

  int64_t num_points, num_vertices = 0;
  int num_corners, num_blurs;

 private:
  template <int D>
  void index(const int32_t* vertex, const uint32_t* rank, const int32_t* low, const int32_t* high, bool ring);
  void list_entries();
  void over_vertices(const std::function<void(int64_t, int64_t)>& run, int parts) const;

  Buffer<int32_t> corner_;  // [n, d+1]
  Buffer<float> weight_;    // [n, d+1] barycentric, times the norm of the point once normalised
  // Per axis the lines of neighbours with two or more vertices; the last vertex v of a line is written ~v.
  std::vector<std::vector<int32_t>> lines_;
  // The points of each vertex, only where several threads share the vertices.
  Buffer<int32_t> first_entry_;   // [M+1]
  Buffer<LatticeEntry> entries_;  // [n * (d+1)]
};

// Calls run(b) for each image: whole images to the threads as long as every thread gets one, then one image at a time.
void over_images(int64_t batch, const std::function<void(int64_t)>& run);

// Planes of features of pixels (x / sigma_xy, y / sigma_xy, rgb / sigma_rgb); image: 3 planes with rows of `stride`
// and `plane` floats, or null for the first two features alone.
Buffer<float> pixel_features(const float* image, int64_t h, int64_t w, int64_t stride, int64_t plane, float sigma_xy,
                             float sigma_rgb);

// The loops, in lattice_loops_cpu.cpp and lattice_simplex_cpu.cpp.
// Points [begin, end), multiples of 8. vertex [d, n], rank [n] 4 bits per coordinate, weight [n, d+1]; low, high [d]
// are updated. Returns false if a feature is out of range.
bool lattice_simplex(const float* features, int64_t n, int d, int64_t begin, int64_t end, int32_t* vertex,
                     uint32_t* rank, float* weight, int32_t* low, int32_t* high);
void lattice_splat_rows(const int32_t* corner, const float* weight, int corners, int64_t n, const float* rows,
                        int64_t width, float* table);
// table [n, width] = the sums of the entries first_entry[v] .. first_entry[v + 1] of each vertex.
void lattice_gather_entries(const int32_t* first_entry, const LatticeEntry* entries, int64_t n, const float* rows,
                            int64_t width, float* table);
void lattice_blur_lines(const int32_t* lines, int64_t n, int64_t width, float* table);
void lattice_slice_rows(const int32_t* corner, const float* weight, int corners, int64_t n, const float* table,
                        int64_t width, float factor, const float* base, float* rows);

}  // namespace wsss
