// The kernels of the dense CRF as messages to a mean field. Included by dense_crf_cpu.cpp alone.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "gaussian/gaussian.h"
#include "lattice/lattice.h"

namespace wsss {

// weight * n_i K_ij n_j applied to the values of all pixels, rows of `width` floats.
class Message {
 public:
  virtual ~Message() = default;
  // Makes room for rows of this width. `pieces`: for values that come in pieces.
  virtual void resize(int64_t width, bool pieces) = 0;
  // Takes the values of all pixels, over all threads.
  virtual void take(const float* rows) = 0;
  // rows of the pixels [begin, end) = base + message; `base` and `rows` are those of `begin` and may be equal.
  virtual void add(int64_t begin, int64_t end, const float* base, float* rows) const = 0;

  // Whether values may also come in pieces, on one thread and in the order of the pixels, while `add` still gives the
  // message of the values before.
  virtual bool piecewise() const { return false; }
  virtual void begin_pieces() {}
  virtual void take_piece(int64_t /*begin*/, int64_t /*end*/, const float* /*rows*/) {}
  virtual void end_pieces() {}
};
using Messages = std::vector<std::unique_ptr<Message>>;

template <class Kernel, class... Args>
std::shared_ptr<const Kernel> normalised(Args&&... args) {
  auto kernel = std::make_shared<Kernel>(std::forward<Args>(args)...);
  kernel->normalise();
  return kernel;
}

class LatticeMessage final : public Message {
 public:
  LatticeMessage(std::shared_ptr<const Lattice> lattice, float weight)
      : lattice_(std::move(lattice)), factor_(weight * lattice_->slice_factor()) {}

  void resize(int64_t width, bool pieces) override {
    width_ = width;
    table_ = Buffer<float>(lattice_->table_size(width));
    next_ = Buffer<float>(pieces ? lattice_->table_size(width) : 0);
  }
  void take(const float* rows) override {
    lattice_->splat(rows, width_, table_.get());
    lattice_->blur(table_.get(), width_);
  }
  void add(int64_t begin, int64_t end, const float* base, float* rows) const override {
    lattice_->slice(table_.get(), width_, factor_, begin, end, base, rows);
  }
  bool piecewise() const override { return true; }
  void begin_pieces() override { std::fill(next_.get(), next_.get() + lattice_->table_size(width_), 0.0f); }
  void take_piece(int64_t begin, int64_t end, const float* rows) override {
    lattice_->splat_some(rows, width_, begin, end, next_.get());
  }
  void end_pieces() override {
    std::swap(table_, next_);
    lattice_->blur(table_.get(), width_);
  }

 private:
  std::shared_ptr<const Lattice> lattice_;
  float factor_;
  int64_t width_ = 0;
  Buffer<float> table_, next_;
};

class GridMessage final : public Message {
 public:
  GridMessage(std::shared_ptr<const GridGaussian> grid, float weight) : grid_(std::move(grid)), weight_(weight) {}

  void resize(int64_t width, bool) override {
    width_ = width;
    table_ = Buffer<float>(grid_->table_size(width));
  }
  void take(const float* rows) override { grid_->along(rows, width_, table_.get()); }
  void add(int64_t begin, int64_t end, const float* base, float* rows) const override {
    grid_->across(table_.get(), width_, weight_, begin, end, base, rows);
  }

 private:
  std::shared_ptr<const GridGaussian> grid_;
  float weight_;
  int64_t width_ = 0;
  Buffer<float> table_;
};

class PixelMessage final : public Message {
 public:
  PixelMessage(std::shared_ptr<const PixelGaussian> sums, int64_t pixels, float weight)
      : sums_(std::move(sums)), pixels_(pixels), weight_(weight) {}

  void resize(int64_t width, bool) override {
    width_ = width;
    message_ = Buffer<float>(pixels_ * width);
  }
  void take(const float* rows) override { sums_->filter(rows, width_, weight_, message_.get()); }
  void add(int64_t begin, int64_t end, const float* base, float* rows) const override {
    const float* from = message_.get() + begin * width_;
    for (int64_t i = 0; i < (end - begin) * width_; ++i) rows[i] = base[i] + from[i];
  }

 private:
  std::shared_ptr<const PixelGaussian> sums_;
  int64_t pixels_;
  float weight_;
  int64_t width_ = 0;
  Buffer<float> message_;
};

}  // namespace wsss
