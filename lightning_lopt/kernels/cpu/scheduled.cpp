// A step of the rule `scheduled` on the CPU; scheduled.py builds and calls it. The math and the names are those of
// rules/scheduled.py, and it is tested against them.
//
// Two passes over a tensor:
//   sum   the means of the gradient's rows, where they are centered, and the mean squares that the schedule reads: of
//         the parameter, and of the momenta's strengths
//   move  the new value, momenta and second moment; for a hidden matrix, whose step scheduled.py makes orthogonal
//         before it adds it, the step and what decay leaves of the value
// The time of large tensors is that of reading and writing memory. So nothing of the tensor's size is stored between the
// passes; both compute the new moments.
//
// The safeguard may only let a step pass that writes finite numbers. The sums bound the new values, so that nearly every
// step is known to be finite before it is made; where the bound does not suffice, the last pass first runs without
// writing.

#include "schedule.h"

namespace {

struct Geometry {  // as in scheduled.py
  int64_t size;
  int64_t rows;  // the first dim of a matrix; 0 for vectors
  Real limit;
  Shape shape;
  int32_t is_table;  // an embedding: only what has a gradient moves
};

struct Item {
  Tensor tensor;
  const Geometry& geometry;
  Real* first_square;  // the mean square of the value before the first step
  Real* step;          // where a hidden matrix's step is written; null for other tensors
  double* squares;      // of change and nominal term, where they are measured
};

enum Sum { PARAM_SQUARES, STRENGTH_SQUARES, SECOND_MOMENTS = STRENGTH_SQUARES + 3, SEEN, NUM_SUMS };

// What the passes over one tensor hand on to each other.
struct Work {
  const Rule& rule;
  Tensor tensor{};
  Real* step = nullptr;          // as in Item
  Real first_square = 0;
  bool is_table = false;
  int64_t blocks = 0;
  int64_t fan_in = 0;             // of a gradient that is centered, else 0
  Real centering = 0;             // fraction of the rows' means that is removed
  Multipliers multipliers{};
  bool large = false;             // whether squares leave the range of float32
  bool proven = false;            // whether all new numbers are known to be finite
  std::vector<Real> row_means;    // what is subtracted from each row, at [row + block]: rows can lie in several blocks
  std::vector<double> sums;       // (blocks, NUM_SUMS)
  std::vector<double> squares;    // (blocks, 2): change, nominal term
  std::vector<uint8_t> finite;    // (blocks)

  explicit Work(const Rule& r) : rule(r) {}

  static int64_t blocks_of(int64_t size) { return (size + BLOCK - 1) / BLOCK; }

  void reserve(const Item& item) {
    const int64_t n = blocks_of(item.geometry.size);
    row_means.reserve(item.geometry.rows + n);
    sums.reserve(n * NUM_SUMS);
    squares.reserve(n * 2);
    finite.reserve(n);
  }

  void begin(const Item& item) {
    tensor = item.tensor;
    step = item.step;
    is_table = item.geometry.is_table;
    blocks = blocks_of(tensor.size);
    centering = item.geometry.rows ? centering_at(rule, *tensor.step) : 0;
    fan_in = centering ? tensor.size / item.geometry.rows : 0;
    row_means.resize(item.geometry.rows + blocks);
    sums.resize(blocks * NUM_SUMS);
    squares.resize(blocks * 2);
    finite.resize(blocks);
  }
};

// Means of rows

Real mean_of_row(const Work& w, int64_t row) {
  double total = 0;
  for (int64_t start = 0; start < w.fan_in; start += CHUNK) {
    const Real* grad = w.tensor.grad + row * w.fan_in + start;
    const int64_t n = std::min<int64_t>(CHUNK, w.fan_in - start);
    V partial = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) partial += load(grad + i);
    if (i < n) partial += load(grad + i, (int)(n - i));
    total += sum(partial);
  }
  return w.centering * (Real)(total / w.fan_in);
}

// Of a block's rows, before it is summed, while that brings its gradients into the cache. Blocks have the means of a row
// that they share each to itself: no thread waits for another.
void average_rows(Work& w, int64_t block, int64_t end) {
  const int64_t last = (end - 1) / w.fan_in;
  for (int64_t row = block * BLOCK / w.fan_in; row <= last; row++)
    w.row_means[row + block] = w.fan_in == 1 ? w.centering * w.tensor.grad[row] : mean_of_row(w, row);
}

// Of a row that is longer than a block: first of all, once.
void average_long_row(Work& w, int64_t row) {
  const Real mean = mean_of_row(w, row);
  const int64_t last = ((row + 1) * w.fan_in - 1) / BLOCK;
  for (int64_t block = row * w.fan_in / BLOCK; block <= last; block++) w.row_means[row + block] = mean;
}

// What centering leaves of a gradient; `mean` is the fraction of its row's mean that is removed.
inline Real without(Real grad, Real mean) { return grad == 0 ? grad : grad - mean; }
inline V without(V grad, Real mean) { return grad == 0 ? grad : grad - mean; }

// Coordinates next to each other that have one mean, or whose gradients lie centered in a room of CHUNK numbers.
struct Run {
  int64_t at;
  int n;
  const Real* grad;
  Real mean;
};

constexpr int64_t LONG = 4 * LANES;  // rows from this length on are runs of their own, and nothing is copied

// The run of a block that starts at a coordinate and does not go beyond `end`.
Run run_at(const Work& w, int64_t block, int64_t start, int64_t end, Real* room) {
  const Real* grad = w.tensor.grad + start;
  if (!w.fan_in) return {start, (int)std::min<int64_t>(CHUNK, end - start), grad, 0};
  const int64_t row = start / w.fan_in;
  const Real* means = w.row_means.data() + row + block;
  if (w.fan_in >= LONG) {
    end = std::min(end, (row + 1) * w.fan_in);
    return {start, (int)std::min<int64_t>(CHUNK, end - start), grad, *means};
  }
  const int n = (int)std::min<int64_t>(CHUNK, end - start);
  if (w.fan_in == 1) {
    for (int i = 0; i < n; i++) room[i] = without(grad[i], means[i]);
    return {start, n, room, 0};
  }
  int64_t end_of_row = (row + 1) * w.fan_in - start;
  for (int i = 0; i < n; end_of_row += w.fan_in, means++) {
    const int last = (int)std::min<int64_t>(n, end_of_row);
    for (; i < last; i++) room[i] = without(grad[i], *means);
  }
  return {start, n, room, 0};
}

// n coordinates from number i of a run on: what the step reads of them, and their new moments.
//
// `large` is for gradients whose squares float32 does not hold: it computes moments in the order of the rule, which
// stays finite up to 6e20 as AdamW's does. The other form saves a multiplication for each.
template <bool large>
struct Coordinates {
  V grad, param, momentum[3], second;

  inline Coordinates(const Work& w, VI flip, const Run& run, int i, int n) {
    const Rule& rule = w.rule;
    const Tensor& t = w.tensor;
    const int64_t at = run.at + i;
    grad = flipped(without(load(run.grad + i, n), run.mean), flip);
    param = load(t.param + at, n);
    for (int k = 0; k < 3; k++) {
      const V old = in_register(load(t.exp_avg + k * t.size + at, n));
      if (large)
        momentum[k] = old * rule.momentum[k] + grad * (1 - rule.momentum[k]);
      else
        momentum[k] = old + (grad - old) * (1 - rule.momentum[k]);
      if (w.is_table) momentum[k] = grad == 0 ? old : momentum[k];
    }
    const V old = in_register(load(t.exp_avg_sq + at, n));
    if (large)
      second = old * rule.rms + (grad * (1 - rule.rms)) * grad;
    else
      second = old + (grad * grad - old) * (1 - rule.rms);
    if (w.is_table) second = grad == 0 ? old : second;
  }
};

// Pass 1: sums

template <bool large>
void sum_block(Work& w, int64_t block) {
  const Tensor t = w.tensor;
  const VI flip = sign_bits(t.sign);
  Real room[CHUNK];
  V totals[NUM_SUMS] = {};
  const int64_t end = std::min(t.size, (block + 1) * BLOCK);
  if (w.fan_in && w.fan_in <= BLOCK) average_rows(w, block, end);
  Run run{block * BLOCK, 0, nullptr, 0};
  for (; run.at < end; run.at += run.n) {
    run = run_at(w, block, run.at, end, room);
    auto add = [&](int i, int n) {
      prefetch<2048, 2>(t, run.at + i, n);
      const Coordinates<large> c(w, flip, run, i, n);
      totals[PARAM_SQUARES] += c.param * c.param;
      totals[SECOND_MOMENTS] += c.second;
      totals[SEEN] += c.second > 0 ? each(1) : V{};
      if (large) {
        const V root = inverse_root(c.second + EPS);
        for (int k = 0; k < 3; k++) {
          const V strength = c.momentum[k] * root;
          totals[STRENGTH_SQUARES + k] += strength * strength;
        }
      } else {  // without a root
        const V squared_root = 1 / (c.second + EPS);
        for (int k = 0; k < 3; k++) totals[STRENGTH_SQUARES + k] += c.momentum[k] * c.momentum[k] * squared_root;
      }
    };
    int i = 0;
    for (; i + LANES <= run.n; i += LANES) add(i, LANES);
    if (i < run.n) add(i, run.n - i);
  }
  for (int k = 0; k < NUM_SUMS; k++) w.sums[block * NUM_SUMS + k] = sum(totals[k]);
}

double total_of(const Work& w, int which) {
  double total = 0;
  for (int64_t block = 0; block < w.blocks; block++) total += w.sums[block * NUM_SUMS + which];
  return total;
}

bool leaves_range(const Work& w) {
  for (int k = STRENGTH_SQUARES; k <= SECOND_MOMENTS; k++)
    if (!std::isfinite(total_of(w, k))) return true;
  return false;
}

// Whether no new number can leave the range. No number is larger than the root of its block's sum of squares, and the
// change is at most the sum of its parts.
bool proves_finite(const Work& w) {
  double largest[SEEN];
  for (int k = 0; k < SEEN; k++) {
    double high = 0;
    for (int64_t block = 0; block < w.blocks; block++) {
      const double s = w.sums[block * NUM_SUMS + k];
      if (!(s < INFINITY)) return false;
      high = std::max(high, s);
    }
    largest[k] = 1.01 * std::sqrt(high) + 1e-22;  // squares below the smallest Real are lost
  }
  double direction = 0;
  for (int k = 0; k < 3; k++) direction += w.multipliers.momenta[k] * largest[STRENGTH_SQUARES + k];
  const Tensor& t = w.tensor;
  const double param = largest[PARAM_SQUARES];
  const double change = std::fabs(t.scale) * w.multipliers.factor * w.rule.nominal * direction;
  const double decay = std::fabs(t.decay) + std::fabs(t.scale) * w.multipliers.decay;
  // The largest coordinate of an orthogonal step may be as large as the norm of the step that it is made of.
  const double spread = w.step ? std::sqrt((double)t.size) : 1;
  return 1.01 * (param + spread * change + decay * param) < std::min<double>(t.limit, 1e38);
}

void schedule(Work& w, const Shape& shape) {
  MeanSquares mean;
  mean.param = (Real)(total_of(w, PARAM_SQUARES) / w.tensor.size);
  const double seen = std::max(total_of(w, SEEN), 1e-12 * w.tensor.size);  // coordinates that have had a gradient
  for (int k = 0; k < 3; k++) mean.strength[k] = (Real)(total_of(w, STRENGTH_SQUARES + k) / seen);
  if (*w.tensor.step == 0) w.first_square = mean.param;
  mean.first = w.first_square;
  w.multipliers = multipliers_of(w.rule, shape, mean, *w.tensor.step);
  w.proven = w.rule.safeguard && proves_finite(w);
}

// Pass 2: the step

// WRITE moves the tensor. LOOK writes nothing: it tells whether all would be finite, and sums the step's squares. They
// are apart so that a step has the same bits whether it is measured or not.
enum Mode { WRITE, LOOK };

template <Mode mode, bool large>
void move_block(Work& w, int64_t block) {
  const Rule& rule = w.rule;
  const Tensor t = w.tensor;
  const VI flip = sign_bits(t.sign);
  const Real stepsize = rule.nominal * w.multipliers.factor;
  Real weights[3];
  for (int k = 0; k < 3; k++) weights[k] = w.multipliers.momenta[k] * stepsize;
  const Real kept = 1 - w.multipliers.caution;
  const Real own_decay = w.multipliers.decay;
  const V decay = each(t.decay + t.scale * own_decay);
  const bool decays = t.decay != 0 || own_decay != 0;
  Real room[CHUNK];
  V spoiled = {}, change_squares = {}, nominal_squares = {};
  const int64_t end = std::min(t.size, (block + 1) * BLOCK);
  Run run{block * BLOCK, 0, nullptr, 0};
  for (; run.at < end; run.at += run.n) {
    run = run_at(w, block, run.at, end, room);
    auto move = [&](int i, int n) {
      const int64_t at = run.at + i;
      prefetch<128, 3>(t, at, n);
      const Coordinates<large> c(w, flip, run, i, n);
      V nominal = c.momentum[0] * weights[0];
      nominal += c.momentum[1] * weights[1];
      nominal += c.momentum[2] * weights[2];
      if (kept != 1) nominal = c.grad * nominal < 0 ? nominal * kept : nominal;
      nominal *= inverse_root(c.second + EPS);
      if (w.is_table) nominal = c.grad == 0 ? V{} : nominal;
      V value = w.step ? c.param : c.param - nominal * t.scale;
      V lost = decay, own_lost = each(own_decay);
      if (w.is_table) {  // what the batch does not read has only the decay that the user asked for
        lost = c.grad == 0 ? each(t.decay) : decay;
        own_lost = c.grad == 0 ? V{} : own_lost;
      }
      if (decays) value -= c.param * lost;
      if (mode == WRITE) {
        if (w.step) store(w.step + at, nominal * -t.scale, n);
        if (!w.step || decays) store(t.param + at, value, n);
        store(t.exp_avg_sq + at, c.second, n);
        for (int k = 0; k < 3; k++) store(t.exp_avg + k * t.size + at, c.momentum[k], n);
      } else {  // the zeros beyond the last coordinate stay zeros
        if (w.step) value -= nominal * t.scale;
        const V size = value > 0 ? value : -value;
        const V moments = c.second + c.momentum[0] + c.momentum[1] + c.momentum[2];
        spoiled += (size < t.limit ? V{} : each(1)) + moments * 0;
        const V change = value - c.param, step = nominal + c.param * own_lost;
        change_squares += change * change;
        nominal_squares += step * step;
      }
    };
    int i = 0;
    for (; i + LANES <= run.n; i += LANES) move(i, LANES);
    if (i < run.n) move(i, run.n - i);
  }
  if (mode == WRITE) return;
  w.finite[block] = sum(spoiled) == 0;
  w.squares[2 * block] = sum(change_squares);
  w.squares[2 * block + 1] = sum(nominal_squares);
}

template <Mode mode>
void move_block(Work& w, int64_t block) {
  w.large ? move_block<mode, true>(w, block) : move_block<mode, false>(w, block);
}

// All passes over one tensor, by a whole team: every member runs this, with the same Work.
void move(Team& team, int member, Work& w, const Item& item) {
  const Rule& rule = w.rule;
  team.once([&] {
    w.begin(item);
    w.first_square = *item.first_square;
  });
  if (w.fan_in > BLOCK) team.each(member, item.geometry.rows, [&](int64_t row) { average_long_row(w, row); });
  auto finish_sums = [&] {
    w.large = leaves_range(w);
    if (!w.large) schedule(w, item.geometry.shape);
  };
  team.each(member, w.blocks, [&](int64_t i) { sum_block<false>(w, i); }, finish_sums);
  if (w.large) {
    auto finish = [&] { schedule(w, item.geometry.shape); };
    team.each(member, w.blocks, [&](int64_t i) { sum_block<true>(w, i); }, finish);
  }
  bool skip = false;
  if (rule.measure || (rule.safeguard && !w.proven)) {
    team.each(member, w.blocks, [&](int64_t i) { move_block<LOOK>(w, i); });
    skip = rule.safeguard && !std::all_of(w.finite.begin(), w.finite.end(), [](uint8_t ok) { return ok; });
  }
  auto finish = [&] {
    count_step(rule, w.tensor, skip);
    if (!skip) *item.first_square = w.first_square;
    if (skip && w.step) std::fill_n(w.step, w.tensor.size, Real(0));
    for (int64_t i = 0; rule.measure && !skip && i < 2 * w.blocks; i++) item.squares[i % 2] += w.squares[i];
  };
  // Backwards: the last blocks still lie in the cache.
  team.each_backwards(member, skip ? 0 : w.blocks, [&](int64_t i) { move_block<WRITE>(w, i); }, finish);
}

// Of a step's tensor number i; it has two squares.
Item item_at(const Rule& rule, const Arguments& given, const Geometry& g, int64_t i) {
  Real* const first_square = static_cast<Real*>(given.addresses[FIRST_SQUARE * given.count + i]);
  return {tensor_at(rule, given, g.size, g.limit, i), g, first_square, given.targets[i], given.squares + 2 * i};
}

}  // namespace

#include "entry.h"
