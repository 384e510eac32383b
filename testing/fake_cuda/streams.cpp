// Streams and events.
//
// Work runs when it is put on a stream or, with the option `lazy`, when something waits for it. Then the stream runs
// its work in order, other streams run up to the events that it waits for, and nothing else runs.
#include "streams.h"

#include <algorithm>

namespace fake {
namespace {

/// The newest first: of two streams without a dependency, the order that a program is less likely to expect.
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

Event& event_of(cudaEvent_t event) { return *reinterpret_cast<Event*>(event); }

} // namespace

State& state() {
  static auto* state = new State;
  return *state;
}

/// Not under the lock, as work may call Python or wait for other streams.
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

} // namespace fake

using namespace fake;

// Streams

FAKE_EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) { return create(stream); }

FAKE_EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int) { return create(stream); }

FAKE_EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned int, int) { return create(stream); }

FAKE_EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  auto& found = stream_of(stream);
  drain(found);
  const std::lock_guard lock(state().mutex);
  state().created.erase(&found); // kept alive: events may point to it
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

FAKE_EXPORT cudaError_t
cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned int) {
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

FAKE_EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

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

/// By the streams' clocks, which advance by the costs of their work.
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
      // A stream that waits for captured work joins the capture. A total order of the nodes preserves every dependency.
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
