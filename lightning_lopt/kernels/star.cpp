// The fused step of STAR on the CPU; cpu.py builds and calls it. The maths is that of rules/star.py and
// rules/features.py and is tested against it; the names are theirs.
//
// Three passes over a tensor, because the features are normalized over the whole of it:
//   A  sums of squared gradients per row and column -> factored second moments
//   B  the mean squares of the 16 dense features
//   C  the network, the new value, the new momenta
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

#include "star_vectors.h"

namespace {

// LANES coordinates: what they are given, what their accumulators become, and their features.
struct Coordinates {
  V grad, param, momentum[3], second, root;

  inline Coordinates(const Rule& rule, const Part& t, float sign, int64_t at, int n) {
    auto get = [&](const float* p) { return n == LANES ? load(p + at) : load(p + at, n); };
    grad = get(t.grad) * sign, param = get(t.param);
    for (int k = 0; k < 3; k++)
      momentum[k] = get(t.exp_avg + k * t.size) * rule.momentum[k] + grad * (1 - rule.momentum[k]);
    second = get(t.exp_avg_sq) * rule.rms + grad * (1 - rule.rms) * grad;
    root = inverse_root(second + EPS);
  }
};

inline void dense(const Coordinates& c, const Expanded& e, const float (*momentum_root)[CHUNK], int i, V* x) {
  x[0] = c.grad, x[1] = c.param, x[5] = c.second, x[9] = c.root;
  for (int k = 0; k < 3; k++) {
    V g = load(e.grad_root[k] + i), m = load(momentum_root[k] + i);
    x[2 + k] = c.momentum[k], x[6 + k] = c.momentum[k] * c.root;
    x[10 + k] = c.grad * g, x[13 + k] = c.momentum[k] * m;
  }
}

void moments(Work& w, int64_t block) {
  Expanded e;
  auto momentum_root = w.part.A ? e.grad_root : e.momentum_root;
  const Rule rule = w.rule;
  double* total = w.partial.data() + block * DENSE;
  float* largest = w.largest.data() + block * DENSE;
  int64_t end = std::min(w.part.size, (block + 1) * BLOCK);
  for (int64_t start = block * BLOCK; start < end; start += CHUNK) {
    int n = (int)std::min<int64_t>(CHUNK, end - start);
    expand(w, start, n, e, false);
    V sums[DENSE] = {}, x[DENSE];
    for (int i = 0; i < n; i += LANES) {
      int m = std::min(LANES, n - i);
      Coordinates c(rule, w.part, w.scalars.sign, start + i, m);
      for (int lane = m; lane < LANES; lane++) c.root[lane] = 0;  // the one feature that zeros do not make zero
      dense(c, e, momentum_root, i, x);
      for (int f = 0; f < DENSE; f++) sums[f] += x[f] * x[f];
    }
    for (int f = 0; f < DENSE; f++) {
      float s = sum(sums[f]);
      total[f] += s;
      largest[f] = s > largest[f] || s != s ? s : largest[f];
    }
  }
}

constexpr int DEEPER = (LAYERS - 1) * (HIDDEN + 1) * HIDDEN + (HIDDEN + 1) * HEADS;  // weights after the first layer's

const float* deeper(const Rule& rule) { return rule.weights + (FEATURES + 1) * HIDDEN; }

// Whether no new value can leave the range: no coordinate is larger than the root of its chunk's sum of squares, and
// from there on the network is bounded layer by layer. Where this cannot be told, pass C is run once without writing.
bool proves_finite(const Work& w) {
  double x[DENSE], h[HIDDEN], next[HIDDEN], head[HEADS];
  const Rule& rule = w.rule;
  for (int f = 0; f < DENSE; f++) {
    float high = 0;
    for (int64_t b = 0; b < w.blocks; b++) {
      float s = w.largest[b * DENSE + f];
      if (!(s < INFINITY)) return false;
      high = std::max(high, s);
    }
    x[f] = 1.01 * std::sqrt((double)high) + 1e-22;  // squares below the smallest float are lost
  }
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
  const Scalars& s = w.scalars;
  double direction = std::fabs(rule.direction) * x[0];
  for (int k = 0; k < 3; k++) direction += std::fabs(s.momenta[k]) * x[2 + k];
  double blackbox = rule.step_mult * head[0] * magnitude(0) * (rule.selfnormalize ? std::fabs(w.mean_grad) : 1);
  double change = std::fabs(s.factor) * blackbox * (rule.blackbox_root ? x[9] : 1) +
                  std::fabs(s.factor) * rule.nominal * magnitude(1) * direction * (rule.nominal_root ? x[9] : 1) +
                  rule.weight_decay * magnitude(2) * x[1];
  double bound = x[1] + std::fabs(s.scale) * change + std::fabs(s.decay) * x[1];
  return 1.01 * bound < std::min<double>(s.limit, 1e38);  // false for NaN
}

void fold(Work& w) {
  for (int f = 0; f < DENSE; f++) {
    double total = 0;
    for (int64_t b = 0; b < w.blocks; b++) total += w.partial[b * DENSE + f];
    if (f == 1) w.means[0] = (float)(total / w.part.size);
    if (f >= 6 && f < 9) w.means[f - 5] = (float)(total / w.part.size);
    float scale = inverse_rms(total, w.part.size);
    for (int j = 0; j < HIDDEN; j++) w.weights[f][j] = w.rule.weights[DENSE_ROWS[f] * HIDDEN + j] * scale;
  }
}

inline void network(const float (&weights)[DENSE][HIDDEN], const float (&later)[DEEPER], const V* x, const Expanded& e,
                    int i, V* head) {
  V h[HIDDEN], next[HIDDEN];
  for (int j = 0; j < HIDDEN; j++) h[j] = load(e.hidden[j] + i);
  for (int f = 0; f < DENSE; f++)
    for (int j = 0; j < HIDDEN; j++) h[j] += x[f] * weights[f][j];
  for (int number = 1; number <= LAYERS; number++) {
    int outputs = number < LAYERS ? HIDDEN : HEADS;
    const float* weight = later + (number - 1) * (HIDDEN + 1) * HIDDEN;
    V* out = number < LAYERS ? next : head;
    for (int o = 0; o < outputs; o++) out[o] = each(weight[HIDDEN * outputs + o]);
    for (int j = 0; j < HIDDEN; j++) {
      V r = relu(h[j]);
      for (int o = 0; o < outputs; o++) out[o] += r * weight[j * outputs + o];
    }
    if (number < LAYERS)
      for (int j = 0; j < HIDDEN; j++) h[j] = next[j];
  }
}

enum Mode { WRITE, MEASURE, CHECK, AVERAGE };  // write; the same and sum squares; whether all is finite; heads' sums

template <Mode mode, bool heads>
void apply(Work& w, int64_t block) {
  Expanded e;
  auto momentum_root = w.part.A ? e.grad_root : e.momentum_root;
  const Rule rule = w.rule;
  const Part t = w.part;
  const Scalars s = w.scalars;
  float weights[DENSE][HIDDEN], later[DEEPER];
  std::memcpy(weights, w.weights, sizeof weights);
  std::memcpy(later, deeper(rule), sizeof later);
  float exp_mult[3];  // a magnitude of the whole tensor is a factor
  float constant[3] = {rule.step_mult, rule.nominal, rule.weight_decay};
  for (int k = 0; k < 3; k++) {
    exp_mult[k] = rule.aggregate[k] ? 0 : rule.exp_mult[k];
    if (heads && rule.aggregate[k] && k + 1 < HEADS) constant[k] *= std::exp(rule.exp_mult[k] * w.head_means[k + 1]);
  }
  if (rule.selfnormalize) constant[0] *= w.mean_grad;
  constant[0] *= s.factor, constant[1] *= s.factor;
  V outside = {}, sums[4] = {}, head_sums[HEADS] = {};
  int64_t end = std::min(t.size, (block + 1) * BLOCK);
  for (int64_t start = block * BLOCK; start < end; start += CHUNK) {
    int n = (int)std::min<int64_t>(CHUNK, end - start);
    if (heads) expand(w, start, n, e, true);
    for (int i = 0; i < n; i += LANES) {
      int m = std::min(LANES, n - i);
      int64_t at = start + i;
      Coordinates c(rule, t, s.sign, at, m);
      V head[HEADS] = {};
      if (heads) {
        V x[DENSE];
        dense(c, e, momentum_root, i, x);
        network(weights, later, x, e, i, head);
      }
      if (mode == AVERAGE) {
        for (int lane = m; lane < LANES; lane++)
          for (int o = 0; o < HEADS; o++) head[o][lane] = 0;
        for (int o = 0; o < HEADS; o++) head_sums[o] += head[o];
        continue;
      }
      V magnitude[3];
      for (int k = 0; k < 3; k++)
        magnitude[k] = heads && k + 1 < HEADS && exp_mult[k] != 0 ? exponential(head[k + 1] * exp_mult[k]) : each(1);
      V direction = c.grad * rule.direction;
      for (int k = 0; k < 3; k++) direction += c.momentum[k] * s.momenta[k];
      V blackbox = head[0] * magnitude[0] * constant[0] * (rule.blackbox_root ? c.root : each(1));
      V nominal = direction * magnitude[1] * constant[1] * (rule.nominal_root ? c.root : each(1));
      V decay = c.param * magnitude[2] * constant[2];
      V value = c.param - (blackbox + nominal + decay) * s.scale - c.param * s.decay;
      if (mode == CHECK) {
        V far = value > 0 ? value : -value;
        V rest = (c.second + c.momentum[0] + c.momentum[1] + c.momentum[2]) * 0.0f;
        outside += (far < s.limit ? V{} : each(1)) + rest;
        continue;
      }
      auto put = [&](float* p, V v) { if (m == LANES) store(p + at, v); else store(p + at, v, m); };
      put(t.param, value), put(t.exp_avg_sq, c.second);
      for (int k = 0; k < 3; k++) put(t.exp_avg + k * t.size, c.momentum[k]);
      if (mode == MEASURE) {
        V change = value - c.param;
        // The network does not make zeros of zeros.
        for (int lane = m; lane < LANES; lane++) blackbox[lane] = change[lane] = 0;
        sums[0] += change * change;
        sums[1] += blackbox * blackbox, sums[2] += nominal * nominal, sums[3] += decay * decay;
      }
    }
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
  if (w.part.A) team.each(member, w.row_blocks, [&](int64_t i) { sum_squares(w, i); });
  team.once(member, [&] { vectors(w); });
  if (!w.rule.needs_heads && !w.rule.scheduled) return;
  team.each(member, w.blocks, [&](int64_t i) { moments(w, i); });
  team.once(member, [&] { fold(w); });
}

// Pass C, after looks with nothing written where a mean of the network's outputs or the safeguard asks for one.
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
    team.once(member, [&] { w.proven = rule.needs_heads && proves_finite(w); });
    if (!w.proven) {
      team.each(member, w.blocks, [&](int64_t i) { apply<CHECK>(w, i); });
      skip = !std::all_of(w.block_finite.begin(), w.block_finite.end(), [](uint8_t ok) { return ok; });
    }
  }
  if (!skip) team.each(member, w.blocks, [&](int64_t i) { rule.measure ? apply<MEASURE>(w, i) : apply<WRITE>(w, i); });
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

// Moves `count` tensors; with `measure` adds up the squares of change, blackbox, nominal and decay, 4 for each tensor.
// Each is taken through all passes while it lies in the cache; where the rule is `scheduled`, all are looked at first,
// `multipliers` turns `means` (4 mean squares and the step of each) into their scalars, and then all are moved.
extern "C" int star_step(const Rule* rule, const Part* parts, const Scalars* scalars, double* squares, float* means,
                         Multipliers multipliers, int64_t count) {
  std::vector<int64_t> alone, shared;
  int64_t total = 0;
  for (int64_t i = 0; i < count; i++) (parts[i].size <= ALONE ? alone : shared).push_back(i), total += parts[i].size;
  Team team, solo;
  team.size = (int)std::max<int64_t>(1, std::min<int64_t>(rule->threads, total / ALONE)), solo.size = 1;
  std::vector<std::unique_ptr<Work>> works(count);
  int failed = 0;
  auto begin = [&](Team& by, int member, int64_t i) {
    by.once(member, [&] { works[i] = std::make_unique<Work>(*rule, parts[i], scalars[i]); });
    look(by, member, *works[i]);
  };
  auto end = [&](Team& by, int member, int64_t i) {
    move(by, member, *works[i], squares + 4 * i);
    by.once(member, [&] { works[i].reset(); });
  };
  auto all = [&](int member, auto task) {
    team.each(member, (int64_t)alone.size(), [&](int64_t k) { task(solo, 0, alone[k]); });
    for (int64_t i : shared) task(team, member, i);
  };
  auto run = [&](int member) {
    if (!rule->scheduled)
      return all(member, [&](Team& by, int m, int64_t i) { begin(by, m, i), end(by, m, i); });
    all(member, begin);
    team.once(member, [&] {
      for (int64_t i = 0; i < count; i++)
        std::copy_n(works[i]->means, 4, means + 5 * i), means[5 * i + 4] = *parts[i].step;
      failed = multipliers();
    });
    if (!failed) all(member, end);
  };
  std::vector<std::thread> others;
  for (int member = 1; member < team.size; member++) others.emplace_back(run, member);
  run(0);
  for (auto& other : others) other.join();
  return failed;
}
