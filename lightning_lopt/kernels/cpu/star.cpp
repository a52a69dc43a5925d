// A step of STAR on the CPU; star.py builds and calls it. The math and the names are those of rules/star.py and
// rules/features.py, and it is tested against them.
//
// Three passes over a tensor, because the features are normalized over all of it:
//   factor     sums of squared gradients per row and column -> factored second moments
//   normalize  the mean squares of the 16 dense features
//   move       the network, the new value, the new moments
// Between them only vectors (per row, per column) and 16 numbers are kept: features are computed again, never stored.
//
// A contiguous tensor is seen as [A, X, B, Y, C], where X and Y are the two factored dims in memory order. A "line" is
// the contiguous run (Y, C). "Left" vectors (A, X, B, C) are constant along Y, "right" vectors (A, B, Y, C) along X. A
// tensor below two dims (A = 0) has a diagonal second moment instead: one left value for each coordinate.

#include "star_network.h"

namespace {

// Pass 2: sums of squares of the dense features. Products of squares are less work than squares of products.
void sum_features(Work& w, int64_t block) {
  Expanded room;
  const Rule& rule = w.rule;
  const Tensor t = w.tensor;
  const VI flip = sign_bits(t.sign);
  const bool diagonal = !w.geometry.A;
  V totals[DENSE] = {};
  const int64_t end = std::min(t.size, (block + 1) * BLOCK);
  Run run{};
  for (run.at = block * BLOCK; run.at < end; run.at += run.n) {
    run = run_at(w, run.at, end, room, false);
    V by_grad[3] = {}, by_momentum[3] = {};  // sums of squares that lack the run's factor
    auto add = [&](int i, int n) {
      prefetch<2048, 2>(t, run.at + i, n);
      const Coordinates<V> c(rule, t, flip, run.at + i, n);
      V root = 1.0f / (c.second + EPS);  // its square
      totals[1] += c.param * c.param;
      if (n < LANES) root = head_of(root, n);  // the one feature that zeros do not make zero
      const V square = c.grad * c.grad;
      totals[0] += square;
      totals[5] += c.second * c.second;
      totals[9] += root;
      for (int k = 0; k < 3; k++) {
        const V moment = c.momentum[k] * c.momentum[k];
        const V grad_root = load(run.grad_root[k] + i, n);
        const V momentum_root = diagonal ? load(run.momentum_root[k] + i, n) : grad_root;
        totals[2 + k] += moment;
        totals[6 + k] += moment * root;
        by_grad[k] += square * (grad_root * grad_root);
        by_momentum[k] += moment * (momentum_root * momentum_root);
      }
    };
    int i = 0;
    for (; i + LANES <= run.n; i += LANES) add(i, LANES);
    if (i < run.n) add(i, run.n - i);
    for (int k = 0; k < 3; k++) {
      const float square = run.left_root[k] * run.left_root[k];
      totals[10 + k] += by_grad[k] * square;
      totals[13 + k] += by_momentum[k] * square;
    }
  }
  for (int f = 0; f < DENSE; f++) w.partial[block * DENSE + f] = sum(totals[f]);
}

// Whether no new number can leave the range: no coordinate is larger than the root of its block's sum of squares, and
// from there on the network is bounded layer by layer.
bool proves_finite(const Work& w) {
  const Rule& rule = w.rule;
  double x[DENSE];
  for (int f = 0; f < DENSE; f++) {
    double high = 0;
    for (int64_t b = 0; b < w.blocks; b++) {
      const double s = w.partial[b * DENSE + f];
      if (!(s < INFINITY)) return false;
      high = std::max(high, s);
    }
    x[f] = 1.01 * std::sqrt(high) + 1e-22;  // squares below the smallest float are lost
  }

  double h[HIDDEN], next[HIDDEN], head[HEADS];
  for (int j = 0; j < HIDDEN; j++) {
    h[j] = w.widest[j];
    for (int f = 0; f < DENSE; f++) h[j] += std::fabs((double)w.weights[f][j]) * x[f];
  }
  for (int number = 1; number <= LAYERS; number++) {
    const int outputs = number < LAYERS ? HIDDEN : HEADS;
    const float* weight = later_weights(rule) + (number - 1) * (HIDDEN + 1) * HIDDEN;
    for (int o = 0; o < outputs; o++) {
      double s = std::fabs(weight[HIDDEN * outputs + o]);
      for (int j = 0; j < HIDDEN; j++) s += std::fabs((double)weight[j * outputs + o]) * h[j];
      (number < LAYERS ? next : head)[o] = s;
    }
    if (number < LAYERS) std::copy(next, next + HIDDEN, h);
  }

  const bool adaptive = rule.nominal_root && rule.direction[0] == 0;
  double direction = std::fabs(rule.direction[0]) * x[0];
  for (int k = 0; k < 3; k++)
    direction += std::fabs(rule.direction[k + 1]) * (adaptive ? x[6 + k] : x[2 + k] * (rule.nominal_root ? x[9] : 1));
  auto magnitude = [&](int k) { return k + 1 < HEADS ? std::exp(std::fabs(rule.exp_mult[k]) * head[k + 1]) : 1.0; };
  const double blackbox = rule.step_mult * head[0] * magnitude(0) * (rule.selfnormalize ? std::fabs(w.mean_grad) : 1) *
                          (rule.blackbox_root ? x[9] : 1);
  const double change = blackbox + rule.nominal * magnitude(1) * direction + rule.weight_decay * magnitude(2) * x[1];
  const Tensor& t = w.tensor;
  const double value = x[1] + std::fabs(t.scale) * change + std::fabs(t.decay) * x[1];
  return 1.01 * value < std::min<double>(t.limit, 1e38);
}

// The normalizers go into the first layer's weights.
void normalize(Work& w) {
  for (int f = 0; f < DENSE; f++) {
    double total = 0;
    for (int64_t b = 0; b < w.blocks; b++) total += w.partial[b * DENSE + f];
    const float scale = inverse_rms(total, w.tensor.size);
    for (int j = 0; j < HIDDEN; j++) w.weights[f][j] = w.rule.weights[DENSE_ROWS[f] * HIDDEN + j] * scale;
  }
  w.proven = w.rule.safeguard && w.finite && proves_finite(w);
}

// Pass 3. WRITE moves the tensor. LOOK writes nothing: it tells whether all would be finite, and sums the step's
// squares. AVERAGE sums the heads. WRITE is alone so that a step has the same bits whether it is measured or not: the
// compiler rounds each mode as it likes.
enum Mode { WRITE, LOOK, AVERAGE };

template <Mode mode>
void move_block(Work& w, int64_t block) {
  Expanded room;
  const Rule rule = w.rule;
  const Tensor t = w.tensor;
  float weights[DENSE][HIDDEN], later[LATER];
  std::memcpy(weights, w.weights, sizeof weights);
  std::memcpy(later, later_weights(rule), sizeof later);

  // A magnitude of the whole tensor is a constant. Factors of the heads go into the last layer.
  float exp_mult[3];
  float constant[3] = {rule.step_mult, rule.nominal, rule.weight_decay};
  for (int k = 0; k < 3; k++) {
    exp_mult[k] = rule.aggregate[k] || k + 1 >= HEADS ? 0 : rule.exp_mult[k];
    if (rule.aggregate[k] && k + 1 < HEADS) constant[k] *= std::exp(rule.exp_mult[k] * w.head_means[k + 1]);
  }
  if (rule.selfnormalize) constant[0] *= w.mean_grad;
  for (int j = 0; mode != AVERAGE && j <= HIDDEN; j++) {
    float* weight = later + LATER - (HIDDEN + 1) * HEADS + j * HEADS;
    weight[0] *= constant[0];
    for (int o = 1; o < HEADS; o++) weight[o] *= exp_mult[o - 1];
  }
  const float by_grad = rule.direction[0] * constant[1];
  float by_momentum[3];
  for (int k = 0; k < 3; k++) by_momentum[k] = rule.direction[k + 1] * constant[1];

  const VI flip = sign_bits(t.sign);
  const bool both_by_root = mode == WRITE && rule.blackbox_root && rule.nominal_root;
  V outside = {}, sums[4] = {}, head_sums[HEADS] = {};
  const int64_t end = std::min(t.size, (block + 1) * BLOCK);
  Run run{};
  for (run.at = block * BLOCK; run.at < end; run.at += run.n) {
    run = run_at(w, run.at, end, room, true);
    for (int k = 0; k < 3; k++)  // what is constant along the run goes into the weights
      for (int j = 0; j < HIDDEN; j++) {
        weights[10 + k][j] = w.weights[10 + k][j] * run.left_root[k];
        weights[13 + k][j] = w.weights[13 + k][j] * run.left_root[k];
      }
    auto move = [&](auto kind, int i, int n) {
      using T = decltype(kind);
      const int64_t at = run.at + i;
      prefetch<128, 3>(t, at, n);
      const Coordinates<T> c(rule, t, flip, at, n);
      const T root = inverse_root(c.second + EPS);
      T h[HIDDEN], head[4] = {};
      for (int j = 0; j < HIDDEN; j++) h[j] = get<T>(run.hidden[j] + i, n) + run.left_hidden[j];
      first_layer(c, root, run, i, n, reread(weights[0]), h);
      later_layers(reread(later), rule.heads, h, head);
      if constexpr (mode == AVERAGE) {
        for (int o = 0; o < HEADS; o++) head_sums[o] += n == LANES ? head[o] : head_of(head[o], n);
        return;
      }

      T nominal = c.momentum[0] * by_momentum[0];
      nominal += c.momentum[1] * by_momentum[1];
      nominal += c.momentum[2] * by_momentum[2];
      if (by_grad != 0) nominal += c.grad * by_grad;
      if (exp_mult[1] != 0) nominal *= magnitude_of(head[2]);
      if (rule.nominal_root && !both_by_root) nominal *= root;
      T blackbox = {};
      if (rule.heads[0]) {
        blackbox = head[0];
        if (exp_mult[0] != 0) blackbox *= magnitude_of(head[1]);
        if (rule.blackbox_root && !both_by_root) blackbox *= root;
      }
      T change = blackbox + nominal, decay = {};
      if (both_by_root) change *= root;
      if (rule.weight_decay != 0) {
        decay = c.param * constant[2];
        if (exp_mult[2] != 0) decay *= magnitude_of(head[3]);
        change += decay;
      }
      T value = c.param - change * t.scale;
      if (t.decay != 0) value -= c.param * t.decay;

      if constexpr (mode == WRITE) {
        set(t.param + at, value, n);
        set(t.exp_avg_sq + at, c.second, n);
        for (int k = 0; k < 3; k++) set(t.exp_avg + k * t.size + at, c.momentum[k], n);
      }
      if constexpr (mode == LOOK) {
        const V size = value > 0 ? value : -value;
        const V moments = c.second + c.momentum[0] + c.momentum[1] + c.momentum[2];
        outside += (size < t.limit ? V{} : each(1)) + moments * 0.0f;
        change = value - c.param;
        if (n < LANES) {  // of zeros the network does not make zeros
          blackbox = head_of(blackbox, n);
          change = head_of(change, n);
        }
        sums[0] += change * change;
        sums[1] += blackbox * blackbox;
        sums[2] += nominal * nominal;
        sums[3] += decay * decay;
      }
    };
    int i = 0;
    if constexpr (mode == WRITE && PAIRS)
      for (; i + Two::SIZE <= run.n; i += Two::SIZE) move(Two{}, i, Two::SIZE);
    for (; i + LANES <= run.n; i += LANES) move(V{}, i, LANES);
    if (i < run.n) move(V{}, i, run.n - i);
  }
  if (mode == LOOK) {
    w.block_finite[block] = sum(outside) == 0;
    for (int k = 0; k < 4; k++) w.squares[block * 4 + k] = sum(sums[k]);
  }
  for (int o = 0; mode == AVERAGE && o < HEADS; o++) w.head_sums[block * HEADS + o] = sum(head_sums[o]);
}

void average_heads(Work& w) {
  for (int o = 0; o < HEADS; o++) {
    double total = 0;
    for (int64_t b = 0; b < w.blocks; b++) total += w.head_sums[b * HEADS + o];
    w.head_means[o] = (float)(total / w.tensor.size);
  }
}

// Counts the step, and writes the factored moments unless it was skipped.
void finish(Work& w, const Item& item, bool skip) {
  count_step(w.rule, w.tensor, skip);
  if (skip) return;
  std::copy(w.left.begin(), w.left.end(), item.left);
  std::copy(w.right.begin(), w.right.end(), item.right);
  for (int64_t i = 0; w.rule.measure && i < 4 * w.blocks; i++) item.squares[i % 4] += w.squares[i];
}

// All passes over one tensor, by a whole team: every member runs this, with the same Work.
void move(Team& team, int member, Work& w, const Item& item) {
  const Rule& rule = w.rule;
  team.once([&] { w.begin(item); });
  team.each(member, w.row_blocks, [&](int64_t i) { sum_squares(w, i); }, [&] { factor(w, item); });
  team.each(member, w.blocks, [&](int64_t i) { sum_features(w, i); }, [&] { normalize(w); });
  if (rule.aggregate[0] || rule.aggregate[1] || rule.aggregate[2])
    team.each(member, w.blocks, [&](int64_t i) { move_block<AVERAGE>(w, i); }, [&] { average_heads(w); });
  bool skip = rule.safeguard && !w.finite;
  if (!skip && (rule.measure || (rule.safeguard && !w.proven))) {
    team.each(member, w.blocks, [&](int64_t i) { move_block<LOOK>(w, i); });
    skip = rule.safeguard && !std::all_of(w.block_finite.begin(), w.block_finite.end(), [](uint8_t ok) { return ok; });
  }
  auto last = [&] { finish(w, item, skip); };
  team.each_backwards(member, skip ? 0 : w.blocks, [&](int64_t i) { move_block<WRITE>(w, i); }, last);
}

// Of a step's tensor number i; it has four squares: of change, blackbox, nominal and decay.
Item item_at(const Rule& rule, const Arguments& given, const Geometry& g, int64_t i) {
  auto moments = [&](Column column) { return static_cast<float*>(given.addresses[column * given.count + i]); };
  float* left = moments(!g.A ? DIAG : g.left_is_row ? ROW : COL);
  float* right = moments(g.left_is_row ? COL : ROW);
  return {tensor_at(rule, given, g.size, g.limit, i), g, left, right, given.squares + 4 * i};
}

}  // namespace

#include "entry.h"
