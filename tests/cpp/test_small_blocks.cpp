// The kernels for small blocks, on a CPU, against the definition in double precision: over random sizes, layouts and
// alignments, in all passes. `test_small_blocks traffic` prints their memory traffic on problems of
// benchmarks/suites.py.
#include "../../csrc/cuda/kernels/small_blocks.cu"
#include "matrices.h"

#include <cmath>
#include <string>

namespace {

using blockdiag::DType;
using blockdiag::Epilogue;
using blockdiag::Float32;
using blockdiag::Gemm;
using blockdiag::GemmProblem;
using blockdiag::Operand;
using emulated::fail;

enum class Pass { forward, input_grad, weight_grad };

struct Sizes {
  Pass pass;
  int64_t batch, num_blocks, in_block, out_block;
  bool bias;
  Float32 float32 = {};
};

/// Layouts of the operands: an activation's blocks side by side in each row, stacked, or shared; with or without gaps.
struct Layout {
  int64_t kind[2] = {}, gap[2] = {}, row_gap[2] = {}, misalignment[5] = {};
  bool transposed_weight = false;
};

Blocks activation(const Sizes& sizes, int64_t block, int64_t kind, int64_t gap, int64_t row_gap) {
  switch (kind) {
    case 0:
      return {sizes.batch, block, sizes.num_blocks * (block + gap) + row_gap, 1, block + gap};
    case 1:
      return {sizes.batch, block, block + row_gap, 1, sizes.batch * (block + row_gap) + gap};
    default:
      return {sizes.batch, block, block + row_gap, 1, 0};
  }
}

Blocks weight(const Sizes& sizes, int64_t gap, int64_t row_gap, bool transposed) {
  const int64_t rows = transposed ? sizes.in_block : sizes.out_block,
                cols = transposed ? sizes.out_block : sizes.in_block;
  const Blocks blocks{rows, cols, cols + row_gap, 1, rows * (cols + row_gap) + gap};
  return transposed ? blocks.transposed() : blocks;
}

/// The rounding error bound for a sum of products whose absolute values sum up to `scale`.
template <typename T>
double tolerance(double expected, double scale, int64_t terms, bool is_float32) {
  const bool half = std::is_same_v<T, c10::Half>;
  const double rounding = is_float32 ? 0 : std::abs(expected) * (half ? 0x1p-11 : 0x1p-8) * 1.01 + (half ? 0x1p-24 : 0);
  return rounding + scale * static_cast<double>(terms + 2) * 0x1p-24;
}

template <typename T>
void compare(double actual, double expected, double scale, int64_t terms, bool is_float32, const char* what) {
  if (std::isnan(expected) ? !std::isnan(actual)
                           : !(std::abs(actual - expected) <= tolerance<T>(expected, scale, terms, is_float32))) {
    std::fprintf(stderr, "%g is not %g\n", actual, expected);
    fail(what);
  }
}

/// Runs one pass, and compares it bit for bit with a second run, and with the definition.
template <typename T>
void test(const Sizes& sizes, const Layout& layout, Random& random, bool with_nan = false) {
  const auto [pass, batch, num_blocks, in_block, out_block, has_bias, float32] = sizes;
  const bool forward = pass == Pass::forward, sum = pass == Pass::weight_grad;
  // out = left right, as csrc/ops/linear.cpp has it.
  const auto x = activation(sizes, in_block, layout.kind[0], layout.gap[0], layout.row_gap[0]);
  const auto dy = activation(sizes, out_block, layout.kind[1], layout.gap[1], layout.row_gap[1]);
  const auto w = weight(sizes, layout.gap[1], layout.row_gap[1], layout.transposed_weight);
  const Blocks left_blocks = forward ? x : sum ? dy.transposed() : dy;
  const Blocks right_blocks = forward ? w.transposed() : sum ? x : w;
  const Blocks out_blocks =
      sum ? weight(sizes, 0, 0, false) : activation(sizes, forward ? out_block : in_block, 0, 0, 0);

  const auto& skew = layout.misalignment;
  Matrices<T> left(left_blocks, num_blocks, float32.b, skew[0], false);
  Matrices<T> right(right_blocks, num_blocks, float32.a, skew[1], false);
  Matrices<T> out(out_blocks, num_blocks, float32.c, skew[2], true);
  const Blocks vector{num_blocks, out_block, out_block, 1, 0};
  Matrices<T> bias(vector, 1, float32.bias, skew[3], false), bias_grad(vector, 1, float32.c, skew[4], true);
  fill(left, num_blocks, random);
  fill(right, num_blocks, random);
  fill(bias, 1, random);
  if (with_nan) {
    for (auto* operand : {&left, &right}) {
      const auto& [rows, cols, row_stride, col_stride, block_stride] = operand->blocks;
      const float nan = std::numeric_limits<float>::quiet_NaN();
      operand->set(random.below(num_blocks), random.below(rows), random.below(cols), nan);
    }
  }
  const Gemm gemm = blockdiag::describe_product(left_blocks, right_blocks, out_blocks, num_blocks);
  const GemmProblem problem{
      .gemm = gemm,
      .dtype = std::is_same_v<T, c10::Half> ? DType::kFloat16 : DType::kBFloat16,
      .epilogue = {.bias = forward && has_bias, .bias_grad = sum && has_bias},
      .float32 = float32,
  };
  const auto run = [&] {
    return blockdiag::cuda::small_blocks_take(problem) &&
           blockdiag::cuda::run_small_blocks(
               problem, {
                            .a = right.data(),
                            .b = left.data(),
                            .c = out.data(),
                            .bias = problem.epilogue.bias ? bias.data() : nullptr,
                            .bias_grad = problem.epilogue.bias_grad ? bias_grad.data() : nullptr,
                        }
           );
  };
  if (!run()) {
    if (sum && out_block == 1) {
      return; // its rows may be described as columns
    }
    fail("the passes of small blocks are taken");
  }
  const auto bytes = out.bytes(), bias_bytes = bias_grad.bytes();
  run(); // in another order
  if (bytes != out.bytes() || bias_bytes != bias_grad.bytes()) {
    fail("equal calls give equal bits");
  }
  const int64_t terms = gemm.k;
  for (int64_t g = 0; g < num_blocks; ++g) {
    for (int64_t i = 0; i < out_blocks.rows; ++i) {
      for (int64_t j = 0; j < out_blocks.cols; ++j) {
        double expected = forward && has_bias ? bias.value(0, g, j) : 0, scale = std::abs(expected);
        for (int64_t l = 0; l < terms; ++l) {
          const double product = left.factor(g, i, l) * right.factor(g, l, j);
          expected += product;
          scale += std::abs(product);
        }
        compare<T>(out.value(g, i, j), expected, scale, terms, float32.c, "the result is the product");
      }
      if (sum && has_bias) {
        double expected = 0, scale = 0;
        for (int64_t l = 0; l < terms; ++l) {
          expected += left.value(g, i, l);
          scale += std::abs(left.value(g, i, l));
        }
        compare<T>(bias_grad.value(0, g, i), expected, scale, terms, float32.c, "the gradient of the bias is the sum");
      }
    }
  }
}

Layout random_layout(Random& random) {
  Layout layout;
  for (int i = 0; i < 2; ++i) {
    layout.kind[i] = random.below(3);
    layout.gap[i] = random.one_of({0, 0, 8, 1, 2, 4});
    layout.row_gap[i] = random.one_of({0, 0, 8, 1, 2, 4});
  }
  for (auto& elements : layout.misalignment) {
    elements = random.one_of({0, 0, 0, 8, 1, 2, 4});
  }
  layout.transposed_weight = random.below(2) == 0;
  return layout;
}

/// What may be float32 in a pass.
Float32 random_float32(Pass pass, Random& random) {
  Float32 float32{.a = random.below(2) == 0, .c = random.below(2) == 0};
  if (pass != Pass::weight_grad) {
    float32.b = float32.a && random.below(2) == 0;
    float32.bias = random.below(2) == 0;
  }
  return float32;
}

/// Every pass, dtype, and width, at random batches. Half of the time, matrices are float32.
void test_random(Random& random, int trials) {
  for (int trial = 0; trial < trials; ++trial) {
    const auto size = [&] {
      return random.one_of(
          {8 + 8 * random.below(8), 16 << random.below(3), 4 + 4 * random.below(16), 1 + random.below(64)}
      );
    };
    const int64_t batch = 2 + random.below(random.one_of({20, 100, 300}));
    const auto pass = static_cast<Pass>(random.below(3));
    const Sizes sizes{
        pass,
        batch,
        1 + random.below(6),
        size(),
        size(),
        random.below(2) == 0,
        random.below(2) == 0 ? Float32() : random_float32(pass, random)
    };
    // Half of the time, the usual layout.
    const Layout layout = random.below(2) == 0 ? Layout() : random_layout(random);
    emulated::machine().processors = static_cast<int>(random.one_of({1, 2, 5, 20}));
    const bool with_nan = random.below(4) == 0;
    random.below(2) == 0 ? test<c10::Half>(sizes, layout, random, with_nan)
                         : test<c10::BFloat16>(sizes, layout, random, with_nan);
  }
}

/// A thread block for each 32 x 32 tile of the weight: otherwise a few blocks would leave most of a GPU idle.
void test_tiles(Random& random) {
  emulated::machine().processors = 132;
  for (const auto& [in_block, out_block, tiles] : {std::array{64, 64, 4}, {64, 32, 2}, {33, 40, 4}, {16, 32, 1}}) {
    test<c10::Half>({Pass::weight_grad, 128, 16, in_block, out_block, true}, {}, random);
    if (emulated::machine().grid.x != static_cast<unsigned>(16 * tiles) || emulated::machine().grid.y != 1) {
      fail("every tile of the weight has a thread block");
    }
  }
}

/// Batches from the set number of rows on are split into parts, which a second kernel adds up.
void test_parts(Random& random) {
  emulated::machine().processors = 20;
  for (const auto& [in_block, out_block, num_blocks] : {std::array{16, 16, 3}, {64, 64, 2}, {40, 7, 1}, {16, 32, 4}}) {
    const int64_t batch = 4096 + random.below(100);
    const auto launches = emulated::machine().launches;
    test<c10::Half>({Pass::weight_grad, batch, num_blocks, in_block, out_block, true}, {}, random);
    if (emulated::machine().launches != launches + 4) {
      fail("a long batch is split");
    }
  }
  const auto launches = emulated::machine().launches, rows = blockdiag::cuda::small_blocks_split_rows().exchange(5000);
  test<c10::Half>({Pass::weight_grad, 4096, 2, 64, 64, true}, {}, random);
  if (emulated::machine().launches != launches + 2) {
    fail("a shorter batch is not split");
  }
  blockdiag::cuda::small_blocks_split_rows() = rows;
}

/// Each choice of float32 matrices, in rows that divide into vectors and in others, with one part and with several.
template <typename T>
void test_float32(Random& random) {
  emulated::machine().processors = 20;
  for (int bits = 0; bits < 48; ++bits) {
    const auto pass = static_cast<Pass>(bits / 16);
    const Float32 float32{.a = bits % 2 > 0, .b = bits / 2 % 2 > 0, .c = bits / 4 % 2 > 0, .bias = bits / 8 % 2 > 0};
    const bool taken = float32.b ? float32.a && pass != Pass::weight_grad : true;
    if (!taken || (float32.bias && pass != Pass::forward)) {
      continue;
    }
    for (const auto& [in_block, out_block] : {std::array{16, 16}, {32, 64}, {64, 24}, {20, 12}, {7, 33}, {61, 2}}) {
      for (const int64_t misalignment : {0, 1 + static_cast<int>(random.below(4))}) {
        const int64_t batch = random.one_of({25, pass == Pass::weight_grad ? 1060 : 130});
        Layout layout;
        layout.transposed_weight = random.below(2) == 0;
        layout.misalignment[random.below(5)] = misalignment;
        test<T>({pass, batch, 2, in_block, out_block, true, float32}, layout, random);
      }
    }
  }
}

void test_what_is_not_taken() {
  const Gemm forward{
      .m = 32, .n = 99, .k = 16, .batch = 2, .a = {true, 16, 512}, .b = {false, 32, 16}, .c = {false, 64, 32}
  };
  const Gemm sum{
      .m = 32, .n = 16, .k = 99, .batch = 2, .a = {false, 64, 32}, .b = {true, 32, 16}, .c = {false, 32, 512}
  };
  const auto taken = [&](
                         const Gemm& gemm, DType dtype = DType::kFloat16, Epilogue epilogue = {}, Float32 float32 = {}
                     ) { return blockdiag::cuda::small_blocks_take({gemm, dtype, epilogue, float32}); };
  const auto changed = [](Gemm gemm, const std::function<void(Gemm&)>& change) {
    change(gemm);
    return gemm;
  };
  const bool any =
      taken(forward, DType::kFloat32) || taken(sum, DType::kFloat64) ||
      taken(forward, DType::kFloat16, {.bias_grad = true}) || taken(sum, DType::kFloat16, {.bias = true}) ||
      taken(forward, DType::kFloat16, {}, {.b = true}) || taken(sum, DType::kFloat16, {}, {.b = true}) ||
      taken(sum, DType::kFloat16, {}, {.a = true, .b = true}) || taken(sum, DType::kFloat16, {.accumulate = true}) ||
      taken(changed(forward, [](Gemm& gemm) { gemm.m = 65; })) ||
      taken(changed(forward, [](Gemm& gemm) { gemm.k = 65; })) ||
      taken(changed(sum, [](Gemm& gemm) { gemm.n = 65; })) || taken(changed(sum, [](Gemm& gemm) { gemm.m = 65; })) ||
      taken(changed(forward, [](Gemm& gemm) { gemm.b.transpose = true; })) ||
      taken(changed(sum, [](Gemm& gemm) { gemm.a.transpose = true; })) ||
      taken(changed(sum, [](Gemm& gemm) { gemm.batch = int64_t{1} << 29; }));
  emulated::machine().major = 7;
  if (any || taken(forward) || taken(sum)) {
    fail("what the kernels cannot do is left alone");
  }
  emulated::machine().major = 9;
}

void print_traffic() {
  auto& machine = emulated::machine();
  machine.processors = 132;
  machine.count_traffic = true;
  Random random;
  const char* const names[] = {"forward", "input grad", "weight grad"};
  std::puts(
      "B, G, K->N         pass         launches | read: per instr., per block, least (sectors) | written: the same | "
      "bytes per warp's read | shared: passes, least"
  );
  for (const auto& [batch, num_blocks, in_block, out_block] :
       {std::array{128, 32, 32, 32},
        {2048, 32, 32, 32},
        {128, 16, 64, 64},
        {2048, 16, 16, 16},
        {128, 1024, 16, 16},
        {2048, 2, 64, 64},
        {128, 16, 64, 10},
        {128, 16, 48, 24}}) {
    for (const auto pass : {Pass::forward, Pass::input_grad, Pass::weight_grad}) {
      machine.launches = 0;
      machine.reads = {};
      machine.writes = {};
      machine.shared = {};
      test<c10::BFloat16>({pass, batch, num_blocks, in_block, out_block, true}, {}, random);
      const auto print = [](const emulated::Traffic& traffic) {
        std::printf(
            "%8ld %8ld %8ld |", static_cast<long>(traffic.sectors / 2), static_cast<long>(traffic.of_blocks / 2),
            static_cast<long>(traffic.touched.size())
        );
      };
      std::printf(
          "%5d %4d %2d->%2d %-12s %2ld |", batch, num_blocks, in_block, out_block, names[static_cast<int>(pass)],
          static_cast<long>(machine.launches / 2)
      );
      print(machine.reads);
      print(machine.writes);
      std::printf(
          " %5.1f |",
          32.0 * static_cast<double>(machine.reads.sectors) / static_cast<double>(machine.reads.instructions)
      );
      std::printf(
          " %ld %ld\n", static_cast<long>(machine.shared.passes / 2), static_cast<long>(machine.shared.least / 2)
      );
      std::fflush(stdout);
    }
  }
}

} // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "traffic") {
    print_traffic();
    return 0;
  }
  Random random;
  test_what_is_not_taken();
  test_tiles(random);
  test_parts(random);
  test_float32<c10::Half>(random);
  test_float32<c10::BFloat16>(random);
  test_random(random, argc > 1 ? std::atoi(argv[1]) : 1000);
  std::puts("all passed");
}
