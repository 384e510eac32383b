// Shared by streams, events and graphs.
#pragma once

#include "fake.h"

#include <condition_variable>
#include <mutex>
#include <set>

namespace fake {

struct Event {
  Stream* stream = nullptr; // of the last record
  int64_t position = 0;     // number of the stream's items before it
  double clock = 0;
  std::shared_ptr<Capture> capture; // set if recorded in a capture
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

/// Runs the stream's work, up to an item or all of it.
void drain(Stream& stream, int64_t position);
void drain(Stream& stream);

} // namespace fake
