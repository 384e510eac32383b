// Streams, events, and the capture and replay of graphs.
//
// Work is done when it is put on a stream, or, with the option `lazy`, when something waits for it: then a stream runs its
// work in order, and up to an event of another stream that it waits for, but nothing else.
#include "fake.h"

#include <condition_variable>
#include <cstring>
#include <set>

namespace fake {
namespace {

struct Event {
  Stream* stream = nullptr; // where it was recorded last
  int64_t position = 0;     // how much of the stream's work it stands behind
  double clock = 0;
  std::shared_ptr<Capture> capture; // set if that was in a capture
  bool timed = true;
};

struct State {
  std::mutex mutex;
  std::condition_variable progress;
  Stream defaults[kDevices];
  std::set<Stream*> created;
  std::set<Capture*> captures;
  unsigned long long next_id = 1;

  State() {
    for (int device = 0; device < kDevices; ++device) {
      defaults[device].device = device;
    }
  }
};

State& state() {
  static auto* state = new State;
  return *state;
}

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

/// Runs what the stream holds, up to an item; not under the lock, as work may be Python's, or wait for other streams.
void drain(Stream& stream, int64_t position) {
  std::unique_lock lock(state().mutex);
  while (stream.done < position) {
    if (stream.busy) {
      state().progress.wait(lock);
      continue;
    }
    const Work work = std::move(stream.queue.front());
    stream.queue.pop_front();
    stream.busy = true;
    lock.unlock();
    work();
    lock.lock();
    stream.busy = false;
    ++stream.done;
    state().progress.notify_all();
  }
}

void drain(Stream& stream) {
  int64_t position = 0;
  {
    const std::lock_guard lock(state().mutex);
    position = stream.queued;
  }
  drain(stream, position);
}

/// The last made first: of two streams without a dependency, that is the order that a program is less likely to expect.
std::vector<Stream*> all_streams() {
  const std::lock_guard lock(state().mutex);
  std::vector<Stream*> streams(state().created.rbegin(), state().created.rend());
  for (auto& stream : state().defaults) {
    streams.push_back(&stream);
  }
  return streams;
}

cudaError_t create(cudaStream_t* stream) {
  auto* made = new Stream;
  made->device = current_device();
  const std::lock_guard lock(state().mutex);
  state().created.insert(made);
  *stream = reinterpret_cast<cudaStream_t>(made);
  return cudaSuccess;
}

Event& event_of(cudaEvent_t event) {
  return *reinterpret_cast<Event*>(event);
}

} // namespace

Stream& stream_of(cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy) {
    return state().defaults[current_device()];
  }
  auto* found = reinterpret_cast<Stream*>(stream);
  const std::lock_guard lock(state().mutex);
  if (state().created.count(found) == 0) {
    fail("a stream that does not exist");
  }
  return *found;
}

void enqueue(Stream& stream, double cost, Work work) {
  const int64_t lazy = option("lazy"), dry = option("dry");
  {
    const std::lock_guard lock(state().mutex);
    if (stream.capture) {
      stream.capture->graph->nodes.push_back(std::move(work));
      stream.capture->graph->cost += cost;
      return;
    }
    stream.clock += cost;
    if (dry) {
      return;
    }
    if (lazy || !stream.queue.empty()) {
      stream.queue.push_back(std::move(work));
      ++stream.queued;
      return;
    }
  }
  work();
}

bool is_unsafe_in_capture() {
  if (thread_mode == cudaStreamCaptureModeRelaxed) {
    return false;
  }
  const std::lock_guard lock(state().mutex);
  bool unsafe = false;
  for (Capture* capture : state().captures) {
    // A capture of another thread's in the mode "thread local" does not mind; that mode is not told apart here.
    if (capture->mode == cudaStreamCaptureModeGlobal) {
      capture->invalid = unsafe = true;
    }
  }
  return unsafe;
}

} // namespace fake

using namespace fake;

// Streams

FAKE_EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return create(stream);
}

FAKE_EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int) {
  return create(stream);
}

FAKE_EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned int, int) {
  return create(stream);
}

FAKE_EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  auto& found = stream_of(stream);
  drain(found);
  const std::lock_guard lock(state().mutex);
  state().created.erase(&found); // not deleted: events may point to it
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (is_unsafe_in_capture()) {
    return cudaErrorStreamCaptureUnsupported;
  }
  log("cudaStreamSynchronize");
  drain(stream_of(stream));
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
  auto& found = stream_of(stream);
  const std::lock_guard lock(state().mutex);
  return found.done == found.queued ? cudaSuccess : cudaErrorNotReady;
}

FAKE_EXPORT cudaError_t cudaDeviceSynchronize() {
  if (is_unsafe_in_capture()) {
    return cudaErrorStreamCaptureUnsupported;
  }
  for (Stream* stream : all_streams()) {
    if (stream->device == current_device()) {
      drain(*stream);
    }
  }
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaStreamAddCallback(
    cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned int
) {
  enqueue(stream_of(stream), 0, [=] { callback(stream, cudaSuccess, data); });
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  enqueue(stream_of(stream), 0, [=] { function(data); });
  return cudaSuccess;
}

// Events

FAKE_EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int flags) {
  auto* made = new Event;
  made->timed = (flags & cudaEventDisableTiming) == 0;
  *event = reinterpret_cast<cudaEvent_t>(made);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, 0);
}

FAKE_EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete &event_of(event);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  auto& recorded = event_of(event);
  auto& found = stream_of(stream);
  const std::lock_guard lock(state().mutex);
  recorded.stream = &found;
  recorded.position = found.queued;
  recorded.clock = found.clock;
  recorded.capture = found.capture;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned int) {
  return cudaEventRecord(event, stream);
}

FAKE_EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
  const auto& recorded = event_of(event);
  const std::lock_guard lock(state().mutex);
  if (recorded.capture) {
    return cudaErrorCapturedEvent;
  }
  return recorded.stream == nullptr || recorded.stream->done >= recorded.position ? cudaSuccess : cudaErrorNotReady;
}

FAKE_EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const auto recorded = event_of(event);
  if (recorded.capture) {
    return cudaErrorCapturedEvent;
  }
  if (is_unsafe_in_capture()) {
    return cudaErrorStreamCaptureUnsupported;
  }
  if (recorded.stream != nullptr) {
    drain(*recorded.stream, recorded.position);
  }
  return cudaSuccess;
}

/// By the clocks of the streams, which the costs of the work on them set.
FAKE_EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const auto &first = event_of(start), &second = event_of(end);
  if (!first.timed || !second.timed || first.stream == nullptr || second.stream == nullptr || first.capture ||
      second.capture || first.stream->device != second.stream->device) {
    return cudaErrorInvalidResourceHandle;
  }
  if (cudaEventQuery(start) != cudaSuccess || cudaEventQuery(end) != cudaSuccess) {
    return cudaErrorNotReady;
  }
  *milliseconds = static_cast<float>((second.clock - first.clock) / 1000);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int) {
  const auto recorded = event_of(event);
  auto& waiting = stream_of(stream);
  if (recorded.stream == nullptr) {
    return cudaSuccess;
  }
  {
    const std::lock_guard lock(state().mutex);
    if (recorded.capture) {
      // What waits for captured work takes part in the capture. An order of all nodes holds every dependency.
      if (waiting.capture && waiting.capture != recorded.capture) {
        return cudaErrorStreamCaptureMerge;
      }
      if (state().captures.count(recorded.capture.get()) != 0) {
        waiting.capture = recorded.capture;
      }
      return cudaSuccess;
    }
    if (waiting.capture) {
      return cudaErrorStreamCaptureIsolation;
    }
    waiting.clock = std::max(waiting.clock, recorded.clock);
  }
  enqueue(waiting, 0, [recorded] { drain(*recorded.stream, recorded.position); });
  return cudaSuccess;
}

// Graphs

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
  *status = !found.capture            ? cudaStreamCaptureStatusNone
            : found.capture->invalid ? cudaStreamCaptureStatusInvalidated
                                     : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

/// Without nodes: what torch does with them is not done by default.
FAKE_EXPORT cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream,
    cudaStreamCaptureStatus* status,
    unsigned long long* id,
    cudaGraph_t* graph,
    const cudaGraphNode_t** nodes,
    const cudaGraphEdgeData** edges,
    size_t* count
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

// For the ATen ops that Python computes (aten.py)

/// Before each of them. Whether work on the stream is not done at once: 1 if it waits there, 2 if it is captured.
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
