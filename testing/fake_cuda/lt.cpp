// cuBLASLt. Descriptors are the real library's, which need no device; the heuristic's algorithms are invented.
//
// An algorithm stores the heuristic's input, and cublasLtMatmul compares: the problem must be the same, and no pointer
// less aligned.
#include "fake.h"

#include <cublasLt.h>
#include <cublas_v2.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace fake {
namespace {

/// Calls a function of the real library, which is loaded by then.
template <typename T, typename Described, typename Name>
T ask(const char* function, Described described, Name name) {
  static void* library =
      dlopen(("libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR)).c_str(), RTLD_NOLOAD | RTLD_LAZY);
  using Get = cublasStatus_t (*)(Described, Name, void*, size_t, size_t*);
  static const auto get = library == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(library, function));
  T value{};
  size_t written = 0;
  if (get == nullptr || get(described, name, &value, sizeof(value), &written) != CUBLAS_STATUS_SUCCESS) {
    fail(function + std::string(" of the real cuBLASLt, attribute ") + std::to_string(name));
  }
  return value;
}

template <typename T>
T attribute(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t name) {
  return ask<T>("cublasLtMatmulDescGetAttribute", operation, name);
}

template <typename T>
T attribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t name) {
  return ask<T>("cublasLtMatrixLayoutGetAttribute", layout, name);
}

template <typename T>
T attribute(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t name) {
  return ask<T>("cublasLtMatmulPreferenceGetAttribute", preference, name);
}

Matrix matrix(cublasLtMatrixLayout_t layout, const void* data) {
  if (attribute<int32_t>(layout, CUBLASLT_MATRIX_LAYOUT_ORDER) != CUBLASLT_ORDER_COL) {
    fail("matrices by rows are not faked");
  }
  return {
      data,
      static_cast<cudaDataType>(attribute<uint32_t>(layout, CUBLASLT_MATRIX_LAYOUT_TYPE)),
      static_cast<int64_t>(attribute<uint64_t>(layout, CUBLASLT_MATRIX_LAYOUT_ROWS)),
      static_cast<int64_t>(attribute<uint64_t>(layout, CUBLASLT_MATRIX_LAYOUT_COLS)),
      attribute<int64_t>(layout, CUBLASLT_MATRIX_LAYOUT_LD),
      attribute<int64_t>(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET),
  };
}

struct Described {
  Product product;
  bool supported; // whether matrices, scale and compute type go together
};

Described describe(
    cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
    cublasLtMatrixLayout_t d
) {
  Product p{};
  p.function = "cublasLtMatmul";
  p.op_a = static_cast<cublasOperation_t>(attribute<int32_t>(operation, CUBLASLT_MATMUL_DESC_TRANSA));
  p.op_b = static_cast<cublasOperation_t>(attribute<int32_t>(operation, CUBLASLT_MATMUL_DESC_TRANSB));
  p.a = matrix(a, nullptr);
  p.b = matrix(b, nullptr);
  p.c = matrix(c, nullptr);
  p.d = matrix(d, nullptr);
  p.m = p.d.rows;
  p.n = p.d.cols;
  p.k = p.op_a == CUBLAS_OP_N ? p.a.cols : p.a.rows;
  p.batch = attribute<int32_t>(d, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT);
  for (const auto layout : {a, b, c}) {
    if (attribute<int32_t>(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) != p.batch) {
      fail("cublasLt: the matrices do not agree in their batch");
    }
  }
  p.scale = static_cast<cudaDataType>(attribute<int32_t>(operation, CUBLASLT_MATMUL_DESC_SCALE_TYPE));
  const auto compute =
      static_cast<cublasComputeType_t>(attribute<int32_t>(operation, CUBLASLT_MATMUL_DESC_COMPUTE_TYPE));
  p.tf32 = compute == CUBLAS_COMPUTE_32F_FAST_TF32;
  p.bias = attribute<void*>(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
  p.bias_stride = attribute<int64_t>(operation, CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE);
  const auto bias_type = attribute<int32_t>(operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE);
  p.bias_type = bias_type == -1 ? p.d.type : static_cast<cudaDataType>(bias_type);
  switch (attribute<uint32_t>(operation, CUBLASLT_MATMUL_DESC_EPILOGUE)) {
    case CUBLASLT_EPILOGUE_DEFAULT:
      p.epilogue = Epilogue::kNone;
      break;
    case CUBLASLT_EPILOGUE_BIAS:
      p.epilogue = Epilogue::kBias;
      break;
    case CUBLASLT_EPILOGUE_BGRADA:
      p.epilogue = Epilogue::kGradA;
      break;
    case CUBLASLT_EPILOGUE_BGRADB:
      p.epilogue = Epilogue::kGradB;
      break;
    default:
      fail("an epilogue that is not faked");
  }
  // A bias beside operands of a half type and a float32 result: the documentation does not say.
  const bool half = p.a.type == CUDA_R_16F || p.a.type == CUDA_R_16BF;
  const bool result = p.d.type == p.a.type || (p.d.type == CUDA_R_32F && p.epilogue != Epilogue::kBias);
  const bool supported =
      p.scale == CUDA_R_32F && ((half && result && compute == CUBLAS_COMPUTE_32F) ||
                                (p.a.type == CUDA_R_32F && (compute == CUBLAS_COMPUTE_32F || p.tf32)));
  return {p, supported};
}

/// FNV-1a over everything that an algorithm may depend on.
uint64_t fingerprint(const Product& p) {
  uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&](int64_t number) { hash = (hash ^ static_cast<uint64_t>(number)) * 0x100000001b3; };
  for (const Matrix* matrix : {&p.a, &p.b, &p.c, &p.d}) {
    for (const int64_t number : {int64_t{matrix->type}, matrix->rows, matrix->cols, matrix->ld, matrix->stride}) {
      add(number);
    }
  }
  for (const int64_t number : {p.batch, int64_t{p.op_a}, int64_t{p.op_b}, int64_t{p.scale}, int64_t{p.tf32}}) {
    add(number);
  }
  add(static_cast<int64_t>(p.epilogue));
  add(p.epilogue == Epilogue::kNone ? 0 : p.bias_stride);
  return hash;
}

int64_t alignment(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer) | 256;
  return static_cast<int64_t>(address & -address);
}

/// The content of a cublasLtMatmulAlgo_t.
struct Algorithm {
  int32_t id, splits, workspace;
  // The heuristic's input:
  int32_t device = 0;
  uint64_t problem = 0;
  int32_t align[4] = {}; // of A, B, C and D
  int32_t align_bias = 0;
};
static_assert(sizeof(Algorithm) <= sizeof(cublasLtMatmulAlgo_t));

// Algorithm 66 sums wrongly if its parts do not divide k, as the real one does in some versions.
constexpr Algorithm kAlgorithms[] = {
    {21, 1, 0},
    {31, 1, 1 << 20},
    {66, 3, 4096},
};
constexpr int kCount = std::size(kAlgorithms);

const Algorithm& algorithm_of(const cublasLtMatmulAlgo_t* algorithm) {
  return *reinterpret_cast<const Algorithm*>(algorithm);
}

} // namespace
} // namespace fake

using namespace fake;

FAKE_EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int requested,
    cublasLtMatmulHeuristicResult_t results[], int* returned
) {
  if (do_nothing) {
    results[0] = {};
    *returned = 1;
    return CUBLAS_STATUS_SUCCESS;
  }
  log("cublasLtMatmulAlgoGetHeuristic");
  *returned = 0;
  const auto [product, supported] = describe(operation, a, b, c, d);
  if (const auto status = option("heuristic_status")) {
    return static_cast<cublasStatus_t>(status);
  }
  if (!is_consistent(product) || requested < 1) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (!supported) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  const auto allowed = attribute<uint64_t>(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
  const auto schemes = attribute<uint32_t>(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
  const auto limit = option("heuristic_limit") == 0 ? kCount : option("heuristic_limit") - 1;
  for (int i = 0; i < kCount && *returned < std::min<int64_t>(requested, limit); ++i) {
    Algorithm algorithm = kAlgorithms[(i + option("heuristic_first")) % kCount];
    if (static_cast<uint64_t>(algorithm.workspace) > allowed ||
        (algorithm.splits > 1 && (schemes & CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE) == 0)) {
      continue;
    }
    algorithm.problem = fingerprint(product);
    algorithm.device = handle_of(handle).device;
    algorithm.align[0] = attribute<uint32_t>(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
    algorithm.align[1] = attribute<uint32_t>(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
    algorithm.align[2] = attribute<uint32_t>(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
    algorithm.align[3] = attribute<uint32_t>(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
    algorithm.align_bias = alignment(product.bias);
    auto& result = results[(*returned)++];
    result = {};
    std::memcpy(&result.algo, &algorithm, sizeof(algorithm));
    result.workspaceSize = algorithm.workspace;
    result.state = CUBLAS_STATUS_SUCCESS;
    result.wavesCount = 1;
  }
  return *returned == 0 ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
}

FAKE_EXPORT cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(
    const cublasLtMatmulAlgo_t* algorithm, cublasLtMatmulAlgoConfigAttributes_t name, void* to, size_t size,
    size_t* written
) {
  const auto& found = algorithm_of(algorithm);
  if (option(("mute_" + std::to_string(found.id)).c_str()) == name + 1) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  int32_t value = 0;
  switch (name) {
    case CUBLASLT_ALGO_CONFIG_ID:
      value = found.id;
      break;
    case CUBLASLT_ALGO_CONFIG_SPLITK_NUM:
      value = found.splits;
      break;
    case CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME:
      value = found.splits > 1 ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE : CUBLASLT_REDUCTION_SCHEME_NONE;
      break;
    default: // tile, stages and so on: left to the library
      break;
  }
  if (size < sizeof(value) && size != sizeof(uint16_t)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  std::memcpy(to, &value, std::min(size, sizeof(value)));
  if (written != nullptr) {
    *written = std::min(size, sizeof(value));
  }
  return CUBLAS_STATUS_SUCCESS;
}

FAKE_EXPORT cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  return cublasCreate_v2(reinterpret_cast<cublasHandle_t*>(handle));
}

FAKE_EXPORT cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void* alpha, const void* a,
    cublasLtMatrixLayout_t layout_a, const void* b, cublasLtMatrixLayout_t layout_b, const void* beta, const void* c,
    cublasLtMatrixLayout_t layout_c, void* d, cublasLtMatrixLayout_t layout_d, const cublasLtMatmulAlgo_t* algorithm,
    void* workspace, size_t workspace_size, cudaStream_t stream
) {
  if (do_nothing) {
    return CUBLAS_STATUS_SUCCESS;
  }
  auto product = describe(operation, layout_a, layout_b, layout_c, layout_d).product;
  const auto& chosen = algorithm_of(algorithm);
  log("cublasLtMatmul m=" + std::to_string(product.m) + " n=" + std::to_string(product.n) +
      " k=" + std::to_string(product.k) + " batch=" + std::to_string(product.batch) +
      " epilogue=" + std::to_string(static_cast<int>(product.epilogue)) + " algo=" + std::to_string(chosen.id));
  if (const auto status = option("matmul_status")) {
    return static_cast<cublasStatus_t>(status);
  }
  auto& found = stream_of(stream);
  const int device = handle_of(handle).device;
  if (device != current_device() || found.device != device || chosen.device != device) {
    fail("cublasLtMatmul: the handle, the stream, the algorithm and the current device are not of one device");
  }
  if (chosen.problem != fingerprint(product)) {
    fail("cublasLtMatmul: the algorithm was made for another problem");
  }
  // Documented as the buffers' alignment, but this project passes that of every matrix, and is held to it.
  const auto is_aligned = [&](const void* pointer, int64_t stride, cudaDataType type, int64_t told) {
    const auto bits = reinterpret_cast<uintptr_t>(pointer) | (product.batch > 1 ? stride * size_of(type) : 0);
    return bits % told == 0;
  };
  const void* pointers[] = {a, b, c, d};
  const Matrix* matrices[] = {&product.a, &product.b, &product.c, &product.d};
  for (int i = 0; i < 4; ++i) {
    if (!is_aligned(pointers[i], matrices[i]->stride, matrices[i]->type, chosen.align[i])) {
      fail(std::string("cublasLtMatmul: less aligned than the heuristic was told: ") + "ABCD"[i]);
    }
  }
  if (product.epilogue != Epilogue::kNone &&
      !is_aligned(product.bias, product.bias_stride, product.bias_type, chosen.align_bias)) {
    fail("cublasLtMatmul: the bias is less aligned than the heuristic was told");
  }
  if (workspace_size < static_cast<size_t>(chosen.workspace)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (workspace_size > 0) {
    const auto begin = reinterpret_cast<uintptr_t>(workspace);
    if (begin % 256 != 0) {
      fail("cublasLtMatmul: the workspace is not aligned to 256 bytes");
    }
    check_range("cublasLtMatmul: workspace", begin, begin + workspace_size, device);
  }
  product.a.data = a;
  product.b.data = b;
  product.c.data = c;
  product.d.data = d;
  product.alpha = alpha;
  product.beta = beta;
  const auto id = std::to_string(chosen.id);
  if (option(("fails_" + id).c_str()) != 0) {
    return CUBLAS_STATUS_INTERNAL_ERROR;
  }
  if (option(("skips_" + id).c_str()) != 0) {
    return CUBLAS_STATUS_SUCCESS;
  }
  static std::atomic<int64_t> count{0};
  const bool wrong = ++count % 2 == 0 || option(("unsteady_" + id).c_str()) == 0;
  product.wrong_splits = chosen.id == 66 ? chosen.splits : wrong ? option(("wrong_" + id).c_str()) : 0;
  const int64_t cost = option(("cost_" + std::to_string(chosen.id)).c_str());
  run(product, found, cost == 0 ? 10 : static_cast<double>(cost));
  return CUBLAS_STATUS_SUCCESS;
}
