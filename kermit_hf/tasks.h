// Independent tasks, shared among threads.

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

// The numbers of the tasks that a thread does, to be looped over: its own share, then what others have not begun.
class Tasks {
 public:
  Tasks(std::vector<Share>& shares, int64_t own) : shares_(shares), own_(own) {}

  struct End {};
  class Iterator {
   public:
    explicit Iterator(const Tasks& tasks) : tasks_(tasks) { ++*this; }
    int64_t operator*() const { return task_; }
    bool operator!=(End) const { return visited_ < tasks_.shares_.size(); }
    void operator++() {
      for (; *this != End(); visited_++) {
        Share& share = tasks_.shares_[(tasks_.own_ + visited_) % tasks_.shares_.size()];
        task_ = share.next++;
        if (task_ < share.end) return;
      }
    }

   private:
    const Tasks& tasks_;
    size_t visited_ = 0;
    int64_t task_ = 0;
  };
  Iterator begin() const { return Iterator(*this); }
  End end() const { return {}; }

 private:
  std::vector<Share>& shares_;
  size_t own_;
};

// Calls work(tasks) on each thread. With nothing but their shares, all threads would wait for the slowest core.
template <class Work>
void in_parallel(int64_t count, const Work& work) {
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; i++) shares[i].next = i * count / threads, shares[i].end = (i + 1) * count / threads;
  at::parallel_for(0, threads, 1, [&](int64_t own, int64_t) { work(Tasks(shares, own)); });
}

}  // namespace tasks
