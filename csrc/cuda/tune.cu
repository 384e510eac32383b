#include "tune.h"

#include "cublas.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/Sleep.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <optional>

namespace blockdiag::cuda {
namespace {

Choice choice_of(const Candidate& candidate) {
  return std::bit_cast<Choice>(candidate.algorithm);
}

ChoiceKey choice_key(Problem problem) {
  const auto* device = at::cuda::getDeviceProperties(static_cast<c10::DeviceIndex>(problem.device));
  problem.device = 0;
  return {device->name, problem.key()};
}

/// `plan` with the chosen candidate first, or with none if the choice is to do without; null if it is not among them.
std::shared_ptr<const Plan> apply(const Choice& choice, const Plan& plan, const Problem& problem) {
  auto applied = std::make_shared<Plan>(plan);
  auto& candidates = applied->candidates;
  if (problem.epilogue == Epilogue::kBiasGrad && choice == Choice{}) {
    candidates.clear();
    return applied;
  }
  const auto is_chosen = [&](const Candidate& candidate) { return choice_of(candidate) == choice; };
  const auto chosen = std::find_if(candidates.begin(), candidates.end(), is_chosen);
  if (chosen == candidates.end()) {
    return nullptr;
  }
  std::rotate(candidates.begin(), chosen, chosen + 1);
  return applied;
}

/// Copies of an operand, each as aligned as it: used in turn, they come from memory rather than from the cache.
class Copies {
 public:
  Copies(const void* original, int64_t rows, int64_t cols, const Operand& operand, const Problem& problem) {
    if (operand.transpose) {
      std::swap(rows, cols);
    }
    const auto element = static_cast<int64_t>(c10::elementSize(static_cast<c10::ScalarType>(problem.dtype)));
    bytes_ = ((problem.gemm.batch - 1) * operand.stride + (cols - 1) * operand.ld + rows) * element;
    original_ = static_cast<const char*>(original);
    offset_ = static_cast<int64_t>(reinterpret_cast<uintptr_t>(original) % kAlignment);
    pitch_ = (offset_ + bytes_ + kAlignment - 1) / kAlignment * kAlignment;
  }

  int64_t pitch() const {
    return pitch_;
  }

  void allocate(int64_t count, const at::TensorOptions& bytes) {
    slab_ = at::empty({count, pitch_}, bytes);
  }

  void fill() const {
    const auto stream = c10::cuda::getCurrentCUDAStream();
    for (int64_t copy = 0; copy < slab_.size(0); ++copy) {
      C10_CUDA_CHECK(cudaMemcpyAsync((*this)[copy], original_, bytes_, cudaMemcpyDeviceToDevice, stream));
    }
  }

  void* operator[](int64_t copy) const {
    return static_cast<char*>(slab_.mutable_data_ptr()) + copy * pitch_ + offset_;
  }

  /// The copy as a vector of the problem's dtype. Only of C, which has no gaps.
  at::Tensor elements(int64_t copy, c10::ScalarType dtype) const {
    return slab_[copy].narrow(0, offset_, bytes_).view(dtype);
  }

 private:
  static constexpr int64_t kAlignment = 256; // of a slab, and the most that algorithms ask for

  const char* original_;
  int64_t bytes_, offset_, pitch_;
  at::Tensor slab_;
};

/// The candidates of a plan, timed. If the epilogue is a bias gradient, a kernel without it after a sum is one more.
class Contest {
 public:
  Contest(cublasLtHandle_t handle, const Plan& plan, const Problem& problem, const Operands& operands)
      : handle_(handle),
        plan_(plan),
        problem_(problem),
        dtype_(static_cast<c10::ScalarType>(problem.dtype)),
        bias_(operands.bias),
        a_(operands.a, problem.gemm.m, problem.gemm.k, problem.gemm.a, problem),
        b_(operands.b, problem.gemm.k, problem.gemm.n, problem.gemm.b, problem),
        c_(operands.c, problem.gemm.m, problem.gemm.n, problem.gemm.c, problem) {
    if (problem.epilogue == Epilogue::kBiasGrad) {
      auto product = problem;
      product.epilogue = Epilogue::kNone;
      product.alignments[3] = 0;
      product_ = make_plan(handle, product);
      if (!product_.candidates.empty()) {
        contestants_.push_back(nullptr);
      }
    }
    size_t workspace = contestants_.empty() ? 0 : product_.candidates[0].workspace;
    for (const auto& candidate : plan_.candidates) {
      contestants_.push_back(&candidate);
      workspace = std::max(workspace, candidate.workspace);
    }
    const auto bytes =
        at::device(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(problem.device))).dtype(at::kByte);
    workspace_ = at::empty({static_cast<int64_t>(workspace)}, bytes);
    const int64_t sums = problem.epilogue == Epilogue::kBiasGrad ? problem.gemm.n : 0;
    bias_grads_ = at::empty({2, problem.gemm.batch, sums}, bytes.dtype(dtype_));
    const int64_t l2 = at::cuda::getCurrentDeviceProperties()->l2CacheSize;
    copies_ = std::clamp<int64_t>(2 * l2 / (a_.pitch() + b_.pitch() + c_.pitch()) + 1, 2, 64);
    for (auto* operand : {&a_, &b_, &c_}) {
      operand->allocate(copies_, bytes);
    }
    a_.fill();
    b_.fill();
  }

  /// The fastest, or nothing if none runs.
  std::optional<Choice> winner() {
    std::vector<const Candidate*> qualified;
    for (const auto* contestant : contestants_) {
      if (qualifies(contestant, qualified.empty() ? contestant : qualified[0])) {
        qualified.push_back(contestant);
      }
    }
    if (qualified.empty()) {
      return std::nullopt;
    }
    constexpr size_t kRounds = 7;
    std::vector<std::array<float, kRounds>> times(qualified.size());
    for (size_t round = 0; round < kRounds; ++round) {
      for (size_t turn = 0; turn < qualified.size(); ++turn) {
        const auto i = (turn + round) % qualified.size();
        times[i][round] = time(qualified[i]);
      }
    }
    for (auto& rounds : times) {
      std::nth_element(rounds.begin(), rounds.begin() + kRounds / 2, rounds.end());
    }
    // The first, the heuristic's own choice, stands unless another is clearly faster: noise should not decide.
    constexpr float kClearly = 0.98F;
    size_t best = 0;
    for (size_t i = 1; i < times.size(); ++i) {
      if (times[i][kRounds / 2] < times[best][kRounds / 2] * (best == 0 ? kClearly : 1)) {
        best = i;
      }
    }
    return qualified[best] == nullptr ? Choice{} : choice_of(*qualified[best]);
  }

 private:
  cublasStatus_t run(const Candidate* contestant, int64_t copy) const {
    const auto bias_grad = bias_grads_[copy % 2];
    void* bias = problem_.epilogue == Epilogue::kBiasGrad ? bias_grad.mutable_data_ptr() : bias_;
    if (contestant != nullptr) {
      const Operands operands = {a_[copy], b_[copy], c_[copy], bias};
      return launch(handle_, plan_, *contestant, operands, workspace_.mutable_data_ptr());
    }
    const auto& gemm = problem_.gemm;
    const auto strides = gemm.b.transpose ? std::array<int64_t, 3>{gemm.b.ld, gemm.b.stride, 1}
                                          : std::array<int64_t, 3>{1, gemm.b.stride, gemm.b.ld};
    const auto grad_output = at::from_blob(b_[copy], {gemm.k, gemm.batch, gemm.n}, strides, bias_grad.options());
    at::sum_out(const_cast<at::Tensor&>(bias_grad), grad_output, /*dim=*/{0});
    const Operands operands = {a_[copy], b_[copy], c_[copy], nullptr};
    return launch(handle_, product_, product_.candidates[0], operands, workspace_.mutable_data_ptr());
  }

  void check(cublasStatus_t status) const {
    check_status(status, "cublasLtMatmul", problem_.gemm, dtype_);
  }

  /// Whether the contestant runs and computes what `reference` does, and if the user asks for that, the same twice.
  bool qualifies(const Candidate* contestant, const Candidate* reference) const {
    const auto status = run(contestant, 0);
    if (is_unsupported(status)) {
      return false;
    }
    check(status);
    const auto results = [&](int64_t copy) {
      return problem_.epilogue == Epilogue::kBiasGrad ? std::vector{c_.elements(copy, dtype_), bias_grads_[copy]}
                                                      : std::vector{c_.elements(copy, dtype_)};
    };
    const auto agree = [&](const auto& same) {
      const auto first = results(0), second = results(1);
      return std::equal(first.begin(), first.end(), second.begin(), same);
    };
    if (problem_.deterministic) {
      check(run(contestant, 1));
      // As bytes: NaN is not equal to itself.
      const auto same = [](const auto& x, const auto& y) { return at::equal(x.view(at::kByte), y.view(at::kByte)); };
      if (!agree(same)) {
        return false;
      }
    }
    if (contestant == reference) {
      return true;
    }
    check(run(reference, 1));
    return agree([](const auto& actual, const auto& expected) {
      constexpr float kTolerance = 0.02F; // bfloat16 sums in bfloat16 are that far apart, wrong ones much further
      const auto difference = at::linalg_vector_norm(actual.to(at::kFloat).sub(expected)).template item<float>();
      const auto size = at::linalg_vector_norm(expected.to(at::kFloat)).template item<float>();
      return !std::isfinite(size) || difference <= kTolerance * size;
    });
  }

  /// Milliseconds of a launch for each copy.
  float time(const Candidate* contestant) const {
    // The device sleeps while the launches are queued, or else their rate would be what is timed.
    constexpr int64_t kCyclesPerLaunch = 50000;
    at::cuda::sleep(kCyclesPerLaunch * copies_);
    at::cuda::CUDAEvent start(cudaEventDefault), stop(cudaEventDefault);
    start.record();
    for (int64_t copy = 0; copy < copies_; ++copy) {
      check(run(contestant, copy));
    }
    stop.record();
    stop.synchronize();
    return start.elapsed_time(stop);
  }

  cublasLtHandle_t handle_;
  const Plan& plan_;
  const Problem& problem_;
  c10::ScalarType dtype_;
  void* bias_;
  Plan product_{};                            // without the epilogue
  std::vector<const Candidate*> contestants_; // null for product_ and a sum
  Copies a_, b_, c_;
  int64_t copies_;
  at::Tensor workspace_, bias_grads_;
};

/// One at a time, as two that run at once would time each other.
std::optional<Choice> measure(
    cublasLtHandle_t handle, const Plan& plan, const Problem& problem, const Operands& operands
) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  const auto key = choice_key(problem);
  if (const auto known = choices().find(key); known && apply(*known, plan, problem)) {
    return *known; // another thread was faster
  }
  try {
    const auto winner = Contest(handle, plan, problem, operands).winner();
    if (winner) {
      choices().set(key, *winner);
    }
    return winner;
  } catch (const c10::OutOfMemoryError&) {
    return std::nullopt; // there is no room for copies
  }
}

LruCache<Problem::Key, Plan, KeyHash>& tuned_plans() {
  static auto* cache = new LruCache<Problem::Key, Plan, KeyHash>(4096);
  return *cache;
}

} // namespace

Tuning& tuning() {
  static Tuning state;
  return state;
}

LruCache<ChoiceKey, Choice, ChoiceKeyHash>& choices() {
  static auto* cache = new LruCache<ChoiceKey, Choice, ChoiceKeyHash>(1 << 16);
  return *cache;
}

std::shared_ptr<const Plan> tuned_plan(
    cublasLtHandle_t handle, const std::shared_ptr<const Plan>& plan, const Problem& problem, const Operands& operands
) {
  const auto key = problem.key();
  if (auto known = tuned_plans().find(key)) {
    return known;
  }
  if (plan->candidates.size() == 1 && problem.epilogue != Epilogue::kBiasGrad) {
    return plan; // there is nothing to choose from
  }
  std::shared_ptr<const Plan> tuned;
  if (const auto choice = choices().find(choice_key(problem))) {
    tuned = apply(*choice, *plan, problem);
  }
  const bool may_measure =
      tuning().measured > 0 && c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None;
  if (!tuned && may_measure) {
    // Where that fails, what would be done without it, from now on.
    const bool separate = problem.epilogue == Epilogue::kBiasGrad;
    const auto unmeasured = separate ? Choice{} : choice_of(plan->candidates[0]);
    tuned = apply(measure(handle, *plan, problem, operands).value_or(unmeasured), *plan, problem);
  }
  return tuned == nullptr ? nullptr : tuned_plans().get(key, [&] { return *tuned; });
}

} // namespace blockdiag::cuda
