// Independent tasks, shared among threads by work stealing.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace tasks {

// Tasks next to each other: the first one that nobody has begun, and the one behind the last.
struct Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// The tasks that a thread does: those of its own share, then what is left of the others'. Neighbours stay on one core:
// their rows lie next to each other, and two cores that write there get into each other's way.
class Tasks {
 public:
  Tasks(std::vector<Share>& shares, int64_t own) : shares_(shares), own_(own) {}

  // Begins a task that nobody has begun; false if there is none.
  bool next(int64_t& task) {
    for (; visited_ < shares_.size(); visited_++) {
      Share& share = shares_[(own_ + visited_) % shares_.size()];
      task = share.next++;
      if (task < share.end) return true;
    }
    return false;
  }

 private:
  std::vector<Share>& shares_;
  size_t own_, visited_ = 0;
};

// Calls work(tasks), at once on several threads or only on this one. Each of the numbers below `count` comes up once
// over all calls; what comes out must not depend on where. With fixed shares, all would wait for the slowest core.
template <class Work>
void in_parallel(int64_t count, const Work& work) {
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; i++) shares[i].next = i * count / threads, shares[i].end = (i + 1) * count / threads;
  at::parallel_for(0, threads, 1, [&](int64_t own, int64_t) { work(Tasks(shares, own)); });
}

}  // namespace tasks
