// What star.cpp keeps of a tensor between its passes, and its first pass: second moments per row and column, their
// factors, and what they add to the network's first layer.

#pragma once

#include "simd_pairs.h"
#include "step.h"

// The network's shape, set by star.py: HIDDEN units in each of LAYERS hidden layers, HEADS outputs (2 or 4).

namespace {

// Weights that are to be read from memory wherever they are used: a processor does that beside its arithmetic, while
// copies of each in all lanes, which the compiler would make before the loop, take sixteen times the traffic.
inline const float* reread(const float* p) {
  asm volatile("" : "+r"(p));
  return p;
}

constexpr int DENSE = 16, FEATURES = 39, CHANNELS = 28;
constexpr int DENSE_ROWS[DENSE] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 25, 26, 27};  // in the first layer
constexpr float TIMESCALES[11] = {1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000};

struct Rule : Common {  // as in star.py
  float adafactor[3];
  float step_mult, weight_decay;
  float exp_mult[3];   // 0 where nothing is controlled
  float direction[4];  // weights of gradient and momenta in the nominal direction
  int32_t nominal_root, blackbox_root, selfnormalize, aggregate[3];
  int32_t heads[4];      // which are read
  const float* weights;  // w0, b0, w1, b1, ..., one after the other
};

struct Geometry {  // as in star.py
  int64_t size, A, X, B, Y, C, left_is_row;
  float limit;
};

struct Item {
  Tensor tensor;
  const Geometry& geometry;
  float *left, *right;  // the state's factored second moments
  double* squares;      // of change, blackbox, nominal and decay, where they are measured
};

float inverse_rms(double squares, int64_t n) { return (float)(1.0 / std::sqrt(1e-5 + squares / n)); }

// The sizes of a tensor's vectors and blocks.
struct Sizes {
  int64_t n_left = 0, n_right = 0, lines = 0, length = 0, blocks = 0, row_blocks = 0, lines_per_row_block = 0;

  bool by_chunk = false;  // one line: a second moment for each coordinate, so that nothing is gained by storing more

  Sizes() = default;
  explicit Sizes(const Geometry& g) {
    const bool diagonal = !g.A;
    by_chunk = diagonal || g.X == 1;
    n_left = diagonal ? g.size : g.A * g.X * g.B * g.C;
    n_right = diagonal ? 0 : g.A * g.B * g.Y * g.C;
    lines = diagonal ? 1 : g.A * g.X * g.B;
    length = g.size / lines;
    blocks = (g.size + BLOCK - 1) / BLOCK;
    // Each row block sums columns in a row of its own; there must not be too many of these.
    lines_per_row_block = (std::max(4 * BLOCK, 16 * n_right) + length - 1) / length;
    row_blocks = by_chunk ? 0 : (lines + lines_per_row_block - 1) / lines_per_row_block;
  }
};

// Weights of second moments and of their inverse roots in the first layer, with the normalizers in them.
struct HiddenWeights {
  float start[HIDDEN], moment[3][HIDDEN], inverse[3][HIDDEN];
};

// What the passes over one tensor hand on to each other.
struct Work : Sizes {
  const Rule& rule;
  Tensor tensor{};
  Geometry geometry{};
  std::vector<float> left, right;                // 3 new second moments
  std::vector<float> left_root, right_root;      // 3 factors of gradient and momenta
  std::vector<float> left_hidden, right_hidden;  // HIDDEN first-layer sums; the bias is in the left ones
  std::vector<float> right_sums;                 // one row for each row block
  std::vector<double> grad_sums;                 // one for each row block
  std::vector<double> partial, head_sums, squares;  // one row for each block
  std::vector<uint8_t> block_finite;
  float weights[DENSE][HIDDEN];  // of the dense features, normalized
  float widest[HIDDEN];          // bounds of the first layer's sums without the dense features
  HiddenWeights own_hidden;      // `by_chunk`: roots and sums are made with these, instead of being stored
  float relative[3];             // what own moments are multiplied by before their roots are taken
  float head_means[HEADS], mean_grad = 0;
  bool finite = true, proven = false;  // the factored moments; all new numbers
  VI inner[LANES];                     // (c + lane) % C for each c, where 1 < C <= LANES

  explicit Work(const Rule& r) : rule(r) {}

  // Calls resize(vector, size) for all vectors.
  template <typename Resize>
  void for_each_vector(const Geometry& g, Resize resize) {
    const Sizes n(g);
    resize(left, 3 * n.n_left);
    resize(right, 3 * n.n_right);
    resize(left_root, g.A ? 3 * n.n_left : 0);
    resize(right_root, n.by_chunk ? 0 : 3 * n.n_right);
    resize(left_hidden, g.A ? HIDDEN * n.n_left : 0);
    resize(right_hidden, n.by_chunk ? 0 : HIDDEN * n.n_right);
    resize(right_sums, n.row_blocks * n.n_right);
    resize(grad_sums, n.row_blocks);
    resize(partial, n.blocks * DENSE);
    resize(head_sums, n.blocks * HEADS);
    resize(squares, n.blocks * 4);
    resize(block_finite, n.blocks);
  }

  void reserve(const Item& item) {
    for_each_vector(item.geometry, [](auto& vector, int64_t n) { vector.reserve(n); });
  }

  void begin(const Item& item) {
    tensor = item.tensor;
    geometry = item.geometry;
    static_cast<Sizes&>(*this) = Sizes(geometry);
    for_each_vector(geometry, [](auto& vector, int64_t size) { vector.resize(size); });
    if (!by_chunk) std::fill(right.begin(), right.end(), 0.0f);  // these are added to
    std::fill(right_sums.begin(), right_sums.end(), 0.0f);
    const int64_t C = geometry.C;
    for (int c = 0; c < C && C <= LANES; c++)
      for (int lane = 0; lane < LANES; lane++) inner[c][lane] = (int32_t)((c + lane) % C);
  }

  // Where the right vectors of a line begin. Most tensors have only one line of these, and divisions take long.
  int64_t right_of(int64_t line) const {
    const Geometry& g = geometry;
    return g.A * g.B == 1 ? 0 : (line / (g.X * g.B) * g.B + line % g.B) * length;
  }
};

// Sums of squares of a line, and for each of its columns; of the numbers themselves too, which are returned.
V add_line(const float* g, int64_t length, float* left, float* right) {
  V sums = {}, squares = {};
  auto add = [&](int64_t i, int n) {
    const V x = load(g + i, n), square = x * x;
    sums += x;
    squares += square;
    store(right + i, load(right + i, n) + square, n);
  };
  int64_t i = 0;
  for (; i + LANES <= length; i += LANES) add(i, LANES);
  if (i < length) add(i, (int)(length - i));
  left[0] = sum(squares);
  return sums;
}

// The same of a line with inner dims, (Y, C): a sum for each of the C. Lane by lane, a vector that starts at inner number
// `phase` adds to the numbers from there on; these are put together at the end.
V add_line(const float* g, int64_t length, int64_t C, float* left, float* right) {
  V sums = {}, phases[LANES];
  for (int64_t p = 0; p < std::min<int64_t>(C, LANES); p++) phases[p] = V{};
  const int forward = (int)(LANES % C);
  int phase = 0;
  for (int64_t i = 0; i < length; i += LANES) {
    const int n = (int)std::min<int64_t>(LANES, length - i);
    const V x = load(g + i, n), square = x * x;
    sums += x;
    if (C <= LANES) {
      phases[phase] += square;
      phase += forward;
      phase -= phase >= C ? (int)C : 0;
    }
    store(right + i, load(right + i, n) + square, n);
  }
  if (C <= LANES) {
    float folded[2 * LANES] = {};
    for (int p = 0; p < C; p++) store(folded + p, load(folded + p) + phases[p]);
    for (int c = 0; c < C; c++) left[c] = folded[c];
    for (int i = (int)C, c = 0; i < C + LANES; i++, c = c + 1 == C ? 0 : c + 1) left[c] += folded[i];
  } else {
    for (int64_t c = 0; c < C; c++) left[c] = 0;
    for (int64_t y = 0; y < length; y += C)
      for (int64_t c = 0; c < C; c++) left[c] += g[y + c] * g[y + c];
  }
  return sums;
}

// Pass 1
void sum_squares(Work& w, int64_t block) {
  const int64_t C = w.geometry.C;
  const int64_t first = block * w.lines_per_row_block, last = std::min(w.lines, first + w.lines_per_row_block);
  double total = 0;
  for (int64_t line = first; line < last; line++) {
    const float* g = w.tensor.grad + line * w.length;
    float* right = w.right_sums.data() + block * w.n_right + w.right_of(line);
    float* left = w.left.data() + line * C;
    total += sum(C == 1 ? add_line(g, w.length, left, right) : add_line(g, w.length, C, left, right));
  }
  w.grad_sums[block] = total;
}

// New second moments (3, n) from old ones and means of squares, in place of the means; false if one is not finite.
// The three follow each other at a distance.
bool average(const Rule& rule, const float* old, float* means, int64_t n, int64_t distance) {
  float check = 0;
  for (int k = 2; k >= 0; k--) {  // backwards: the means lie where the first of the three go
    const float decay = rule.adafactor[k], rest = 1 - decay;
#pragma omp simd reduction(+ : check)
    for (int64_t i = 0; i < n; i++) {
      const float moment = decay * old[k * distance + i] + rest * means[i];
      means[k * distance + i] = moment;
      check += moment * 0;
    }
  }
  return check == 0;
}

// Calls function(i, n) for n numbers from i on, vector by vector.
template <typename Function>
inline void vector_by_vector(int64_t size, Function function) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) function(i, LANES);
  if (i < size) function(i, (int)(size - i));
}

inline V clamped_rsqrt(V x) { return inverse_root(x < 1e-9f ? each(1e-9f) : x); }  // NaN stays NaN

// Sums over second moments that the features need.
struct MomentSums {
  double moments[3] = {}, squares[3] = {}, inverse_squares[3] = {};

  // Adds n numbers of each, at most a CHUNK, which follow each other at a distance.
  void add(const float* from, int64_t n, int64_t distance) {
    for (int k = 0; k < 3; k++) {
      V sums = {}, of_squares = {}, of_inverses = {};
      vector_by_vector(n, [&](int64_t i, int count) {
        const V v = load(from + k * distance + i, count), inverse = 1.0f / (v + 1e-8f);
        sums += v;
        of_squares += v * v;
        of_inverses += count == LANES ? inverse : head_of(inverse, count);
      });
      moments[k] += sum(sums);
      squares[k] += sum(of_squares);
      inverse_squares[k] += sum(of_inverses);
    }
  }
};

MomentSums sums_of(const float* moments, int64_t n) {
  MomentSums sums;
  for (int64_t at = 0; at < n; at += CHUNK) sums.add(moments + at, std::min<int64_t>(CHUNK, n - at), n);
  return sums;
}

// Weights of the features that depend on n second moments alone. `row` is the first of their rows in w0, and `other` too
// where the moments are both rows and columns. Bounds of their sums are added to `widest`.
HiddenWeights hidden_weights(Work& w, const MomentSums& sums, int64_t n, const float* start, int row, int other) {
  const float* w0 = w.rule.weights;
  HiddenWeights found;
  std::copy_n(start, HIDDEN, found.start);
  for (int j = 0; j < HIDDEN; j++) w.widest[j] += std::fabs(start[j]);
  for (int k = 0; k < 3; k++) {
    const float scale = inverse_rms(sums.squares[k], n), inverse_scale = inverse_rms(sums.inverse_squares[k], n);
    for (int j = 0; j < HIDDEN; j++) {
      float moment = w0[(row + k) * HIDDEN + j], inverse = w0[(row + k + 6) * HIDDEN + j];
      if (other) {
        moment += w0[(other + k) * HIDDEN + j];
        inverse += w0[(other + k + 6) * HIDDEN + j];
      }
      found.moment[k][j] = moment * scale;
      found.inverse[k][j] = inverse * inverse_scale;
      w.widest[j] += 1.01f * (float)(std::fabs(found.moment[k][j]) * std::sqrt(sums.squares[k]));
      w.widest[j] += 1.01f * (float)(std::fabs(found.inverse[k][j]) * std::sqrt(sums.inverse_squares[k]));
    }
  }
  return found;
}

// First-layer sums of n numbers of (3, distance) moments, into (HIDDEN, out_distance).
void sum_hidden(const HiddenWeights& weights, const float* moments, int64_t distance, int64_t n, float* out,
                int64_t out_distance) {
  vector_by_vector(n, [&](int64_t i, int count) {
    V v[3], inverse[3];
    for (int k = 0; k < 3; k++) {
      v[k] = load(moments + k * distance + i, count);
      inverse[k] = inverse_root(v[k] + 1e-8f);
    }
    for (int j = 0; j < HIDDEN; j++) {
      V h = each(weights.start[j]);
      for (int k = 0; k < 3; k++) h += v[k] * weights.moment[k][j] + inverse[k] * weights.inverse[k][j];
      store(out + j * out_distance + i, h, count);
    }
  });
}

// A tensor with a second moment for each coordinate: new ones are made chunk by chunk, without any other vector. Below
// two dims they take the place of rows and columns; of a single line they are the right ones, and it has one left one.
void factor_by_chunk(Work& w, const Item& item, const float* bias) {
  const int64_t n = w.tensor.size;
  const bool diagonal = !w.geometry.A;
  const float* old = diagonal ? item.left : item.right;
  float* own = diagonal ? w.left.data() : w.right.data();
  double total = 0, total_squares = 0;
  MomentSums sums;
  w.finite = true;
  for (int64_t at = 0; at < n; at += CHUNK) {
    const int64_t size = std::min<int64_t>(CHUNK, n - at);
    V grads = {}, squares = {};
    vector_by_vector(size, [&](int64_t i, int count) {
      const V grad = load(w.tensor.grad + at + i, count), square = grad * grad;
      store(own + at + i, square + 1e-30f, count);
      grads += grad;
      squares += square;
    });
    total += sum(grads);
    total_squares += sum(squares);
    w.finite &= average(w.rule, old + at, own + at, size, n);
    sums.add(own + at, size, n);
  }
  w.mean_grad = w.tensor.sign * (float)(total / n);
  if (diagonal) {
    w.own_hidden = hidden_weights(w, sums, n, bias, 13, 16);
    return;
  }
  const bool left_is_row = w.geometry.left_is_row;
  float* left = w.left.data();
  left[0] = (float)(total_squares / n) + 1e-30f;
  w.finite &= average(w.rule, item.left, left, 1, 1);
  for (int k = 0; k < 3; k++) {
    const float moment = left_is_row ? left[k] / (left[k] + 1e-9f) : left[k];
    w.left_root[k] = 1 / std::sqrt(moment < 1e-9f ? 1e-9f : moment);  // NaN stays NaN
    w.relative[k] = left_is_row ? 1 : 1 / ((float)(sums.moments[k] / n) + 1e-9f);
  }
  const float none[HIDDEN] = {};
  const HiddenWeights of_left = hidden_weights(w, sums_of(left, 1), 1, bias, left_is_row ? 13 : 16, 0);
  w.own_hidden = hidden_weights(w, sums, n, none, left_is_row ? 16 : 13, 0);
  sum_hidden(of_left, left, 1, 1, w.left_hidden.data(), 1);
}

// Divides row moments by their mean over the other factored dim.
void make_relative(Work& w) {
  const Geometry& g = w.geometry;
  const int64_t outer = g.left_is_row ? g.A : g.A * g.B;
  const int64_t over = g.left_is_row ? g.X : g.Y;
  const int64_t inner = g.left_is_row ? g.B * g.C : g.C;
  float* rows = g.left_is_row ? w.left_root.data() : w.right_root.data();
  for (int64_t a = 0; a < 3 * outer; a++)
    for (int64_t i = 0; i < inner; i++) {
      float* r = rows + a * over * inner + i;
      double mean = 0;
      for (int64_t x = 0; x < over; x++) mean += r[x * inner];
      const float divisor = (float)(mean / over) + 1e-9f;
      for (int64_t x = 0; x < over; x++) r[x * inner] /= divisor;
    }
}

// Factors of gradient and momenta from moments, in place.
void take_roots(std::vector<float>& moments) {
  float* v = moments.data();
  vector_by_vector(moments.size(), [&](int64_t i, int n) { store(v + i, clamped_rsqrt(load(v + i, n)), n); });
}

// After pass 1: new second moments, their factors, and what they and the time add to the first layer.
void factor(Work& w, const Item& item) {
  const Geometry& g = w.geometry;
  const float step = (float)*w.tensor.step;
  float bias[HIDDEN];
  for (int j = 0; j < HIDDEN; j++) {
    bias[j] = w.rule.weights[FEATURES * HIDDEN + j];
    for (int i = 0; i < 11; i++)
      bias[j] += std::tanh(step / TIMESCALES[i] - 1) * w.rule.weights[(CHANNELS + i) * HIDDEN + j];
    w.widest[j] = 0;
  }
  if (w.by_chunk) return factor_by_chunk(w, item, bias);

  const int64_t nl = w.n_left, nr = w.n_right;
  float *left = w.left.data(), *right = w.right.data();
  double total = 0;
  for (int64_t block = 0; block < w.row_blocks; block++) {
    const float* sums = w.right_sums.data() + block * nr;
    for (int64_t i = 0; i < nr; i++) right[i] += sums[i];
    total += w.grad_sums[block];
  }
  w.mean_grad = w.tensor.sign * (float)(total / g.size);
  for (int64_t i = 0; i < nl; i++) left[i] = left[i] / g.Y + 1e-30f;
  for (int64_t i = 0; i < nr; i++) right[i] = right[i] / g.X + 1e-30f;
  w.finite = average(w.rule, item.left, left, nl, nl) & average(w.rule, item.right, right, nr, nr);
  std::copy(left, left + 3 * nl, w.left_root.begin());
  std::copy(right, right + 3 * nr, w.right_root.begin());
  make_relative(w);
  take_roots(w.left_root);
  take_roots(w.right_root);
  const float none[HIDDEN] = {};
  const HiddenWeights of_left = hidden_weights(w, sums_of(left, nl), nl, bias, g.left_is_row ? 13 : 16, 0);
  const HiddenWeights of_right = hidden_weights(w, sums_of(right, nr), nr, none, g.left_is_row ? 16 : 13, 0);
  sum_hidden(of_left, left, nl, nl, w.left_hidden.data(), nl);
  sum_hidden(of_right, right, nr, nr, w.right_hidden.data(), nr);
}

// A chunk's left and right vectors, one value for each coordinate.
struct Expanded {
  float root[3][CHUNK], momentum_root[3][CHUNK], hidden[HIDDEN][CHUNK];
};

// out = combine(left, right) for K pairs of vectors, along `run` coordinates of a line, the first of which is number
// `c` of the inner dims. Vectors follow each other at distances nl, nr and CHUNK.
template <int K, typename Combine>
inline void along_line(const float* left, int64_t nl, const float* right, int64_t nr, float* out, int64_t run,
                       int64_t C, int c, VI index, Combine combine) {
  if (C == 1) {
    for (int k = 0; k < K; k++) {
      float first = left[k * nl];
      for (int64_t i = 0; i < run; i++) out[k * CHUNK + i] = combine(first, right[k * nr + i]);
    }
  } else if (C <= LANES) {
    V tables[K];
    for (int k = 0; k < K; k++) tables[k] = load(left + k * nl, (int)C);
    int forward = LANES % (int)C, period = (int)C;
    int64_t i = 0;
    for (; i + LANES <= run; i += LANES) {
      for (int k = 0; k < K; k++)
        store(out + k * CHUNK + i, combine(permuted(tables[k], index), load(right + k * nr + i)));
      index += forward;
      index -= (index >= period) & period;
    }
    int rest = (int)(run - i);
    for (int k = 0; rest && k < K; k++)
      store(out + k * CHUNK + i, combine(permuted(tables[k], index), load(right + k * nr + i, rest)), rest);
  } else {
    for (int64_t i = 0; i < run; c = 0) {
      int64_t m = std::min(C - c, run - i);
      for (int k = 0; k < K; k++)
        for (int64_t x = 0; x < m; x++) out[k * CHUNK + i + x] = combine(left[k * nl + c + x], right[k * nr + i + x]);
      i += m;
    }
  }
}

// Coordinates that follow each other, with their vectors: what is constant along them apart.
struct Run {
  int64_t at;
  int n;
  const float *grad_root[3], *momentum_root[3], *hidden[HIDDEN];  // n numbers each
  float left_root[3] = {1, 1, 1}, left_hidden[HIDDEN] = {};       // beside these: a factor, and what is added
};

constexpr int64_t LONG = 4 * LANES;  // lines from here on are runs of their own, with nothing copied

// The run that starts at a coordinate and does not go beyond `end`. Vectors that must be made are put into `room`.
Run run_at(const Work& w, int64_t start, int64_t end, Expanded& room, bool with_hidden) {
  const int64_t nl = w.n_left, nr = w.n_right, C = w.geometry.C;
  Run run{};
  run.at = start;
  run.n = (int)std::min<int64_t>(CHUNK, end - start);
  if (w.by_chunk) {
    const bool diagonal = !w.geometry.A;
    const int64_t size = w.tensor.size;
    const float* own = (diagonal ? w.left : w.right).data() + start;
    for (int k = 0; k < 3; k++) {
      vector_by_vector(run.n, [&](int64_t i, int n) {
        const V moments = load(own + k * size + i, n);
        store(room.root[k] + i, clamped_rsqrt(diagonal ? moments + 1e-9f : moments * w.relative[k]), n);
        if (diagonal) store(room.momentum_root[k] + i, inverse_root(moments + 1e-6f), n);
      });
      run.grad_root[k] = room.root[k];
      run.momentum_root[k] = diagonal ? room.momentum_root[k] : room.root[k];
      if (!diagonal) run.left_root[k] = w.left_root[k];
    }
    if (with_hidden) sum_hidden(w.own_hidden, own, size, run.n, room.hidden[0], CHUNK);
    for (int j = 0; j < HIDDEN; j++) {
      run.hidden[j] = room.hidden[j];
      if (!diagonal) run.left_hidden[j] = w.left_hidden[j];
    }
    return run;
  }
  if (C == 1 && w.length >= LONG) {
    int64_t line = start / w.length, offset = start % w.length, r = w.right_of(line) + offset;
    run.n = (int)std::min<int64_t>(run.n, w.length - offset);
    for (int k = 0; k < 3; k++) {
      run.grad_root[k] = run.momentum_root[k] = &w.right_root[k * nr + r];
      run.left_root[k] = w.left_root[k * nl + line];
    }
    for (int j = 0; j < HIDDEN; j++) {
      run.hidden[j] = &w.right_hidden[j * nr + r];
      run.left_hidden[j] = w.left_hidden[j * nl + line];
    }
    return run;
  }
  auto times = [](auto a, auto b) { return a * b; };
  auto plus = [](auto a, auto b) { return a + b; };
  int64_t line = start / w.length, offset = start % w.length;
  for (int64_t to = 0, n; to < run.n; to += n, line++, offset = 0) {
    n = std::min(w.length - offset, run.n - to);
    int64_t l = line * C, r = w.right_of(line) + offset;
    int c = (int)(offset % C);
    VI index = {};
    if (1 < C && C <= LANES) index = w.inner[c];
    along_line<3>(&w.left_root[l], nl, &w.right_root[r], nr, room.root[0] + to, n, C, c, index, times);
    if (with_hidden)
      along_line<HIDDEN>(&w.left_hidden[l], nl, &w.right_hidden[r], nr, room.hidden[0] + to, n, C, c, index, plus);
  }
  for (int k = 0; k < 3; k++) run.grad_root[k] = run.momentum_root[k] = room.root[k];
  for (int j = 0; j < HIDDEN; j++) run.hidden[j] = room.hidden[j];
  return run;
}

}  // namespace
