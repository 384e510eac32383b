#include "tuning.h"

#include "cuda/cublas.h"
#include "scalar_type.h"

#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/Sleep.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <mutex>
#include <optional>

namespace blockdiag::cuda {
namespace {

Choice choice_of(const Candidate& candidate) { return std::bit_cast<Choice>(candidate.algorithm); }

ChoiceKey choice_key(LtProblem problem) {
  const auto* device = at::cuda::getDeviceProperties(static_cast<c10::DeviceIndex>(problem.device));
  problem.device = 0;
  return {device->name, problem.key()};
}

/// `plan` with the chosen candidate first, or without any if the choice is not to fuse; null if it lacks the candidate.
std::shared_ptr<const Plan> apply(const Choice& choice, const Plan& plan, const LtProblem& problem) {
  auto applied = std::make_shared<Plan>(plan);
  auto& candidates = applied->candidates;
  if (problem.epilogue.bias_grad && choice == Choice{}) {
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

/// Copies of a matrix, laid out and aligned as the problem's. Used in turn, they come from memory, not from the cache.
class Copies {
 public:
  Copies(const void* original, int64_t elements, DType dtype)
      : dtype_(scalar_type_of(dtype)),
        bytes_(elements * size_of(dtype)),
        offset_(static_cast<int64_t>(reinterpret_cast<uintptr_t>(original) % kAlignment)),
        pitch_((offset_ + bytes_ + kAlignment - 1) / kAlignment * kAlignment) {}

  int64_t pitch() const { return pitch_; }

  void allocate(int64_t count, c10::DeviceIndex device) {
    slab_ = at::empty({count, pitch_}, at::device(at::Device(at::kCUDA, device)).dtype(at::kByte));
  }

  /// Random numbers: the caller's may be zeros or infinities, which hide wrong algorithms.
  void fill(const at::Generator& generator) const { slab_.view(dtype_).uniform_(-1, 1, generator); }

  void fill_with_nan(int64_t copy) const { slab_[copy].fill_(0xff); }

  void* operator[](int64_t copy) const {
    return static_cast<char*>(slab_.mutable_data_ptr()) + copy % slab_.size(0) * pitch_ + offset_;
  }

  at::Tensor elements(int64_t copy) const {
    return slab_[copy % slab_.size(0)].narrow(0, offset_, bytes_).view(dtype_);
  }

 private:
  static constexpr int64_t kAlignment = 256; // of a slab; the most that algorithms require

  c10::ScalarType dtype_;
  int64_t bytes_, offset_, pitch_;
  at::Tensor slab_;
};

/// From the first element to the last, gaps included.
int64_t extent(int64_t rows, int64_t cols, const Operand& operand, int64_t batch) {
  if (operand.transpose) {
    std::swap(rows, cols);
  }
  return (batch - 1) * operand.stride + (cols - 1) * operand.ld + rows;
}

/// Times the candidates of a plan. For a bias gradient, a separate sum followed by `product`, which has no epilogue, is
/// one more contestant.
class Contest {
 public:
  Contest(
      cublasLtHandle_t handle, const Plan& plan, const Plan* product, const LtProblem& problem, const Operands& operands
  )
      : handle_(handle),
        plan_(plan),
        product_(product),
        problem_(problem),
        is_grad_(problem.epilogue.bias_grad),
        a_(operands.a, extent(problem.gemm.m, problem.gemm.k, problem.gemm.a, problem.gemm.batch), problem.dtype),
        b_(operands.b, extent(problem.gemm.k, problem.gemm.n, problem.gemm.b, problem.gemm.batch), problem.dtype),
        c_(operands.c, extent(problem.gemm.m, problem.gemm.n, problem.gemm.c, problem.gemm.batch), dtype_of_c(problem)),
        bias_(
            is_grad_ ? operands.bias_grad : operands.bias,
            problem.gemm.batch * (is_grad_ ? problem.gemm.n : problem.gemm.m), dtype_of_c(problem)
        ) {
    size_t workspace = 0;
    if (product_ != nullptr) {
      contestants_.push_back(nullptr);
      workspace = product_->candidates[0].workspace;
    }
    for (const auto& candidate : plan_.candidates) {
      contestants_.push_back(&candidate);
      workspace = std::max(workspace, candidate.workspace);
    }
    const auto device = static_cast<c10::DeviceIndex>(problem.device);
    workspace_ = c10::cuda::CUDACachingAllocator::get()->allocate(workspace);
    const int64_t l2 = at::cuda::getDeviceProperties(device)->l2CacheSize;
    const int64_t copies = std::clamp<int64_t>(2 * l2 / (a_.pitch() + b_.pitch() + c_.pitch()) + 1, 1, 64);
    launches_ = std::max<int64_t>(copies, 2);
    a_.allocate(copies, device);
    b_.allocate(copies, device);
    c_.allocate(launches_, device); // at least two, to compare
    const auto generator = at::cuda::detail::createCUDAGenerator(device);
    a_.fill(generator);
    b_.fill(generator);
    if (problem.epilogue.bias || is_grad_) {
      bias_.allocate(2, device);
      bias_.fill(generator);
    }
  }

  /// The fastest, or nothing if none qualifies.
  std::optional<Choice> winner() const {
    std::vector<const Candidate*> qualified;
    for (const auto* contestant : contestants_) {
      if (qualifies(contestant, qualified.empty() ? contestant : qualified[0])) {
        qualified.push_back(contestant);
      }
    }
    if (qualified.empty()) {
      return std::nullopt;
    }
    std::chrono::duration<double, std::micro> queueing{0}; // the host's longest time for all launches
    for (const auto* contestant : qualified) {
      const auto began = std::chrono::steady_clock::now();
      run_all(contestant);
      queueing = std::max<decltype(queueing)>(queueing, std::chrono::steady_clock::now() - began);
    }
    constexpr size_t kRounds = 7;
    std::vector<std::array<float, kRounds>> times(qualified.size());
    for (size_t round = 0; round < kRounds; ++round) {
      for (size_t turn = 0; turn < qualified.size(); ++turn) {
        const auto i = (turn + round) % qualified.size();
        times[i][round] = time(qualified[i], queueing.count());
      }
    }
    for (auto& rounds : times) {
      std::nth_element(rounds.begin(), rounds.begin() + kRounds / 2, rounds.end());
    }
    // The first wins unless another is clearly faster: noise should not decide.
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
  cublasStatus_t run(const Candidate* contestant, int64_t input, int64_t output) const {
    Operands operands{.a = a_[input], .b = b_[input], .c = c_[output], .bias = nullptr, .bias_grad = nullptr};
    if (problem_.epilogue.bias) {
      operands.bias = bias_[input];
    }
    if (is_grad_ && contestant != nullptr) {
      operands.bias_grad = bias_[output];
    }
    if (contestant != nullptr) {
      return launch(handle_, plan_, *contestant, operands, workspace_.get());
    }
    const auto& gemm = problem_.gemm;
    const auto strides = gemm.b.transpose ? std::array<int64_t, 3>{gemm.b.ld, gemm.b.stride, 1}
                                          : std::array<int64_t, 3>{1, gemm.b.stride, gemm.b.ld};
    auto sums = bias_.elements(output).view({gemm.batch, gemm.n});
    const auto options = sums.options().dtype(scalar_type_of(problem_.dtype));
    at::sum_out(
        sums, at::from_blob(b_[input], {gemm.k, gemm.batch, gemm.n}, strides, options), /*dim=*/{0}, /*keepdim=*/false,
        sums.scalar_type()
    );
    return launch(handle_, *product_, product_->candidates[0], operands, workspace_.get());
  }

  /// Launches once per copy.
  void run_all(const Candidate* contestant) const {
    for (int64_t copy = 0; copy < launches_; ++copy) {
      check_status(run(contestant, copy, copy), "cublasLtMatmul", problem_);
    }
  }

  /// Whether the contestant runs, agrees with `reference` and, in deterministic mode, repeats its own bits.
  bool qualifies(const Candidate* contestant, const Candidate* reference) const {
    const auto computes_as = [&](const Candidate* other, const auto& same) {
      return run(other, 0, 1) == CUBLAS_STATUS_SUCCESS && same(c_.elements(0), c_.elements(1)) &&
             (!is_grad_ || same(bias_.elements(0), bias_.elements(1)));
    };
    c_.fill_with_nan(0); // so that another's results do not pass for its own
    if (is_grad_) {
      bias_.fill_with_nan(0);
    }
    if (run(contestant, 0, 0) != CUBLAS_STATUS_SUCCESS) {
      return false;
    }
    if (problem_.deterministic &&
        !computes_as(contestant, [](const auto& x, const auto& y) { return at::equal(x, y); })) {
      return false;
    }
    return computes_as(reference, [](const auto& actual, const auto& expected) {
      // Sums of bfloat16 in bfloat16 differ by a few hundredths of their usual size, wrong ones by that size.
      constexpr float kTolerance = 0.1F;
      const auto usual = at::linalg_vector_norm(expected.to(at::kFloat)).template item<float>() /
                         std::sqrt(static_cast<float>(expected.numel()));
      return actual.to(at::kFloat).sub(expected).abs().max().template item<float>() <= kTolerance * usual;
    });
  }

  /// Milliseconds for one launch per copy.
  float time(const Candidate* contestant, double queueing_us) const {
    // The device sleeps while the launches are queued; otherwise the host's launch rate would be timed.
    constexpr double kCyclesPerMicrosecond = 2000; // roughly, of the fastest GPUs
    at::cuda::sleep(static_cast<int64_t>(2 * queueing_us * kCyclesPerMicrosecond));
    at::cuda::CUDAEvent start(cudaEventDefault), stop(cudaEventDefault);
    start.record();
    run_all(contestant);
    stop.record();
    stop.synchronize();
    return start.elapsed_time(stop);
  }

  cublasLtHandle_t handle_;
  const Plan& plan_;
  const Plan* product_;
  const LtProblem& problem_;
  bool is_grad_;
  std::vector<const Candidate*> contestants_; // null for product_ and a sum
  Copies a_, b_, c_, bias_;
  int64_t launches_;
  c10::DataPtr workspace_;
};

/// One at a time: concurrent measurements would disturb each other.
std::optional<Choice> measure(
    cublasLtHandle_t handle, const Plan& plan, const Plan* product, const LtProblem& problem, const Operands& operands
) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  const auto key = choice_key(problem);
  if (const auto known = choices().find(key); known && apply(*known, plan, problem)) {
    return *known; // another thread was faster
  }
  // Another thread may be capturing a graph, when torch forbids all threads to wait for a device.
  const c10::cuda::CUDAStreamCaptureModeGuard guard(cudaStreamCaptureModeRelaxed);
  try {
    const auto winner = Contest(handle, plan, product, problem, operands).winner();
    if (winner) {
      choices().set(key, *winner);
    }
    return winner;
  } catch (const c10::OutOfMemoryError&) {
    return std::nullopt; // no room for copies
  }
}

LruCache<LtProblem::Key, Plan, KeyHash>& tuned_plans() {
  static auto* cache = new LruCache<LtProblem::Key, Plan, KeyHash>(4096);
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
    cublasLtHandle_t handle, const std::shared_ptr<const Plan>& plan, const LtProblem& problem, const Operands& operands
) {
  const auto key = problem.key();
  if (auto known = tuned_plans().find(key)) {
    return known;
  }
  if (plan->candidates.size() == 1 && !problem.epilogue.bias_grad) {
    return plan; // nothing to choose from
  }
  std::shared_ptr<const Plan> tuned;
  if (const auto choice = choices().find(choice_key(problem))) {
    tuned = apply(*choice, *plan, problem);
  }
  const bool may_measure =
      tuning().unmeasured == 0 && c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None;
  if (!tuned && may_measure) {
    std::shared_ptr<const Plan> product; // without the epilogue, also tuned
    auto unmeasured = choice_of(plan->candidates[0]);
    if (problem.epilogue.bias_grad) {
      auto plain = problem;
      plain.epilogue = {};
      plain.alignments[3] = 0;
      product = std::make_shared<const Plan>(make_plan(handle, plain).value_or(Plan{}));
      product = product->candidates.empty() ? nullptr : tuned_plan(handle, product, plain, operands);
      unmeasured = Choice{};
    }
    // If measuring fails, the untuned choice is final.
    const auto choice = measure(handle, *plan, product.get(), problem, operands).value_or(unmeasured);
    tuned = apply(choice, *plan, problem);
  }
  return tuned == nullptr ? nullptr : tuned_plans().get(key, [&] { return *tuned; });
}

} // namespace blockdiag::cuda
