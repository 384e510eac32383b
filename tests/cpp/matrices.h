// Random matrices that the kernels of emulated_cuda.h may access.
#pragma once

#include "emulated_cuda.h"
#include "problem/gemm.h"

#include <cstring>

namespace {

using blockdiag::Blocks;

class Random {
 public:
  int64_t below(int64_t bound) { return std::uniform_int_distribution<int64_t>(0, bound - 1)(generator_); }
  int64_t one_of(std::initializer_list<int64_t> choices) {
    return choices.begin()[below(static_cast<int64_t>(choices.size()))];
  }
  float number() { return std::uniform_real_distribution<float>(-1, 1)(generator_); }

 private:
  std::mt19937_64 generator_{0};
};

int64_t offset(const Blocks& blocks, int64_t g, int64_t i, int64_t j) {
  return g * blocks.block_stride + i * blocks.row_stride + j * blocks.col_stride;
}

/// Matrices of T or float32 as stored, starting `misalignment` elements behind a boundary, with NaN between the
/// elements.
template <typename T>
class Matrices {
 public:
  Matrices(const Blocks& blocks, int64_t count, bool is_float32, int64_t misalignment, bool writable)
      : blocks(blocks),
        is_float32_(is_float32),
        bytes_((offset(blocks, count - 1, blocks.rows - 1, blocks.cols - 1) + 1) * element_size()),
        memory_(bytes_ + misalignment * element_size() + 64, -1) { // NaN
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    first_ = (32 - address % 32) % 32 + misalignment * element_size();
    emulated::machine().regions.push_back({data(), static_cast<size_t>(bytes_), writable, {}});
  }
  Matrices(const Matrices&) = delete;
  ~Matrices() {
    std::erase_if(emulated::machine().regions, [&](const auto& region) { return region.begin == data(); });
  }

  char* data() { return memory_.data() + first_; }
  double value(int64_t g, int64_t i, int64_t j) { return is_float32_ ? get<float>(g, i, j) : get<T>(g, i, j); }
  /// The factor that it is in a product: in the half type.
  double factor(int64_t g, int64_t i, int64_t j) { return T(static_cast<float>(value(g, i, j))); }
  void set(int64_t g, int64_t i, int64_t j, float value) { is_float32_ ? put(g, i, j, value) : put(g, i, j, T(value)); }
  /// All of the memory, with what is not to be written.
  std::vector<char> bytes() { return memory_; }

  const Blocks blocks;

 private:
  int64_t element_size() const { return is_float32_ ? sizeof(float) : sizeof(T); }
  char* at(int64_t g, int64_t i, int64_t j) { return data() + offset(blocks, g, i, j) * element_size(); }
  template <typename E>
  float get(int64_t g, int64_t i, int64_t j) {
    E element;
    std::memcpy(&element, at(g, i, j), sizeof(E));
    return element;
  }
  template <typename E>
  void put(int64_t g, int64_t i, int64_t j, E element) {
    std::memcpy(at(g, i, j), &element, sizeof(E));
  }

  const bool is_float32_;
  int64_t bytes_, first_;
  std::vector<char> memory_;
};

template <typename T>
void fill(Matrices<T>& matrices, int64_t count, Random& random) {
  for (int64_t g = 0; g < count; ++g) {
    for (int64_t i = 0; i < matrices.blocks.rows; ++i) {
      for (int64_t j = 0; j < matrices.blocks.cols; ++j) {
        matrices.set(g, i, j, random.number());
      }
    }
  }
}

} // namespace
