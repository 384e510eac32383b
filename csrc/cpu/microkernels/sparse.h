// The passes of a block-sparse product with float32 sums, for the instruction set of the including file.
//
// Every element of a result is summed by one thread in one order, so results do not depend on the number of threads.
#pragma once

#include "problem/sparse.h"
#include "sparse_panel.h"
#include "sparse_rows.h"
#include "sparse_values.h"

namespace blockdiag::cpu {
namespace {

template <typename T>
class SparseProduct {
 public:
  SparseProduct(const SparseProblem& problem, const SparseOperands& operands)
      : operands_(operands), matrix_(problem.matrix), batch_(problem.batch) {}

  void output() const {
    const int width = row_width(matrix_);
    if (width > 0 && batch_ <= few_rows_of(matrix_, width)) {
      width == 1 ? few_rows<1>() : width == 4 ? few_rows<4>() : width == 8 ? few_rows<8>() : few_rows<16>();
      return;
    }
    const auto values = float_values();
    // Some rows of blocks at a time, so that their sums stay in the first cache.
    const int64_t group = std::max<int64_t>(kSparseSums / matrix_.out_block, 1);
    const Added<T> added{bias(), diagonal(), input(), operands_.input_ld, matrix_.in_features()};
    over_panels(
        input(), operands_.input_ld, matrix_.in_features(), matrix_.block_rows, group * matrix_.out_block,
        [&](int64_t row, int64_t rows, const float* panel, float* sums, int64_t begin, int64_t end) {
          for (int64_t first = begin; first < end; first += group) {
            const int64_t last = std::min(first + group, end);
            for (int64_t r = first; r < last; ++r) {
              float* const to = sums + (r - first) * matrix_.out_block * kSparseRows;
              with_in_block(matrix_.in_block, [&]<int kInBlock>(std::integral_constant<int, kInBlock>) {
                for_each_part(matrix_.out_block, [&]<int kFeatures>(int64_t n, std::integral_constant<int, kFeatures>) {
                  gather<kFeatures, kInBlock>(blocks(values.data, r, n), panel, to + n * kSparseRows);
                });
              });
            }
            transpose_out(
                sums, first * matrix_.out_block, (last - first) * matrix_.out_block, row, rows, added, result(),
                matrix_.out_features()
            );
          }
        }
    );
  }

  void input_grad() const {
    const auto values = float_values();
    const Added<T> added{};
    const int64_t in_block = matrix_.in_block;
    over_panels(
        grad_output(), operands_.grad_output_ld, matrix_.out_features(), matrix_.block_cols, matrix_.in_features(),
        [&](int64_t row, int64_t rows, const float* panel, float* sums, int64_t begin, int64_t end) {
          const int64_t first = begin * in_block, features = (end - begin) * in_block;
          std::fill_n(sums + first * kSparseRows, features * kSparseRows, 0.0F);
          for (int64_t r = 0; r < matrix_.block_rows; ++r) {
            const float* const grads = panel + r * matrix_.out_block * kSparseRows;
            with_in_block(in_block, [&]<int kInBlock>(std::integral_constant<int, kInBlock>) {
              for_each_part(matrix_.out_block, [&]<int kFeatures>(int64_t n, std::integral_constant<int, kFeatures>) {
                const auto some = between(blocks(values.data, r, n), begin, end);
                scatter<kFeatures, kInBlock>(some, grads + n * kSparseRows, sums);
              });
            });
          }
          transpose_out(sums + first * kSparseRows, first, features, row, rows, added, result(), matrix_.in_features());
        }
    );
  }

  void values_grad() const {
    // Parts of the batch whose activations fit the cache.
    const int64_t part = std::min<int64_t>(round_up(batch_), kSparsePart);
    const int64_t features[] = {matrix_.out_features(), matrix_.in_features()};
    const auto transposed = floats((features[0] + features[1]) * part);
    float* const panels[] = {transposed.data, transposed.data + features[0] * part};
    // Sums of parts are float32, which a half type cannot hold.
    const bool apart = !std::is_same_v<T, float>;
    const auto scratch = floats(apart ? matrix_.num_blocks * matrix_.block_size() : 0);
    float* const sums = apart ? scratch.data : reinterpret_cast<float*>(result());
    for (int64_t first = 0; first < batch_; first += part) {
      const int64_t rows = std::min(part, batch_ - first), length = round_up(rows);
      const auto transpose_some = [&](const T* data, int64_t ld, int64_t count, float* panel) {
        over_lines(rows, count, [&](int64_t begin, int64_t end) {
          transpose_in(data + first * ld + begin, ld, rows, end - begin, panel + begin * part, part);
        });
      };
      transpose_some(grad_output(), operands_.grad_output_ld, features[0], panels[0]);
      transpose_some(input(), operands_.input_ld, features[1], panels[1]);
      at::parallel_for(0, matrix_.block_rows, block_row_grain(length), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const auto row = blocks(nullptr, r, 0);
          const ValuesRow of_row{
              .grads = panels[0] + r * matrix_.out_block * part,
              .inputs = panels[1],
              .cols = row.cols,
              .count = row.count,
              .out_block = matrix_.out_block,
              .in_block = matrix_.in_block,
              .length = length,
              .ld = part,
          };
          float* const to = sums + operands_.row_offsets[r] * matrix_.block_size();
          values_of_row(of_row, first > 0, to);
          if (apart && first + rows == batch_) {
            T* const rounded = result() + operands_.row_offsets[r] * matrix_.block_size();
            convert(to, row.count * matrix_.block_size(), rounded);
          }
        }
      });
    }
  }

 private:
  struct Floats {
    c10::DataPtr owner;
    const float* data;
  };
  struct Scratch {
    c10::DataPtr owner;
    float* data;
  };

  const T* input() const { return static_cast<const T*>(operands_.input); }
  const T* grad_output() const { return static_cast<const T*>(operands_.grad_output); }
  const T* bias() const { return static_cast<const T*>(operands_.bias); }
  const T* diagonal() const { return static_cast<const T*>(operands_.diagonal); }
  T* result() const { return static_cast<T*>(operands_.result); }

  static int64_t round_up(int64_t rows) { return (rows + Vector::kLanes - 1) / Vector::kLanes * Vector::kLanes; }

  static Scratch floats(int64_t count) {
    auto owner = c10::GetCPUAllocator()->allocate(count * sizeof(float));
    auto* const data = static_cast<float*>(owner.get());
    return {std::move(owner), data};
  }

  template <typename From, typename To>
  static void convert(const From* from, int64_t count, To* to) {
    for (int64_t i = 0; i < count; i += Vector::kLanes) {
      const auto some = static_cast<int>(std::min<int64_t>(count - i, Vector::kLanes));
      store_partial(load_partial(from + i, some), to + i, some);
    }
  }

  /// The values as floats, converted if they are not.
  Floats float_values() const {
    const auto* const values = static_cast<const T*>(operands_.values);
    if constexpr (std::is_same_v<T, float>) {
      return {{}, values};
    } else {
      const int64_t count = matrix_.num_blocks * matrix_.block_size();
      auto scratch = floats(count);
      at::parallel_for(0, count, kSparseLine, [&](int64_t begin, int64_t end) {
        convert(values + begin, end - begin, scratch.data + begin);
      });
      return {std::move(scratch.owner), scratch.data};
    }
  }

  /// The blocks of a row, from output feature `n` of each on.
  BlockRow blocks(const float* values, int64_t r, int64_t n) const {
    const int64_t first = operands_.row_offsets[r];
    return {
        .values = values + first * matrix_.block_size() + n * matrix_.in_block,
        .cols = operands_.cols + first,
        .count = operands_.row_offsets[r + 1] - first,
        .in_block = matrix_.in_block,
        .block_size = matrix_.block_size(),
    };
  }

  /// Those whose column is in the range.
  BlockRow between(const BlockRow& row, int64_t begin, int64_t end) const {
    if (begin == 0 && end == matrix_.block_cols) {
      return row;
    }
    const auto* const first = std::lower_bound(row.cols, row.cols + row.count, begin);
    const auto* const last = std::lower_bound(first, row.cols + row.count, end);
    auto some = row;
    some.values += (first - row.cols) * row.block_size;
    some.cols = first;
    some.count = last - first;
    return some;
  }

  /// Rows of blocks that are worth waking a thread for.
  int64_t block_row_grain(int64_t batch) const {
    const int64_t products = batch * matrix_.num_blocks * matrix_.block_size() / matrix_.block_rows;
    return std::max<int64_t>(kThreadProducts / std::max<int64_t>(products, 1), 1);
  }

  /// Calls function(begin, end) for ranges of the features of so many rows.
  template <typename Function>
  static void over_lines(int64_t rows, int64_t features, const Function& function) {
    const int64_t grain = std::max<int64_t>(kSparseLine / (rows * kLineFeatures), 1);
    at::parallel_for(0, (features + kLineFeatures - 1) / kLineFeatures, grain, [&](int64_t begin, int64_t end) {
      function(begin * kLineFeatures, std::min(end * kLineFeatures, features));
    });
  }
  static constexpr int64_t kLineFeatures = 32;

  template <int kWidth>
  void few_rows() const {
    if constexpr (kWidth <= Vector::kLanes) {
      const T* rows_of_input = input();
      int64_t ld = operands_.input_ld;
      Scratch converted;
      const float* x = nullptr;
      if constexpr (std::is_same_v<T, float>) {
        x = rows_of_input;
      } else {
        converted = floats(batch_ * matrix_.in_features());
        for (int64_t i = 0; i < batch_; ++i) {
          convert(rows_of_input + i * ld, matrix_.in_features(), converted.data + i * matrix_.in_features());
        }
        x = converted.data;
        ld = matrix_.in_features();
      }
      const Added<T> added{bias(), diagonal(), input(), operands_.input_ld, matrix_.in_features()};
      at::parallel_for(0, matrix_.block_rows, block_row_grain(4 * batch_), [&](int64_t begin, int64_t end) {
        const auto sums = floats(matrix_.out_block + Vector::kLanes);
        for (int64_t r = begin; r < end; ++r) {
          const int64_t first = operands_.row_offsets[r], count = operands_.row_offsets[r + 1] - first;
          const T* const values = static_cast<const T*>(operands_.values) + first * matrix_.block_size();
          for (int64_t i = 0; i < batch_; ++i) {
            block_row_sums<kWidth>(values, operands_.cols + first, count, matrix_, x + i * ld, sums.data);
            for (int64_t n = 0; n < matrix_.out_block; n += Vector::kLanes) {
              const auto some = static_cast<int>(std::min<int64_t>(matrix_.out_block - n, Vector::kLanes));
              const int64_t f = r * matrix_.out_block + n;
              const auto sum = added(load_partial(sums.data + n, some), i, f, some);
              store_partial(sum, result() + i * matrix_.out_features() + f, some);
            }
          }
        }
      });
    }
  }

  /// Calls compute(first row, rows, their transposed panel, sums, begin, end) for panels of rows, and ranges of `parts`
  /// of the result where there are too few panels for the threads. `features`: of the activations; `sums`: of the result,
  /// so many at a time.
  template <typename Compute>
  void over_panels(
      const T* data, int64_t ld, int64_t features, int64_t parts, int64_t sums, const Compute& compute
  ) const {
    const int64_t panels = (batch_ + kSparseRows - 1) / kSparseRows;
    const auto rows_of = [&](int64_t panel) { return std::min<int64_t>(kSparseRows, batch_ - panel * kSparseRows); };
    const int64_t products = matrix_.num_blocks * matrix_.block_size() * kSparseRows;
    if (panels >= 2 * at::get_num_threads() || products * panels < 2 * kThreadProducts) {
      const int64_t grain = std::max<int64_t>(kThreadProducts / std::max<int64_t>(products, 1), 1);
      at::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
        const auto scratch = floats((features + sums) * kSparseRows);
        for (int64_t panel = begin; panel < end; ++panel) {
          const int64_t row = panel * kSparseRows, rows = rows_of(panel);
          transpose_in(data + row * ld, ld, rows, features, scratch.data, kSparseRows);
          compute(row, rows, scratch.data, scratch.data + features * kSparseRows, 0, parts);
        }
      });
      return;
    }
    const auto transposed = floats(panels * features * kSparseRows);
    over_lines(batch_, features, [&](int64_t begin, int64_t end) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        float* const to = transposed.data + (panel * features + begin) * kSparseRows;
        transpose_in(data + panel * kSparseRows * ld + begin, ld, rows_of(panel), end - begin, to, kSparseRows);
      }
    });
    const int64_t tasks = at::get_num_threads(); // ranges of each panel
    at::parallel_for(0, panels * tasks, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = floats(sums * kSparseRows);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task / tasks, range = task % tasks;
        const float* const of_panel = transposed.data + panel * features * kSparseRows;
        compute(
            panel * kSparseRows, rows_of(panel), of_panel, scratch.data, parts * range / tasks,
            parts * (range + 1) / tasks
        );
      }
    });
  }

  const SparseOperands& operands_;
  const BlockSparseMatrix& matrix_;
  int64_t batch_;
};

template <typename T>
void run_sparse(const SparseProblem& problem, const SparseOperands& operands) {
  const SparseProduct<T> product(problem, operands);
  switch (problem.pass) {
    case SparsePass::kOutput:
      return product.output();
    case SparsePass::kInputGrad:
      return product.input_grad();
    case SparsePass::kValuesGrad:
      return product.values_grad();
  }
}

/// Computes a problem with float32 sums. False for other dtypes.
inline bool run_sparse(const SparseProblem& problem, const SparseOperands& operands) {
  switch (problem.dtype) {
    case DType::kFloat32:
      run_sparse<float>(problem, operands);
      return true;
    case DType::kBFloat16:
      run_sparse<c10::BFloat16>(problem, operands);
      return true;
    case DType::kFloat16:
      run_sparse<c10::Half>(problem, operands);
      return true;
    default:
      return false;
  }
}

} // namespace
} // namespace blockdiag::cpu
