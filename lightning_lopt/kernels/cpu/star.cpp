// The fused step of STAR on the CPU; star.py builds and calls it. The maths is that of rules/star.py and
// rules/features.py and is tested against it; the names are theirs.
//
// Three passes over a tensor, because the features are normalized over the whole of it:
//   A  sums of squared gradients per row and column -> factored second moments
//   B  the mean squares of the 16 dense features
//   C  the network, the new value, the new momenta
// Before them, where the rule centers gradients, their rows' means.
// Between them only vectors (per row, per column) and 16 numbers are kept: features are computed again, never stored.
//
// A contiguous tensor is seen as [A, X, B, Y, C], X and Y being the two factored dims in memory order. A "line" is the
// contiguous run (Y, C); "left" vectors (A, X, B, C) are constant along Y, "right" vectors (A, B, Y, C) along X.
// A tensor below two dims (A = 0) has a diagonal second moment instead: one left value for each coordinate.
//
// All sums run over fixed blocks in a fixed order: results do not depend on the number of threads.

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "simd_pairs.h"
#include "star_network.h"
#include "star_schedule.h"

namespace {

// Asks for what is needed AHEAD coordinates later: there are more streams than the processor finds out about by itself.
template <int AHEAD, int LEVEL>
__attribute__((always_inline)) inline void fetch(const Part& t, int64_t at, int n) {
  for (int i = 0; i < n; i += LANES) {
    int64_t next = at + AHEAD + i;
    __builtin_prefetch(t.grad + next, 0, LEVEL), __builtin_prefetch(t.param + next, 0, LEVEL);
    for (int k = 0; k < 3; k++) __builtin_prefetch(t.exp_avg + k * t.size + next, 0, LEVEL);
    __builtin_prefetch(t.exp_avg_sq + next, 0, LEVEL);
  }
}

// Sums of squares of the dense features; without heads those that the scheduler reads, and the second moment's, which
// tell whether all is finite. Products of squares are less work than squares of products, and need no root.
template <bool heads>
void moments(Work& w, int64_t block) {
  Expanded room;
  const Rule rule = w.rule;
  const Part t = w.part;
  const VI flip = flipping(w.scalars.sign);
  V totals[DENSE] = {};
  int64_t end = std::min(t.size, (block + 1) * BLOCK);
  for (Run run{block * BLOCK, 0, {}, {}, {}, {}}; run.at < end; run.at += run.n) {
    run = run_at<heads>(w, run.at, end, room, false);
    V scaled[6] = {};  // sums of squares that lack the run's factor
    auto add = [&](int i, int n) {
      fetch<2048, 2>(t, run.at + i, n);
      Coordinates<V> c(rule, t, flip, run, i, n);
      V root = 1.0f / (c.second + EPS);  // its square
      totals[1] += c.param * c.param;
      if (!heads) totals[5] += c.second;
      for (int k = 0; !heads && k < 3; k++) totals[6 + k] += c.momentum[k] * c.momentum[k] * root;
      if (!heads) return;
      if (n < LANES) root = head_of(root, n);  // the one feature that zeros do not make zero
      V square = c.grad * c.grad;
      totals[0] += square, totals[5] += c.second * c.second, totals[9] += root;
      for (int k = 0; k < 3; k++) {
        auto get = [&](const float* p) { return n == LANES ? load(p + i) : some(p + i, n); };
        V g = get(run.grad_root[k]), m = t.A ? g : get(run.momentum_root[k]), moment = c.momentum[k] * c.momentum[k];
        V of_g = g * g, of_m = t.A ? of_g : m * m;
        totals[2 + k] += moment, totals[6 + k] += moment * root;
        scaled[k] += square * of_g, scaled[3 + k] += moment * of_m;
      }
    };
    int i = 0;
    for (; i + LANES <= run.n; i += LANES) add(i, LANES);
    if (i < run.n) add(i, run.n - i);
    for (int k = 0; heads && k < 3; k++) {
      float square = run.left_root[k] * run.left_root[k];
      totals[10 + k] += scaled[k] * square, totals[13 + k] += scaled[3 + k] * square;
    }
  }
  for (int f = 0; f < DENSE; f++) w.partial[block * DENSE + f] = sum(totals[f]);
}

// Whether no new value can leave the range: no coordinate is larger than the root of its block's sum of squares, and
// from there on the network is bounded layer by layer. Where this cannot be told, pass C is run once without writing.
bool proves_finite(const Work& w) {
  double x[DENSE], h[HIDDEN], next[HIDDEN], head[HEADS];
  const Rule& rule = w.rule;
  const bool adaptive = rule.nominal_root && rule.direction[0] == 0;
  if (!rule.needs_heads && !(rule.scheduled && adaptive)) return false;
  for (int f = 0; f < DENSE; f++) {
    double high = 0;
    for (int64_t b = 0; b < w.blocks; b++) {
      double s = w.partial[b * DENSE + f];
      if (!(s < INFINITY)) return false;
      high = std::max(high, s);
    }
    x[f] = 1.01 * std::sqrt(high) + 1e-22;  // squares below the smallest float are lost
  }
  double direction = std::fabs(rule.direction[0]) * x[0];
  for (int k = 0; k < 3; k++)
    direction += std::fabs(w.momenta[k]) * (adaptive ? x[6 + k] : x[2 + k] * (rule.nominal_root ? x[9] : 1));
  const Scalars& s = w.scalars;
  auto bounded = [&](double change) {
    return 1.01 * (x[1] + std::fabs(s.scale) * change + std::fabs(s.decay) * x[1]) < std::min<double>(s.limit, 1e38);
  };
  if (!rule.needs_heads) return bounded(std::fabs(w.factor) * rule.nominal * direction + rule.weight_decay * x[1]);
  for (int j = 0; j < HIDDEN; j++) {
    h[j] = w.widest[j];
    for (int f = 0; f < DENSE; f++) h[j] += std::fabs((double)w.weights[f][j]) * x[f];
  }
  for (int number = 1; number <= LAYERS; number++) {
    int outputs = number < LAYERS ? HIDDEN : HEADS;
    const float* weight = deeper(rule) + (number - 1) * (HIDDEN + 1) * HIDDEN;
    for (int o = 0; o < outputs; o++) {
      double s = std::fabs(weight[HIDDEN * outputs + o]);
      for (int j = 0; j < HIDDEN; j++) s += std::fabs((double)weight[j * outputs + o]) * h[j];
      (number < LAYERS ? next : head)[o] = s;
    }
    if (number < LAYERS) std::copy(next, next + HIDDEN, h);
  }
  auto magnitude = [&](int k) { return k + 1 < HEADS ? std::exp(std::fabs(rule.exp_mult[k]) * head[k + 1]) : 1.0; };
  double blackbox = rule.step_mult * head[0] * magnitude(0) * (rule.selfnormalize ? std::fabs(w.mean_grad) : 1);
  return bounded(std::fabs(w.factor) * blackbox * (rule.blackbox_root ? x[9] : 1) +
                 std::fabs(w.factor) * rule.nominal * magnitude(1) * direction + rule.weight_decay * magnitude(2) * x[1]);
}

void fold(Work& w) {
  float means[4];
  for (int f = 0; f < DENSE; f++) {
    double total = 0;
    for (int64_t b = 0; b < w.blocks; b++) total += w.partial[b * DENSE + f];
    if (f == 1) means[0] = (float)(total / w.part.size);
    if (f >= 6 && f < 9) means[f - 5] = (float)(total / w.part.size);
    float scale = inverse_rms(total, w.part.size);
    for (int j = 0; w.rule.needs_heads && j < HIDDEN; j++)
      w.weights[f][j] = w.rule.weights[DENSE_ROWS[f] * HIDDEN + j] * scale;
  }
  if (w.rule.scheduled) schedule(w, means);
}

// Write; sum the step's squares; whether all is finite; sum the heads. One of them alone writes, so that a step has the
// same bits whether it is also measured or not: the compiler rounds each mode as it likes.
enum Mode { WRITE, MEASURE, CHECK, AVERAGE };

template <Mode mode, bool heads>
void apply(Work& w, int64_t block) {
  Expanded room;
  const Rule rule = w.rule;
  const Part t = w.part;
  const Scalars s = w.scalars;
  float weights[DENSE][HIDDEN], later[DEEPER];
  std::memcpy(weights, w.weights, sizeof weights);
  std::memcpy(later, deeper(rule), sizeof later);
  float exp_mult[3];  // a magnitude of the whole tensor is a factor
  float constant[3] = {rule.step_mult, rule.nominal, rule.weight_decay};
  for (int k = 0; k < 3; k++) {
    exp_mult[k] = rule.aggregate[k] || k + 1 >= HEADS ? 0 : rule.exp_mult[k];
    if (heads && rule.aggregate[k] && k + 1 < HEADS) constant[k] *= std::exp(rule.exp_mult[k] * w.head_means[k + 1]);
  }
  if (rule.selfnormalize) constant[0] *= w.mean_grad;
  constant[0] *= w.factor, constant[1] *= w.factor;
  for (int j = 0; mode != AVERAGE && j <= HIDDEN; j++) {  // factors of the heads go into the last layer
    float* weight = later + DEEPER - (HIDDEN + 1) * HEADS + j * HEADS;
    weight[0] *= constant[0];
    for (int o = 1; o < HEADS; o++) weight[o] *= exp_mult[o - 1];
  }
  const VI flip = flipping(s.sign);
  const bool both_by_root = mode == WRITE && rule.blackbox_root && rule.nominal_root;
  float by_grad = rule.direction[0] * constant[1], by_momentum[3];
  for (int k = 0; k < 3; k++) by_momentum[k] = w.momenta[k] * constant[1];
  const float kept = 1 - w.caution;  // of a nominal step that would climb
  V outside = {}, sums[4] = {}, head_sums[HEADS] = {};
  int64_t end = std::min(t.size, (block + 1) * BLOCK);
  for (Run run{block * BLOCK, 0, {}, {}, {}, {}}; run.at < end; run.at += run.n) {
    run = run_at<heads>(w, run.at, end, room, true);
    for (int k = 0; heads && k < 3; k++)  // what is constant along the run goes into the weights
      for (int j = 0; j < HIDDEN; j++) {
        weights[10 + k][j] = w.weights[10 + k][j] * run.left_root[k];
        weights[13 + k][j] = w.weights[13 + k][j] * run.left_root[k];
      }
    auto move = [&](auto kind, int i, int n) {
      using T = decltype(kind);
      int64_t at = run.at + i;
      fetch<128, 3>(t, at, n);
      Coordinates<T> c(rule, t, flip, run, i, n);
      T root = inverse_root(c.second + EPS), head[4] = {};
      if (heads) {
        T h[HIDDEN];
        for (int j = 0; j < HIDDEN; j++) h[j] = get<T>(run.hidden[j] + i, n) + run.left_hidden[j];
        first_layer(c, root, run, i, n, reread(weights[0]), h);
        later_layers(reread(later), rule.heads, h, head);
      }
      if constexpr (mode == AVERAGE) {
        for (int o = 0; o < HEADS; o++) head_sums[o] += n == LANES ? head[o] : head_of(head[o], n);
        return;
      }
      T blackbox = {}, decay = {}, nominal = c.momentum[0] * by_momentum[0];
      nominal += c.momentum[1] * by_momentum[1];
      nominal += c.momentum[2] * by_momentum[2];
      if (by_grad != 0) nominal += c.grad * by_grad;
      if (kept != 1) nominal = held_back(nominal, c.grad, kept);
      if (heads && rule.heads[0]) {
        blackbox = head[0];
        if (exp_mult[0] != 0) blackbox *= magnitude_of(head[1]);
        if (rule.blackbox_root && !both_by_root) blackbox *= root;
      }
      if (heads && exp_mult[1] != 0) nominal *= magnitude_of(head[2]);
      if (rule.nominal_root && !both_by_root) nominal *= root;
      T change = blackbox + nominal;
      if (both_by_root) change *= root;
      if (rule.weight_decay != 0) {
        decay = c.param * constant[2];
        if (heads && exp_mult[2] != 0) decay *= magnitude_of(head[3]);
        change += decay;
      }
      T value = c.param - change * s.scale;
      if (s.decay != 0) value -= c.param * s.decay;
      if constexpr (mode == CHECK) {
        V far = value > 0 ? value : -value;
        V rest = (c.second + c.momentum[0] + c.momentum[1] + c.momentum[2]) * 0.0f;
        outside += (far < s.limit ? V{} : each(1)) + rest;
      }
      if constexpr (mode == MEASURE) {
        change = value - c.param;
        if (n < LANES) blackbox = head_of(blackbox, n), change = head_of(change, n);  // of zeros it does not make zeros
        sums[0] += change * change;
        sums[1] += blackbox * blackbox, sums[2] += nominal * nominal, sums[3] += decay * decay;
      }
      if constexpr (mode == WRITE) {
        set(t.param + at, value, n), set(t.exp_avg_sq + at, c.second, n);
        for (int k = 0; k < 3; k++) set(t.exp_avg + k * t.size + at, c.momentum[k], n);
      }
    };
    int i = 0;
    if constexpr (mode == WRITE && heads && PAIRS)
      for (; i + Two::SIZE <= run.n; i += Two::SIZE) move(Two{}, i, Two::SIZE);
    for (; i + LANES <= run.n; i += LANES) move(V{}, i, LANES);
    if (i < run.n) move(V{}, i, run.n - i);
  }
  if (mode == CHECK) w.block_finite[block] = sum(outside) == 0;
  for (int k = 0; mode == MEASURE && k < 4; k++) w.squares[block * 4 + k] = sum(sums[k]);
  for (int o = 0; mode == AVERAGE && o < HEADS; o++) w.head_sums[block * HEADS + o] = sum(head_sums[o]);
}

template <Mode mode>
void apply(Work& w, int64_t block) {
  w.rule.needs_heads ? apply<mode, true>(w, block) : apply<mode, false>(w, block);
}

// Threads

// Threads that all run the same function: each takes every n-th task, and all wait for each other after the last.
struct Team {
  int size, waiting = 0, round = 0;
  std::mutex mutex;
  std::condition_variable woken;

  void wait() {
    if (size == 1) return;
    std::unique_lock<std::mutex> lock(mutex);
    if (++waiting == size) {
      waiting = 0, round++;
      woken.notify_all();
    } else {
      int now = round;
      woken.wait(lock, [&] { return round != now; });
    }
  }

  template <typename Task>
  void each(int member, int64_t tasks, Task task) {
    for (int64_t i = member; i < tasks; i += size) task(i);
    wait();
  }

  template <typename Task>
  void once(int member, Task task) {
    if (member == 0) task();
    wait();
  }
};

// Passes A and B of one tensor, by a whole team: every member runs this, with the same Work.
void look(Team& team, int member, Work& w) {
  if (float share = centering(w)) {
    team.once(member, [&] { w.fan_in = w.part.size / w.part.rows, w.row_means.resize(w.part.rows); });
    int64_t tasks = (w.part.rows + rows_at_once(w) - 1) / rows_at_once(w);
    team.each(member, tasks, [&](int64_t i) { average_rows(w, i, share); });
  }
  if (w.part.A) team.each(member, w.row_blocks, [&](int64_t i) { sum_squares(w, i); });
  team.once(member, [&] { vectors(w); });
  if (!w.rule.needs_heads && !w.rule.scheduled) return;
  team.each(member, w.blocks, [&](int64_t i) { w.rule.needs_heads ? moments<true>(w, i) : moments<false>(w, i); });
  team.once(member, [&] { fold(w); });
}

// Pass C, after looks with nothing written where a mean of the network's outputs, the safeguard or a measurement asks
// for one.
void move(Team& team, int member, Work& w, double* squares) {
  const Rule& rule = w.rule;
  const Part& t = w.part;
  if (rule.aggregate[0] || rule.aggregate[1] || rule.aggregate[2]) {
    team.each(member, w.blocks, [&](int64_t i) { apply<AVERAGE>(w, i); });
    team.once(member, [&] {
      for (int o = 0; o < HEADS; o++) {
        double total = 0;
        for (int64_t b = 0; b < w.blocks; b++) total += w.head_sums[b * HEADS + o];
        w.head_means[o] = (float)(total / t.size);
      }
    });
  }
  bool skip = rule.safeguard && !w.finite;
  if (rule.safeguard && !skip) {
    team.once(member, [&] { w.proven = proves_finite(w); });
    if (!w.proven) {
      team.each(member, w.blocks, [&](int64_t i) { apply<CHECK>(w, i); });
      skip = !std::all_of(w.block_finite.begin(), w.block_finite.end(), [](uint8_t ok) { return ok; });
    }
  }
  if (!skip && rule.measure) team.each(member, w.blocks, [&](int64_t i) { apply<MEASURE>(w, i); });
  if (!skip) team.each(member, w.blocks, [&](int64_t i) { apply<WRITE>(w, i); });
  team.once(member, [&] {
    if (rule.safeguard) *t.skipped += skip, *t.skipped_in_row = skip ? *t.skipped_in_row + 1 : 0;
    if (skip) return;
    *t.step += 1;
    std::copy(w.left.begin(), w.left.end(), t.left);
    std::copy(w.right.begin(), w.right.end(), t.right);
    for (int64_t i = 0; rule.measure && i < 4 * w.blocks; i++) squares[i % 4] += w.squares[i];
  });
}

}  // namespace

// Moves `count` tensors, each through all passes while it lies in the cache; with `measure` adds up the squares of
// change, blackbox, nominal and decay, 4 for each tensor.
extern "C" void star_step(const Rule* rule, const Part* parts, const Scalars* scalars, double* squares, int64_t count) {
  std::vector<int64_t> alone, shared;
  int64_t total = 0;
  for (int64_t i = 0; i < count; i++) (parts[i].size <= ALONE ? alone : shared).push_back(i), total += parts[i].size;
  Team team, solo;
  team.size = (int)std::max<int64_t>(1, std::min<int64_t>(rule->threads, total / ALONE)), solo.size = 1;
  std::vector<std::unique_ptr<Work>> works(count);
  auto step = [&](Team& by, int member, int64_t i) {
    by.once(member, [&] { works[i] = std::make_unique<Work>(*rule, parts[i], scalars[i]); });
    look(by, member, *works[i]);
    move(by, member, *works[i], squares + 4 * i);
    by.once(member, [&] { works[i].reset(); });
  };
  auto run = [&](int member) {
    team.each(member, (int64_t)alone.size(), [&](int64_t k) { step(solo, 0, alone[k]); });
    for (int64_t i : shared) step(team, member, i);
  };
  std::vector<std::thread> others;
  for (int member = 1; member < team.size; member++) others.emplace_back(run, member);
  run(0);
  for (auto& other : others) other.join();
}
