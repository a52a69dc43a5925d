// The learned schedule of scheduled.cpp: the multipliers of one tensor's step. The math and the names are those of
// rules/scheduler.py, and of `growth` in rules/scheduled.py.

#pragma once

#include "step.h"

// FRACTIONS and LOG_STEPS, the numbers of knots, are set by scheduled.py.

namespace {

constexpr int FEATURES = 8;  // of a tensor, see scheduler.tensor_features

struct Schedule {  // constants and meta-parameters, in the order of scheduled.py
  Real fractions[FRACTIONS], log_steps[LOG_STEPS];
  Real log_lengths[2], largest_power, doubt;
  Real schedule_fraction[FRACTIONS], schedule_length[FRACTIONS];
  Real schedule_early[LOG_STEPS], schedule_step[LOG_STEPS];
  Real tensor_powers[2][2][FEATURES];
  Real momentum_mix[2][3];
  Real growth[2], centering[2], caution[2];
};

struct Rule : Common {
  Schedule schedule;
};

struct Shape {  // scheduler.shape_features
  Real is_vector, log_size, log_fan_in, log_depth;
};

struct MeanSquares {
  Real param, strength[3];  // of the value, and of the momenta / sqrt(second moment)
};

struct Multipliers {
  Real factor;      // of the whole step
  Real momenta[3];  // weights; they sum to 1
  Real caution;     // fraction of a step against the gradient that is held back
};

inline Real clamp(Real x, Real low, Real high) { return x < low ? low : x > high ? high : x; }  // NaN stays NaN

inline Real lerp(const Real (&ends)[2], Real fraction) { return ends[0] + fraction * (ends[1] - ends[0]); }

Real interpolate(Real x, const Real* knots, const Real* values, int n) {
  x = clamp(x, knots[0], knots[n - 1]);
  int i = 0;
  while (i < n - 2 && x > knots[i + 1]) i++;
  return lerp({values[i], values[i + 1]}, (x - knots[i]) / (knots[i + 1] - knots[i]));
}

// The fraction of the run that is done.
Real progress(const Rule& rule, double step) {
  if (!rule.num_steps) return Real(0.5);
  return std::min<Real>(1, (Real)step / std::max<Real>(1, rule.num_steps - 1));
}

// The fraction of its mean over the fan-in that is removed from a matrix's gradient.
Real centering_at(const Rule& rule, double step) {
  return clamp(lerp(rule.schedule.centering, progress(rule, step)), 0, 1);
}

// The log of the slowest momentum's squared strength when gradients are white noise.
Real noise_strength(const Rule& rule, double step) {
  const double b = rule.momentum[2], c = rule.rms, n = step + 1.0;
  const double of_momentum = std::log((1 - b) / (1 + b)) + std::log(-std::expm1(2 * n * std::log(std::abs(b))));
  return (Real)(of_momentum - std::log(-std::expm1(n * std::log(c))));
}

// What the growth of a matrix that only noise moves adds to its log factor.
Real growth_term(const Rule& rule, const Shape& shape, const MeanSquares& mean, double step) {
  const Real fan_in = std::log(Real(10)) * (shape.log_fan_in + Real(1.5));
  const Real grown = (std::log(clamp(mean.param, Real(1e-30), INFINITY)) + fan_in) / 2;
  const Real signal = std::log(clamp(mean.strength[2], Real(1e-12), INFINITY)) - noise_strength(rule, step);
  const Real noisy = clamp(2 - std::abs(signal) / rule.schedule.doubt, 0, 1);
  return lerp(rule.schedule.growth, progress(rule, step)) * clamp(grown, 0, INFINITY) * noisy;
}

// The log factor that all tensors have in common.
Real log_factor_at(const Rule& rule, double step) {
  const Schedule& s = rule.schedule;
  const Real log_step = std::log10((Real)step + 1);
  if (!rule.num_steps) return interpolate(log_step, s.log_steps, s.schedule_step, LOG_STEPS);
  const Real log_length = clamp(std::log10(rule.num_steps) - 3, s.log_lengths[0], s.log_lengths[1]);
  Real curve[FRACTIONS];
  for (int i = 0; i < FRACTIONS; i++) curve[i] = s.schedule_fraction[i] + s.schedule_length[i] * log_length;
  const Real log_factor = interpolate(progress(rule, step), s.fractions, curve, FRACTIONS);
  return log_factor + interpolate(log_step, s.log_steps, s.schedule_early, LOG_STEPS);
}

Multipliers multipliers_of(const Rule& rule, const Shape& shape, const MeanSquares& mean, double step) {
  const Schedule& s = rule.schedule;
  const Real fraction = progress(rule, step);
  const Real scale = std::log(clamp(mean.param, Real(1e-4), INFINITY) / Real(1e-2)) / 4;
  Real x[FEATURES] = {1, scale, shape.log_size, shape.log_fan_in, shape.log_depth};
  for (int k = 0; k < 3; k++) x[5 + k] = std::log(clamp(mean.strength[k], Real(1e-6), INFINITY)) / 4 + 1;

  const auto& powers = s.tensor_powers[shape.is_vector ? 0 : 1];
  Real own = 0;
  for (int i = 0; i < FEATURES; i++) own += lerp({powers[0][i], powers[1][i]}, fraction) * x[i];
  if (!shape.is_vector) own += growth_term(rule, shape, mean, step);

  Multipliers found;
  found.factor = std::exp(log_factor_at(rule, step) + clamp(own, -s.largest_power, s.largest_power));
  found.caution = clamp(lerp(s.caution, fraction), 0, 1);
  Real total = 0;
  for (int k = 0; k < 3; k++) {
    found.momenta[k] = std::exp(lerp({s.momentum_mix[0][k], s.momentum_mix[1][k]}, fraction));
    total += found.momenta[k];
  }
  for (Real& weight : found.momenta) weight /= total;
  return found;
}

}  // namespace
