// One step of many tensors on several threads, for any rule: addresses, step counters, teams of threads.
//
// A step makes several passes over each tensor, because a tensor's multipliers depend on means over all of it. All sums
// run over fixed blocks in a fixed order, so results do not depend on the number of threads.

#pragma once

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "simd.h"

// COLUMNS, the order in which tensors.py passes the addresses of a tensor's arrays, and EPSILON, what is added to the
// second moment before its root, are set by the Python module.

namespace {

constexpr Real EPS = EPSILON;
constexpr int CHUNK = 1024;            // coordinates whose temporary vectors fit into the first-level cache
constexpr int64_t BLOCK = 16 * CHUNK;  // coordinates that a thread takes at a time
constexpr int64_t ALONE = 2 * BLOCK;   // tensors up to this size are moved by one thread

enum Column { COLUMNS, NUM_COLUMNS };
enum Scalar { SCALE, DECAY, SIGN, NUM_SCALARS };

struct Common {  // what every rule has; first in its struct, as in tensors.py
  Real momentum[3], rms;
  Real nominal;    // step size of the nominal term
  Real num_steps;  // 0 where it is unknown
  int32_t safeguard, measure;
  int32_t threads;
};

// One tensor: where its arrays are, and how its step is scaled.
struct Tensor {
  Real* param;
  const Real* grad;
  Real *exp_avg, *exp_avg_sq;
  int64_t* step;  // updates made so far
  int64_t *skipped, *skipped_in_row;  // null without safeguard
  Real scale, decay, sign;
  Real limit;  // values from here on are rounded to infinity
  int64_t size;
};

// A step's tensors: of each column, and of each scalar, the values of all tensors follow each other.
struct Arguments {
  void* const* addresses;
  const Real* scalars;
  double* squares;
  int64_t count;
  Real* const* targets;
};

Tensor tensor_at(const Common& rule, const Arguments& given, int64_t size, Real limit, int64_t i) {
  auto address = [&](Column column) { return given.addresses[column * given.count + i]; };
  auto numbers = [&](Column column) { return static_cast<Real*>(address(column)); };
  auto counter = [&](Column column) { return static_cast<int64_t*>(address(column)); };
  Tensor t;
  t.param = numbers(PARAM);
  t.grad = numbers(GRAD);
  t.exp_avg = numbers(EXP_AVG);
  t.exp_avg_sq = numbers(EXP_AVG_SQ);
  t.step = counter(STEP);
  t.skipped = rule.safeguard ? counter(SKIPPED) : nullptr;
  t.skipped_in_row = rule.safeguard ? counter(SKIPPED_IN_ROW) : nullptr;
  t.scale = given.scalars[SCALE * given.count + i];
  t.decay = given.scalars[DECAY * given.count + i];
  t.sign = given.scalars[SIGN * given.count + i];
  t.limit = limit;
  t.size = size;
  return t;
}

// Counts a step that was taken, or skipped by the safeguard.
void count_step(const Common& rule, const Tensor& t, bool skip) {
  if (rule.safeguard) {
    *t.skipped += skip;
    *t.skipped_in_row = skip ? *t.skipped_in_row + 1 : 0;
  }
  if (!skip) *t.step += 1;
}

// Prefetches what is needed AHEAD coordinates later: there are more streams than the processor detects by itself.
template <int AHEAD, int LEVEL>
__attribute__((always_inline)) inline void prefetch(const Tensor& t, int64_t at, int n) {
  for (int i = 0; i < n; i += LANES) {
    int64_t next = at + AHEAD + i;
    __builtin_prefetch(t.grad + next, 0, LEVEL);
    __builtin_prefetch(t.param + next, 0, LEVEL);
    for (int k = 0; k < 3; k++) __builtin_prefetch(t.exp_avg + k * t.size + next, 0, LEVEL);
    __builtin_prefetch(t.exp_avg_sq + next, 0, LEVEL);
  }
}

// The bits that change a gradient's sign where it is to be ascended.
inline VI sign_bits(Real sign) { return VI{} + (sign < 0 ? std::numeric_limits<Bits>::min() : 0); }

// Threads

// Threads that all run the same function, and wait for each other between passes.
class Team {
 public:
  int size = 1;

  // Each member takes every n-th task. The last to finish runs `last`, then all go on.
  template <typename Task, typename Last>
  void each(int member, int64_t tasks, Task task, Last last) {
    for (int64_t i = member; i < tasks; i += size) task(i);
    meet(last);
  }

  template <typename Task>
  void each(int member, int64_t tasks, Task task) {
    each(member, tasks, task, [] {});
  }

  // The same tasks, each member's last one first.
  template <typename Task, typename Last>
  void each_backwards(int member, int64_t tasks, Task task, Last last) {
    for (int64_t i = tasks - 1 - (tasks - 1 - member + size) % size; i >= 0; i -= size) task(i);
    meet(last);
  }

  template <typename Last>
  void once(Last last) {
    meet(last);
  }

  // Members that were started wait here until it is known how many there are.
  void wait_for_start() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return started; });
  }

  void start(int members) {
    std::lock_guard<std::mutex> lock(mutex);
    size = members;
    started = true;
    changed.notify_all();
  }

 private:
  template <typename Last>
  void meet(Last last) {
    if (size == 1) return last();
    std::unique_lock<std::mutex> lock(mutex);
    if (++waiting == size) {
      last();
      waiting = 0;
      round++;
      changed.notify_all();
    } else {
      const int now = round;
      changed.wait(lock, [&] { return round != now; });
    }
  }

  int waiting = 0, round = 0;
  bool started = false;
  std::mutex mutex;
  std::condition_variable changed;
};

// Moves all tensors, small ones by one thread each, then large ones by all threads together. `Work` is the memory that
// the passes over a tensor need, and `move(team, member, work, item)` makes these passes.
//
// All memory is allocated before the first tensor is written: a step that runs out of memory has changed nothing. Where
// the system refuses more threads, those that there are do the work.
template <typename Work, typename Rule, typename Item>
void step_all(const Rule& rule, const std::vector<Item>& items) {
  std::vector<const Item*> alone, shared;
  int64_t total = 0;
  for (const Item& item : items) {
    (item.tensor.size <= ALONE ? alone : shared).push_back(&item);
    total += item.tensor.size;
  }
  const int wanted = (int)std::max<int64_t>(1, std::min<int64_t>(rule.threads, total / ALONE));
  std::vector<Work> own(wanted, Work(rule));
  Work common(rule);
  for (const Item* item : shared) common.reserve(*item);
  for (Work& work : own)
    for (const Item* item : alone) work.reserve(*item);
  std::vector<std::thread> others;
  others.reserve(wanted - 1);

  Team team, solo;
  auto run = [&](int member) {
    for (size_t i = member; i < alone.size(); i += team.size) move(solo, 0, own[member], *alone[i]);
    for (const Item* item : shared) move(team, member, common, *item);
  };
  try {
    for (int member = 1; member < wanted; member++)
      others.emplace_back([&, member] {
        team.wait_for_start();
        run(member);
      });
  } catch (const std::exception&) {
  }
  team.start(1 + (int)others.size());
  run(0);
  for (std::thread& other : others) other.join();
}

enum Outcome : int32_t { DONE, NO_MEMORY, FAILED };

// Runs a step from C: no exception may leave it.
template <typename Step>
int32_t outcome_of(Step step) {
  try {
    step();
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  } catch (...) {
    return FAILED;
  }
}

}  // namespace
