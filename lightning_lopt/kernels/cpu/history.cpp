// The fused steps of k Momentums, MNG, k Timesteps and Multiscale Adam on the CPU; history.py builds and calls them.
// The maths is that of rules/history.py and rules/multiscale_adam.py and is tested against it; the names are theirs.
// One pass: every coordinate's k averages or slots are read, used and written once. Coordinates do not depend on each
// other, so that results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include "simd.h"

// Set by history.py: K timescales, INPUTS, HIDDEN units in each of LAYERS hidden layers (0: no network), OUTPUTS.
// Outputs under a softmax are relative to the first of them, which is left out: of two signs the difference is there.

namespace {

constexpr int64_t ALONE = 1 << 17;  // coordinates that are worth a thread

struct Part {  // as in history.py
  float* param;
  const float* grad;
  float *first, *second;  // (K, size): params and grads of a history, exp_avg and exp_avg_sq of the Adams
  int64_t size, slot;     // slot: where a ring is written, -1 for all of it
};

struct Settings {  // as in history.py
  const float* weights;  // w0, b0, w1, b1, ..., one after the other; of a linear mixer the weights it applies
  float rate[2][K];      // of the averages
  float offset[K], factor[K];  // Adams: what is added to second moments, and multiplies m / root
  float scale, decay, sign, eta;  // new value = value + scale * delta - decay * value; eta: eta_min of a history
  int32_t timesteps, mid_range, readout, signs, threads;  // readout: 0 mean, 1 softmax of magnitudes and signs, 2 tanh
};

// Units [0, N) of a layer, weights (IN, OUT) with rows OUT apart: x (IN) -> y (N).
template <int IN, int OUT, int N>
inline void units(const float* w, const float* b, const V* x, V* y, bool rectified) {
  V sums[N];
  for (int j = 0; j < N; j++) sums[j] = each(b[j]);
  for (int i = 0; i < IN; i++)
    for (int j = 0; j < N; j++) sums[j] += x[i] * w[i * OUT + j];
  for (int j = 0; j < N; j++) y[j] = rectified ? relu(sums[j]) : sums[j];
}

template <int IN, int OUT>
inline const float* layer(const float* w, const V* x, V* y, bool rectified) {
  constexpr int TILE = OUT == 0 ? 1 : OUT < 15 ? OUT : 10, REST = OUT % TILE;  // sums that stay in registers
  const float* b = w + IN * OUT;
  for (int j = 0; j + TILE <= OUT; j += TILE) units<IN, OUT, TILE>(w + j, b + j, x, y + j, rectified);
  if constexpr (REST > 0) units<IN, OUT, REST>(w + OUT - REST, b + OUT - REST, x, y + OUT - REST, rectified);
  return b + OUT;
}

inline void network(const float* w, const V* x, V* y) {
#if LAYERS > 0
  V hidden[2][HIDDEN];
  w = layer<INPUTS, HIDDEN>(w, x, hidden[0], true);
  for (int i = 1; i < LAYERS; i++) w = layer<HIDDEN, HIDDEN>(w, hidden[(i + 1) % 2], hidden[i % 2], true);
  layer<HIDDEN, OUTPUTS>(w, hidden[(LAYERS + 1) % 2], y, false);
#endif
}

// Softmax of 0 and y (N), which are left as exponentials after that of the former; the sum of all is returned.
template <int N>
inline V exponentials(const V* y, V* e) {
  V high = {}, total;
  for (int j = 0; j < N; j++) high = larger(high, y[j]);
  total = e[0] = exponential(-high);
  for (int j = 0; j < N; j++) total += e[j + 1] = exponential(y[j] - high);
  return total;
}

inline V hyperbolic_tangent(V x) {  // by e^-2|x|, which does not overflow
  V e = exponential(-2.0f * magnitude(x)), t = (1.0f - e) / (1.0f + e);
  return x < 0 ? -t : t;
}

inline V average(V old, V fresh, float rate) { return old + rate * (fresh - old); }

inline V adams(const Settings& s, const Part& p, int64_t at, int n, V grad) {
  V directions[K], delta = {};
  for (int j = 0; j < K; j++) {
    float *m_at = p.first + j * p.size + at, *v_at = p.second + j * p.size + at;
    V m = average(load(m_at, n), grad, s.rate[0][j]), v = average(load(v_at, n), grad * grad, s.rate[1][j]);
    store(m_at, m, n), store(v_at, v, n);
    directions[j] = s.factor[j] * (m * inverse_root(v + s.offset[j]));
  }
#if LAYERS > 0
  V y[OUTPUTS], e[K];
  network(s.weights, directions, y);
  V total = exponentials<K - 1>(y, e);
  for (int j = 0; j < K; j++) delta += e[j] * directions[j];
  return s.eta * delta / total;
#else
  for (int j = 0; j < K; j++) delta += s.weights[j] * directions[j];
  return s.eta * delta;
#endif
}

inline V history(const Settings& s, const Part& p, int64_t at, int n, V grad, V value) {
  V x[K], high, low, most = {}, step = {};
  for (int j = 0; j < K; j++) {
    float *x_at = p.first + j * p.size + at, *g_at = p.second + j * p.size + at;
    V param = value;
    x[j] = grad;
    if (!s.timesteps) {
      param = average(load(x_at, n), value, s.rate[0][j]), x[j] = average(load(g_at, n), grad, s.rate[0][j]);
    } else if (p.slot >= 0 && p.slot != j) {
      param = load(x_at, n), x[j] = load(g_at, n);
    }
    if (!s.timesteps || p.slot < 0 || p.slot == j) store(x_at, param, n), store(g_at, x[j], n);
    high = j ? larger(high, param) : param, low = j ? smaller(low, param) : param;
    most = larger(most, magnitude(x[j]));
  }
  V divisor = most == 0 ? each(1.0f) : most;
  for (int j = 0; j < K; j++) x[j] = s.signs ? (x[j] > 0 ? each(1.0f) : V{}) - (x[j] < 0 ? each(1.0f) : V{}) : x[j] / divisor;
#if LAYERS > 0
  V y[OUTPUTS];
  network(s.weights, x, y);
  if (s.readout == 1) {
    V e[OUTPUTS], sign = hyperbolic_tangent(0.5f * y[OUTPUTS - 1]), total = exponentials<OUTPUTS - 1>(y, e);
    for (int j = 1; j < OUTPUTS; j++) step += e[j] * (j / (float)(OUTPUTS - 1));
    step = step * sign / total;
  } else {
    step = hyperbolic_tangent(y[0]);
  }
#else
  for (int j = 0; j < K; j++) step += x[j];
  step /= (float)K;
#endif
  V delta = -step * (high - low + s.eta);
  return s.mid_range ? delta + 0.5f * (high - value) + 0.5f * (low - value) : delta;
}

template <bool ADAMS>
void move(const Settings& s, const Part& p, int64_t start, int64_t end) {
  for (int64_t at = start; at < end; at += LANES) {
    int n = (int)std::min<int64_t>(LANES, end - at);
    V grad = load(p.grad + at, n) * s.sign, value = load(p.param + at, n);
    V delta = ADAMS ? adams(s, p, at, n, grad) : history(s, p, at, n, grad, value);
    store(p.param + at, value + s.scale * delta - s.decay * value, n);
  }
}

template <bool ADAMS>
void run(const Settings& s, const Part& p) {
  int64_t count = std::max<int64_t>(1, std::min<int64_t>(s.threads, p.size / ALONE));
  int64_t share = (p.size / count + LANES - 1) / LANES * LANES;
  std::vector<std::thread> others;
  for (int64_t i = 1; i < count; i++)
    others.emplace_back(move<ADAMS>, std::cref(s), std::cref(p), i * share, i + 1 == count ? p.size : (i + 1) * share);
  move<ADAMS>(s, p, 0, count == 1 ? p.size : share);
  for (auto& other : others) other.join();
}

}  // namespace

extern "C" void multiscale_adam_step(const Settings* s, const Part* p) { run<true>(*s, *p); }
extern "C" void history_step(const Settings* s, const Part* p) { run<false>(*s, *p); }

// 1 where all of g * g and of x are finite, for the safeguard: then so are the new state and the step.
extern "C" int32_t all_finite(const float* g, const float* x, int64_t n) {
  float check = 0;
#pragma omp simd reduction(+ : check)
  for (int64_t i = 0; i < n; i++) check += (g[i] * g[i] + x[i]) * 0;
  return check == 0;
}
