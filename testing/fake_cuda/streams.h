// What streams, events and graphs share.
#pragma once

#include "fake.h"

#include <condition_variable>
#include <mutex>
#include <set>

namespace fake {

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

State& state();

/// Runs what the stream holds, up to an item, or all of it.
void drain(Stream& stream, int64_t position);
void drain(Stream& stream);

} // namespace fake
