// Capture of streams into graphs, replay, and Python's work on a stream.
#include "streams.h"

#include <utility>

namespace fake {
namespace {

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

} // namespace

bool is_unsafe_in_capture() {
  if (thread_mode == cudaStreamCaptureModeRelaxed) {
    return false;
  }
  const std::lock_guard lock(state().mutex);
  bool unsafe = false;
  for (Capture* capture : state().captures) {
    // A "thread local" capture of another thread would allow it; that mode is not distinguished here.
    if (capture->mode == cudaStreamCaptureModeGlobal) {
      capture->invalid = unsafe = true;
    }
  }
  return unsafe;
}

} // namespace fake

using namespace fake;

FAKE_EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  auto& found = stream_of(stream);
  const std::lock_guard lock(state().mutex);
  if (found.capture || &found == &state().defaults[found.device]) {
    return cudaErrorStreamCaptureUnsupported;
  }
  found.capture = std::make_shared<Capture>(Capture{state().next_id++, mode});
  state().captures.insert(found.capture.get());
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  auto& found = stream_of(stream);
  const std::lock_guard lock(state().mutex);
  if (!found.capture) {
    return cudaErrorIllegalState;
  }
  const auto capture = found.capture;
  state().captures.erase(capture.get());
  found.capture = nullptr;
  for (Stream* other : state().created) {
    if (other->capture == capture) {
      other->capture = nullptr;
    }
  }
  *graph = nullptr;
  if (capture->invalid) {
    return cudaErrorStreamCaptureInvalidated;
  }
  *graph = reinterpret_cast<cudaGraph_t>(new std::shared_ptr<Graph>(capture->graph));
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  auto& found = stream_of(stream);
  const std::lock_guard lock(state().mutex);
  *status = !found.capture           ? cudaStreamCaptureStatusNone
            : found.capture->invalid ? cudaStreamCaptureStatusInvalidated
                                     : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

/// Without nodes, which torch does not use by default.
FAKE_EXPORT cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
    const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* count
) {
  cudaStreamIsCapturing(stream, status);
  const auto set = [](auto* to, auto value) {
    if (to != nullptr) {
      *to = value;
    }
  };
  set(id, *status == cudaStreamCaptureStatusActive ? stream_of(stream).capture->id : 0);
  set(graph, nullptr);
  set(nodes, nullptr);
  set(edges, nullptr);
  set(count, 0);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (nodes != nullptr) {
    fail("cudaGraphGetNodes is faked for the count only");
  }
  *count = (*reinterpret_cast<std::shared_ptr<Graph>*>(graph))->nodes.size();
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  const auto& captured = *reinterpret_cast<std::shared_ptr<Graph>*>(graph);
  *exec = reinterpret_cast<cudaGraphExec_t>(new std::shared_ptr<Graph>(captured));
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  const auto graph = *reinterpret_cast<std::shared_ptr<Graph>*>(exec);
  log("cudaGraphLaunch");
  enqueue(stream_of(stream), graph->cost, [graph] {
    for (const auto& node : graph->nodes) {
      node();
    }
  });
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<std::shared_ptr<Graph>*>(graph);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete reinterpret_cast<std::shared_ptr<Graph>*>(exec);
  return cudaSuccess;
}

// The ATen ops that Python computes (aten.py)

/// Called before each op. 0 if work on the stream runs at once, 1 if it waits there, 2 if it is captured.
FAKE_EXPORT int fake_cuda_begin(int device, cudaStream_t stream) {
  const bool lazy = option("lazy") != 0;
  auto& found = stream == nullptr ? state().defaults[device] : stream_of(stream);
  const std::lock_guard lock(state().mutex);
  (found.capture ? found.capture->graph->cost : found.clock) += 1;
  return found.capture ? 2 : lazy || !found.queue.empty() ? 1 : 0;
}

FAKE_EXPORT void fake_cuda_enqueue(int device, cudaStream_t stream, void (*call)(int64_t), int64_t argument) {
  enqueue(stream == nullptr ? state().defaults[device] : stream_of(stream), 0, [=] { call(argument); });
}

FAKE_EXPORT void fake_cuda_finish(int device, cudaStream_t stream) {
  drain(stream == nullptr ? state().defaults[device] : stream_of(stream));
}
