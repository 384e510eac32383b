// Matrix products as BLAS documents them: D = alpha op(A) op(B) + beta C (+ bias), column by column.
#include "fake.h"

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstring>
#include <numeric>

namespace fake {
namespace {

// Types as stored. Half types compute in float.

struct Half {
  using Wide = float;
  _Float16 value;
  operator float() const { return static_cast<float>(value); }
  static Half of(float wide) { return {static_cast<_Float16>(wide)}; }
};

struct BFloat16 {
  using Wide = float;
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  static BFloat16 of(float wide) {
    uint32_t bits;
    std::memcpy(&bits, &wide, sizeof(bits));
    if (std::isnan(wide)) {
      return {0x7fc0};
    }
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)}; // to nearest, ties to even
  }
};

template <typename T>
struct Exact {
  using Wide = T;
  T value;
  operator T() const { return value; }
  static Exact of(T wide) { return {wide}; }
};

/// Rounds to the 10 mantissa bits of TensorFloat-32, to nearest.
float to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (bits + 0x1000) & ~0x1fffu;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

template <typename T>
T narrowed(T value, bool tf32) {
  if constexpr (std::is_same_v<T, float>) {
    return tf32 ? to_tf32(value) : value;
  } else if constexpr (std::is_same_v<T, std::complex<float>>) {
    return tf32 ? T(to_tf32(value.real()), to_tf32(value.imag())) : value;
  } else {
    return value;
  }
}

template <typename T>
T conjugate(T value) {
  if constexpr (std::is_floating_point_v<T>) {
    return value;
  } else {
    return std::conj(value);
  }
}

template <typename T>
T dot(const T* a, const T* b, int64_t count) {
  T sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

template <>
float dot(const float* a, const float* b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

/// Writes the elements (row, *) of op(matrix), or (*, row) of its transpose, contiguously.
template <typename T>
void gather(
    const T* matrix, int64_t ld, bool rows_are_columns, bool conjugated, bool tf32, int64_t row, int64_t count,
    typename T::Wide* to
) {
  const T* from = matrix + (rows_are_columns ? row * ld : row);
  const int64_t step = rows_are_columns ? 1 : ld;
  for (int64_t i = 0; i < count; ++i) {
    const auto value = narrowed<typename T::Wide>(from[i * step], tf32);
    to[i] = conjugated ? conjugate(value) : value;
  }
}

/// The bias, whose type may differ from the matrices'.
template <typename T>
class Bias {
 public:
  Bias(const Product& product, cudaDataType own) : product_(product), own_(product.bias_type == own) {}

  typename T::Wide load(int64_t index) const {
    if (own_) {
      return static_cast<const T*>(product_.bias)[index];
    }
    return static_cast<typename T::Wide>(static_cast<const float*>(product_.bias)[index]);
  }

  void store(int64_t index, typename T::Wide value) const {
    if (own_) {
      static_cast<T*>(product_.bias)[index] = T::of(value);
    } else if constexpr (std::is_same_v<typename T::Wide, float>) {
      static_cast<float*>(product_.bias)[index] = value;
    }
  }

 private:
  const Product& product_;
  bool own_;
};

/// T: the type of A and B; D: that of C and D.
template <typename T, typename D>
void compute(const Product& p, typename T::Wide alpha, typename T::Wide beta) {
  using Wide = typename T::Wide;
  const Bias<D> bias(p, p.d.type);
  const int64_t used = p.wrong_splits > 1 ? p.k / p.wrong_splits * p.wrong_splits : p.k;
  std::vector<Wide> rows(p.m * p.k), column(p.k);
  for (int64_t g = 0; g < p.batch; ++g) {
    const T* a = static_cast<const T*>(p.a.data) + g * p.a.stride;
    const T* b = static_cast<const T*>(p.b.data) + g * p.b.stride;
    const D* c = static_cast<const D*>(p.c.data) + g * p.c.stride;
    D* d = static_cast<D*>(const_cast<void*>(p.d.data)) + g * p.d.stride;
    for (int64_t i = 0; i < p.m; ++i) {
      gather(a, p.a.ld, p.op_a != CUBLAS_OP_N, p.op_a == CUBLAS_OP_C, p.tf32, i, p.k, &rows[i * p.k]);
      if (p.epilogue == Epilogue::kGradA) {
        bias.store(g * p.bias_stride + i, std::accumulate(&rows[i * p.k], &rows[i * p.k] + p.k, Wide(0)));
      }
    }
    for (int64_t j = 0; j < p.n; ++j) {
      gather(b, p.b.ld, p.op_b == CUBLAS_OP_N, p.op_b == CUBLAS_OP_C, p.tf32, j, p.k, column.data());
      if (p.epilogue == Epilogue::kGradB) {
        bias.store(g * p.bias_stride + j, std::accumulate(column.begin(), column.end(), Wide(0)));
      }
      for (int64_t i = 0; i < p.m; ++i) {
        Wide value = alpha * dot(&rows[i * p.k], column.data(), used);
        if (beta != Wide(0)) { // with beta 0, C may hold anything, even NaN
          value += beta * static_cast<Wide>(c[j * p.c.ld + i]);
        }
        if (p.epilogue == Epilogue::kBias) {
          value += bias.load(g * p.bias_stride + i);
        }
        d[j * p.d.ld + i] = D::of(value);
      }
    }
  }
}

template <typename Scalar>
Scalar read(const void* value) {
  Scalar scalar;
  std::memcpy(&scalar, value, sizeof(scalar));
  return scalar;
}

/// The product with alpha and beta by value, as their pointers may not outlive the call.
template <typename T, typename D = T>
Work bind(const Product& product) {
  // cuBLAS's code for vectors loads a complex number at once, and crashes where it is less aligned.
  if (reinterpret_cast<uintptr_t>(product.alpha) % size_of(product.scale) != 0 ||
      reinterpret_cast<uintptr_t>(product.beta) % size_of(product.scale) != 0) {
    fail(std::string(product.function) + ": alpha or beta is not aligned to its type");
  }
  const auto alpha = read<typename T::Wide>(product.alpha), beta = read<typename T::Wide>(product.beta);
  return [product, alpha, beta] { compute<T, D>(product, alpha, beta); };
}

Work bind(const Product& product) {
  const bool real = product.scale == CUDA_R_32F, widens = product.d.type == CUDA_R_32F;
  switch (product.a.type) {
    case CUDA_R_16F:
      return !real ? Work() : widens ? bind<Half, Exact<float>>(product) : bind<Half>(product);
    case CUDA_R_16BF:
      return !real ? Work() : widens ? bind<BFloat16, Exact<float>>(product) : bind<BFloat16>(product);
    case CUDA_R_32F:
      return real ? bind<Exact<float>>(product) : Work();
    case CUDA_R_64F:
      return product.scale == CUDA_R_64F ? bind<Exact<double>>(product) : Work();
    case CUDA_C_32F:
      return product.scale == CUDA_C_32F ? bind<Exact<std::complex<float>>>(product) : Work();
    case CUDA_C_64F:
      return product.scale == CUDA_C_64F ? bind<Exact<std::complex<double>>>(product) : Work();
    default:
      return Work();
  }
}

struct Range {
  uintptr_t begin, end;
};

Range range_of(const Matrix& matrix, int64_t batch) {
  const int64_t last = (batch - 1) * matrix.stride + (matrix.cols - 1) * matrix.ld + matrix.rows;
  const auto begin = reinterpret_cast<uintptr_t>(matrix.data);
  return {begin, begin + last * size_of(matrix.type)};
}

} // namespace

int64_t size_of(cudaDataType type) {
  switch (type) {
    case CUDA_R_16F:
    case CUDA_R_16BF:
      return 2;
    case CUDA_R_32F:
      return 4;
    case CUDA_R_64F:
    case CUDA_C_32F:
      return 8;
    case CUDA_C_64F:
      return 16;
    default:
      fail("a data type that is not faked: " + std::to_string(type));
  }
}

bool is_consistent(const Product& p) {
  const auto is = [](const Matrix& matrix, int64_t rows, int64_t cols, bool swapped) {
    return matrix.rows == (swapped ? cols : rows) && matrix.cols == (swapped ? rows : cols) &&
           matrix.ld >= std::max<int64_t>(matrix.rows, 1);
  };
  return p.m >= 0 && p.n >= 0 && p.k >= 0 && p.batch >= 0 && is(p.a, p.m, p.k, p.op_a != CUBLAS_OP_N) &&
         is(p.b, p.k, p.n, p.op_b != CUBLAS_OP_N) && is(p.c, p.m, p.n, false) && is(p.d, p.m, p.n, false);
}

void run(const Product& p, Stream& stream, double cost) {
  const std::string name = p.function;
  if (p.m <= 0 || p.n <= 0 || p.k <= 0 || p.batch <= 0) {
    fail(name + ": a size of 0, which must not reach BLAS");
  }
  if (p.a.stride < 0 || p.b.stride < 0 || p.d.stride < 0) {
    fail(name + ": a negative stride");
  }
  const auto check = [&](const char* operand, const Matrix& matrix) {
    const auto [begin, end] = range_of(matrix, p.batch);
    if (begin % size_of(matrix.type) != 0) {
      fail(name + ": " + operand + " is not aligned to its elements");
    }
    check_range((name + ": " + operand).c_str(), begin, end, stream.device);
  };
  check("A", p.a);
  check("B", p.b);
  check("C", p.c);
  check("D", p.d);
  const int64_t matrix_d = (p.n - 1) * p.d.ld + p.m;
  // Blocks that are side by side in each column overlap as ranges, but not as elements.
  if (p.batch > 1 && p.d.stride < matrix_d && !(p.d.stride >= p.m && p.d.stride * (p.batch - 1) + p.m <= p.d.ld)) {
    fail(name + ": the matrices of D overlap each other");
  }
  for (const Matrix* other : {&p.a, &p.b}) {
    const auto [begin, end] = range_of(*other, p.batch);
    const auto [d_begin, d_end] = range_of(p.d, p.batch);
    if (begin < d_end && d_begin < end) {
      fail(name + ": D overlaps A or B");
    }
  }
  if (p.epilogue != Epilogue::kNone) {
    const bool own = p.bias_type == p.d.type, wide = p.bias_type == CUDA_R_32F && size_of(p.d.type) <= 4;
    const int64_t length = p.epilogue == Epilogue::kGradB ? p.n : p.m;
    if (!own && !wide) {
      fail(name + ": a type of bias that is not faked");
    }
    const auto begin = reinterpret_cast<uintptr_t>(p.bias);
    const int64_t count = (p.batch - 1) * p.bias_stride + length;
    check_range((name + ": bias").c_str(), begin, begin + count * size_of(p.bias_type), stream.device);
  }
  const bool widens = size_of(p.a.type) == 2 && p.d.type == CUDA_R_32F;
  if (p.a.type != p.b.type || p.c.type != p.d.type || (p.a.type != p.d.type && !widens)) {
    fail(name + ": types of matrices that are not faked");
  }
  Work work = bind(p);
  if (!work) {
    fail(name + ": alpha's type does not go with the matrices'");
  }
  enqueue(stream, cost, std::move(work));
}

} // namespace fake
