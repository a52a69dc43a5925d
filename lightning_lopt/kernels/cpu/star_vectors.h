// What star.cpp keeps of a tensor between its passes, and pass A: second moments per row and column, their factors, and
// what they add to the network's first layer.

#pragma once

#include <algorithm>
#include <vector>

#include "simd_pairs.h"

// The network's shape, set by star.py: HIDDEN units in each of LAYERS hidden layers, HEADS outputs (2 or 4).

namespace {

// Weights that are to be read from memory wherever they are used: a processor does that beside its arithmetic, while
// copies of each in all lanes, which the compiler would make before the loop, cost sixteen times the traffic.
inline const float* reread(const float* p) {
  asm volatile("" : "+r"(p));
  return p;
}

constexpr int DENSE = 16, FEATURES = 39, CHANNELS = 28;
constexpr int CHUNK = 1024;            // coordinates whose expanded vectors lie in the first-level cache
constexpr int64_t BLOCK = 16 * CHUNK;  // coordinates of one task of a thread
constexpr int64_t ALONE = 2 * BLOCK;   // tensors up to this size are one task
constexpr int DENSE_ROWS[DENSE] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 25, 26, 27};
constexpr float TIMESCALES[11] = {1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000};

struct Rule {  // as in star.py
  const float* weights;   // w0, b0, w1, b1, ..., one after the other
  const float* schedule;  // of a scheduled rule, see star_schedule.h
  float momentum[3], rms, adafactor[3];
  float step_mult, nominal, weight_decay, exp_mult[3];  // exp_mult 0 where nothing is controlled
  float direction[4];                                   // weights of gradient and momenta in the nominal direction
  float num_steps;                                      // 0 where it is not known
  int32_t nominal_root, blackbox_root, selfnormalize, aggregate[3], heads[4], needs_heads, scheduled, mixed;
  int32_t safeguard, measure, threads;
};

struct Part {  // as in star.py
  float* param;
  const float* grad;
  float *exp_avg, *exp_avg_sq, *left, *right, *step;
  int64_t *skipped, *skipped_in_row;
  int64_t size, A, X, B, Y, C, left_is_row, rows;  // rows: of a matrix, the first dim; 0 of a vector
};

struct Scalars {  // as in star.py
  float scale, decay, sign, limit;
  float shape[4];  // what the scheduler knows of the tensor
};

inline float clamped_rsqrt(float x) { return 1.0f / std::sqrt(x < 1e-9f ? 1e-9f : x); }

float inverse_rms(double squares, int64_t n) { return (float)(1.0 / std::sqrt(1e-5 + squares / n)); }

// What the passes over one tensor hand on.
struct Work {
  const Rule& rule;
  const Part& part;
  const Scalars& scalars;
  int64_t n_left, n_right, lines, length, blocks, row_blocks, lines_per_row_block;
  std::vector<float> left, right;                // 3 new second moments
  std::vector<float> left_root, right_root;      // 3 factors of gradient and momenta; a diagonal's second 3: momenta's
  std::vector<float> left_hidden, right_hidden;  // HIDDEN first-layer sums; the bias is in the left ones
  std::vector<float> right_sums;                 // one row for each row block
  std::vector<float> row_means;                  // of a centered gradient: what is taken from each row
  std::vector<double> grad_sums, partial, head_sums, squares;  // one row for each block
  float weights[DENSE][HIDDEN], head_means[HEADS], mean_grad = 0, widest[HIDDEN];
  int64_t fan_in = 0;            // of a centered gradient
  float factor = 1, momenta[3];  // of blackbox and nominal term; the momenta's weights in the nominal direction
  float caution = 0;             // how much of the nominal direction is held back where it would climb
  bool finite = true, proven = false;
  std::vector<uint8_t> block_finite;
  VI inner[LANES];  // (c + lane) % C for each c, where C > 1 fits

  Work(const Rule& r, const Part& p, const Scalars& s) : rule(r), part(p), scalars(s) {
    bool diagonal = !p.A;
    n_left = diagonal ? p.size : p.A * p.X * p.B * p.C;
    n_right = diagonal ? 0 : p.A * p.B * p.Y * p.C;
    lines = diagonal ? 1 : p.A * p.X * p.B;
    length = p.size / lines;
    blocks = (p.size + BLOCK - 1) / BLOCK;
    // Each row block sums columns in a row of its own; there must not be too many of these.
    lines_per_row_block = diagonal ? 1 : (std::max(4 * BLOCK, 16 * n_right) + length - 1) / length;
    row_blocks = (lines + lines_per_row_block - 1) / lines_per_row_block;
    left.resize(3 * n_left), right.resize(3 * n_right);
    if (rule.needs_heads) {
      left_root.resize((diagonal ? 6 : 3) * n_left), left_hidden.resize(HIDDEN * n_left);
      right_root.resize(3 * n_right), right_hidden.resize(HIDDEN * n_right);
    }
    right_sums.resize(row_blocks * n_right), grad_sums.resize(row_blocks);
    partial.resize(blocks * DENSE), head_sums.resize(blocks * HEADS), squares.resize(blocks * 4);
    block_finite.assign(blocks, 1), std::copy_n(rule.direction + 1, 3, momenta);
    for (int c = 0; c < p.C && p.C <= LANES; c++)
      for (int lane = 0, i = c; lane < LANES; lane++, i = i + 1 == p.C ? 0 : i + 1) inner[c][lane] = i;
  }

  // Where the right vectors of a line begin. Most tensors have only one line of these, and divisions take long.
  int64_t right_of(int64_t line) const {
    return part.A * part.B == 1 ? 0 : (line / (part.X * part.B) * part.B + line % part.B) * length;
  }
};

// Before pass A: the mean of each row of a gradient that is to be centered, of so many rows in a task.

int64_t rows_at_once(const Work& w) { return std::max<int64_t>(1, BLOCK / w.fan_in); }

void average_rows(Work& w, int64_t block, float share) {
  int64_t first = block * rows_at_once(w), last = std::min(w.part.rows, first + rows_at_once(w));
  for (int64_t row = first; row < last; row++) {
    double total = 0;
    for (int64_t start = 0; start < w.fan_in; start += CHUNK) {
      const float* g = w.part.grad + row * w.fan_in + start;
      int64_t n = std::min<int64_t>(CHUNK, w.fan_in - start), i = 0;
      V sums = {};
      for (; i + LANES <= n; i += LANES) sums += load(g + i);
      if (i < n) sums += load(g + i, (int)(n - i));
      total += sum(sums);
    }
    w.row_means[row] = share * (float)(total / w.fan_in);
  }
}

// Pass A

// Sums of squares of a line, and for each of its columns; of the numbers themselves too. `mean` is taken from them.
V add_line(const float* g, float mean, int64_t length, float* left, float* right) {
  V sums = {}, squares = {};
  auto add = [&](int64_t i, int n) {
    V x = without(get<V>(g + i, n), mean), square = x * x;
    sums += x, squares += square;
    set(right + i, get<V>(right + i, n) + square, n);
  };
  int64_t i = 0;
  for (; i + LANES <= length; i += LANES) add(i, LANES);
  if (i < length) add(i, (int)(length - i));
  left[0] = sum(squares);
  return sums;
}

// The same of a line with inner dims, (Y, C): a sum for each of the C.
V add_line(const float* g, float mean, int64_t length, int64_t C, float* left, float* right) {
  V sums = {}, phases[LANES];
  for (int64_t p = 0; p < std::min<int64_t>(C, LANES); p++) phases[p] = V{};
  int phase = 0, forward = (int)(LANES % C);
  for (int64_t i = 0; i < length; i += LANES) {
    int n = (int)std::min<int64_t>(LANES, length - i);
    V x = without(get<V>(g + i, n), mean), square = x * x;
    sums += x;
    if (C <= LANES) {
      phases[phase] += square;
      phase += forward, phase -= phase >= C ? (int)C : 0;
    }
    set(right + i, get<V>(right + i, n) + square, n);
  }
  if (C <= LANES) {
    float folded[2 * LANES] = {};
    for (int p = 0; p < C; p++) store(folded + p, load(folded + p) + phases[p]);
    for (int c = 0; c < C; c++) left[c] = folded[c];
    for (int i = (int)C, c = 0; i < C + LANES; i++, c = c + 1 == C ? 0 : c + 1) left[c] += folded[i];
  } else {
    for (int64_t c = 0; c < C; c++) left[c] = 0;
    for (int64_t y = 0; y < length; y += C)
      for (int64_t c = 0; c < C; c++) {
        float x = without(g[y + c], mean);
        left[c] += x * x;
      }
  }
  return sums;
}

void sum_squares(Work& w, int64_t block) {
  const Part& t = w.part;
  int64_t first = block * w.lines_per_row_block, last = std::min(w.lines, first + w.lines_per_row_block);
  double total = 0;
  for (int64_t line = first; line < last; line++) {
    const float* g = t.grad + line * w.length;
    float* right = w.right_sums.data() + block * w.n_right + w.right_of(line);
    float* left = w.left.data() + line * t.C;
    float mean = w.fan_in ? w.row_means[line * w.length / w.fan_in] : 0;  // a line lies in one row
    total += sum(t.C == 1 ? add_line(g, mean, w.length, left, right) : add_line(g, mean, w.length, t.C, left, right));
  }
  w.grad_sums[block] = total;
}

// New second moments (3, n) from old ones and means of squares, in place of the means; false if one is not finite.
bool average(const Rule& rule, const float* old, float* means, int64_t n) {
  for (int k = 2; k >= 0; k--) {  // backwards: the means lie where the first of the three go
    float decay = rule.adafactor[k], rest = 1 - decay;
    for (int64_t i = 0; i < n; i++) means[k * n + i] = decay * old[k * n + i] + rest * means[i];
  }
  float check = 0;
#pragma omp simd reduction(+ : check)
  for (int64_t i = 0; i < 3 * n; i++) check += means[i] * 0;
  return check == 0;
}

// First-layer sums of the features that depend on second moments alone: `row` and `other` are their first rows in w0.
void add_hidden(Work& w, const float* moments, int64_t n, float* hidden, int row, int other) {
  const float* w0 = w.rule.weights;
  for (int k = 0; k < 3; k++) {
    const float* v = moments + k * n;
    double squares = 0, inverse_squares = 0;
#pragma omp simd reduction(+ : squares, inverse_squares)
    for (int64_t i = 0; i < n; i++) {
      float inverse = 1 / std::sqrt(v[i] + 1e-8f);
      squares += v[i] * v[i], inverse_squares += inverse * inverse;
    }
    float scale = inverse_rms(squares, n), inverse_scale = inverse_rms(inverse_squares, n), a[HIDDEN], b[HIDDEN];
    for (int j = 0; j < HIDDEN; j++) {
      a[j] = w0[(row + k) * HIDDEN + j], b[j] = w0[(row + k + 6) * HIDDEN + j];
      if (other) a[j] += w0[(other + k) * HIDDEN + j], b[j] += w0[(other + k + 6) * HIDDEN + j];
      a[j] *= scale, b[j] *= inverse_scale;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      float inverse = 1 / std::sqrt(v[i] + 1e-8f);
      for (int j = 0; j < HIDDEN; j++) hidden[j * n + i] += a[j] * v[i] + b[j] * inverse;
    }
  }
  for (int j = 0; j < HIDDEN; j++) {
    float high = 0;
#pragma omp simd reduction(max : high)
    for (int64_t i = 0; i < n; i++) high = std::max(high, std::fabs(hidden[j * n + i]));
    w.widest[j] += high;
  }
}

void vectors(Work& w) {
  const Part& t = w.part;
  const Rule& rule = w.rule;
  float bias[HIDDEN], step = *t.step;
  for (int j = 0; rule.needs_heads && j < HIDDEN; j++) {
    bias[j] = rule.weights[FEATURES * HIDDEN + j], w.widest[j] = 0;
    for (int i = 0; i < 11; i++)
      bias[j] += std::tanh(step / TIMESCALES[i] - 1) * rule.weights[(CHANNELS + i) * HIDDEN + j];
    std::fill_n(w.left_hidden.begin() + j * w.n_left, w.n_left, bias[j]);
  }
  int64_t nl = w.n_left, nr = w.n_right;
  float *left = w.left.data(), *right = w.right.data();
  if (!t.A) {
    double total = 0;
    for (int64_t i = 0; i < nl; i++) left[i] = t.grad[i] * t.grad[i] + 1e-30f, total += t.grad[i];
    w.mean_grad = w.scalars.sign * (float)(total / t.size);
    w.finite = average(rule, t.left, left, nl);
    if (!rule.needs_heads) return;
    float* roots = w.left_root.data();
    for (int64_t i = 0; i < 3 * nl; i++) roots[i] = clamped_rsqrt(left[i] + 1e-9f);
    for (int64_t i = 0; i < 3 * nl; i++) roots[3 * nl + i] = 1 / std::sqrt(left[i] + 1e-6f);
    add_hidden(w, left, nl, w.left_hidden.data(), 13, 16);
    return;
  }
  double total = 0;
  for (int64_t block = 0; block < w.row_blocks; block++) {
    const float* sums = w.right_sums.data() + block * nr;
    for (int64_t i = 0; i < nr; i++) right[i] += sums[i];
    total += w.grad_sums[block];
  }
  w.mean_grad = w.scalars.sign * (float)(total / t.size);
  for (int64_t i = 0; i < nl; i++) left[i] = left[i] / t.Y + 1e-30f;
  for (int64_t i = 0; i < nr; i++) right[i] = right[i] / t.X + 1e-30f;
  w.finite = average(rule, t.left, left, nl) & average(rule, t.right, right, nr);
  if (!rule.needs_heads) return;
  std::copy(left, left + 3 * nl, w.left_root.begin());
  std::copy(right, right + 3 * nr, w.right_root.begin());
  // The row moments are divided by their mean over the other factored dim.
  int64_t outer = t.left_is_row ? t.A : t.A * t.B, over = t.left_is_row ? t.X : t.Y;
  int64_t inner = t.left_is_row ? t.B * t.C : t.C;
  float* rows = t.left_is_row ? w.left_root.data() : w.right_root.data();
  for (int64_t a = 0; a < 3 * outer; a++)
    for (int64_t i = 0; i < inner; i++) {
      float* r = rows + a * over * inner + i;
      double mean = 0;
      for (int64_t x = 0; x < over; x++) mean += r[x * inner];
      float divisor = (float)(mean / over) + 1e-9f;
      for (int64_t x = 0; x < over; x++) r[x * inner] /= divisor;
    }
  for (float& x : w.left_root) x = clamped_rsqrt(x);
  for (float& x : w.right_root) x = clamped_rsqrt(x);
  add_hidden(w, left, nl, w.left_hidden.data(), t.left_is_row ? 13 : 16, 0);
  add_hidden(w, right, nr, w.right_hidden.data(), t.left_is_row ? 16 : 13, 0);
}

// A chunk's left and right vectors, one value for each coordinate.
struct Expanded {
  float root[3][CHUNK], hidden[HIDDEN][CHUNK], grad[CHUNK];
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
  const float *grad_root[3], *momentum_root[3], *hidden[HIDDEN], *grad;  // n numbers each
  float left_root[3] = {1, 1, 1}, left_hidden[HIDDEN] = {};  // beside these: a factor, and what is added
  float mean = 0;                                            // and what is taken from the gradient
};

constexpr int64_t LONG = 4 * LANES;  // lines from here on are runs of their own, with nothing copied

// A run's vectors for the network; those that must be made are put into `room`.
Run with_vectors(const Work& w, int64_t start, int64_t end, Expanded& room, bool with_hidden) {
  const Part& t = w.part;
  int64_t nl = w.n_left, nr = w.n_right, C = t.C;
  Run run{start, (int)std::min<int64_t>(CHUNK, end - start), {}, {}, {}, {}};
  if (!t.A) {
    for (int k = 0; k < 3; k++) {
      run.grad_root[k] = &w.left_root[k * nl + start];
      run.momentum_root[k] = &w.left_root[(3 + k) * nl + start];
    }
    for (int j = 0; j < HIDDEN; j++) run.hidden[j] = &w.left_hidden[j * nl + start];
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

// The run that begins at a coordinate and does not go beyond `end`.
template <bool heads>
Run run_at(const Work& w, int64_t start, int64_t end, Expanded& room, bool with_hidden) {
  const bool long_rows = w.fan_in >= LONG;
  if (long_rows) end = std::min(end, (start / w.fan_in + 1) * w.fan_in);
  Run run{start, (int)std::min<int64_t>(CHUNK, end - start), {}, {}, {}, {}};
  if (heads) run = with_vectors(w, start, end, room, with_hidden);
  run.grad = w.part.grad + start;
  if (long_rows) run.mean = w.row_means[start / w.fan_in];
  if (long_rows || !w.fan_in) return run;
  for (int64_t i = 0; i < run.n;) {
    int64_t row = (start + i) / w.fan_in, last = std::min<int64_t>(run.n, (row + 1) * w.fan_in - start);
    for (float mean = w.row_means[row]; i < last; i++) room.grad[i] = without(run.grad[i], mean);
  }
  run.grad = room.grad;
  return run;
}

}  // namespace
