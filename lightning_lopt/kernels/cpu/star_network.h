// The network of star.cpp, for one vector of coordinates or for two, and what is read for it.

#pragma once

#include "star_vectors.h"

namespace {

// Coordinates next to each other: what the step reads of them, and their new moments.
template <typename T>
struct Coordinates {
  T grad, param, momentum[3], second;

  inline Coordinates(const Rule& rule, const Tensor& t, VI flip, int64_t at, int n) {
    grad = flipped(get<T>(t.grad + at, n), flip);
    param = get<T>(t.param + at, n);
    for (int k = 0; k < 3; k++) {
      T old = in_register(get<T>(t.exp_avg + k * t.size + at, n));
      momentum[k] = old + (grad - old) * (1 - rule.momentum[k]);  // a multiplication less than with two weights
    }
    T old = in_register(get<T>(t.exp_avg_sq + at, n));
    second = old + (grad * grad - old) * (1 - rule.rms);
  }
};

// Weights behind the first layer: later hidden layers, then the heads; each with its biases in the last row.
constexpr int LATER = (LAYERS - 1) * (HIDDEN + 1) * HIDDEN + (HIDDEN + 1) * HEADS;

const float* later_weights(const Rule& rule) { return rule.weights + (FEATURES + 1) * HIDDEN; }

// The first layer, feature by feature. Of features that are products, such as momentum * root, the momentum is
// multiplied only once: momentum * (weight + weight * root + ...).
template <typename T>
inline void first_layer(const Coordinates<T>& c, T root, const Run& run, int i, int n, const float* weights, T* h) {
  auto weight = [&](int feature, int j) { return weights[feature * HIDDEN + j]; };
  T of_grad[3];
  for (int k = 0; k < 3; k++) of_grad[k] = in_register(get<T>(run.grad_root[k] + i, n));
  for (int j = 0; j < HIDDEN; j++) {
    T by_grad = same<T>(weight(0, j));
    for (int k = 0; k < 3; k++) by_grad += of_grad[k] * weight(10 + k, j);
    h[j] += c.grad * by_grad;
    h[j] += c.param * weight(1, j);
    h[j] += c.second * weight(5, j);
    h[j] += root * weight(9, j);
  }
  for (int k = 0; k < 3; k++) {
    T of_momentum = in_register(get<T>(run.momentum_root[k] + i, n));
    for (int j = 0; j < HIDDEN; j++) {
      T by_momentum = same<T>(weight(2 + k, j));
      by_momentum += root * weight(6 + k, j);
      by_momentum += of_momentum * weight(13 + k, j);
      h[j] += c.momentum[k] * by_momentum;
    }
  }
}

// From the first layer's sums to the heads that are asked for.
template <typename T>
inline void later_layers(const float* later, const int32_t (&heads)[4], T* h, T* head) {
  for (int number = 1; number < LAYERS; number++) {
    const float* weight = later + (number - 1) * (HIDDEN + 1) * HIDDEN;
    T next[HIDDEN];
    for (int o = 0; o < HIDDEN; o++) next[o] = same<T>(weight[HIDDEN * HIDDEN + o]);
    for (int j = 0; j < HIDDEN; j++) {
      T r = positive(h[j]);
      for (int o = 0; o < HIDDEN; o++) next[o] += r * weight[j * HIDDEN + o];
    }
    for (int j = 0; j < HIDDEN; j++) h[j] = next[j];
  }
  const float* weight = later + (LAYERS - 1) * (HIDDEN + 1) * HIDDEN;
  for (int j = 0; j < HIDDEN; j++) h[j] = positive(h[j]);
  for (int o = 0; o < HEADS; o++) {
    if (!heads[o]) continue;
    head[o] = same<T>(weight[HIDDEN * HEADS + o]);
    for (int j = 0; j < HIDDEN; j++) head[o] += h[j] * weight[j * HEADS + o];
  }
}

}  // namespace
