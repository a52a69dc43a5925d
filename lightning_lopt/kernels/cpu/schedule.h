// The learned schedule of scheduled.cpp: the multipliers of one tensor's step. The math and the names are those of
// rules/scheduler.py, and of `multipliers` in rules/scheduled.py.

#pragma once

#include "step.h"

// FRACTIONS and LOG_STEPS, the numbers of knots, are set by scheduled.py.

namespace {

constexpr int FEATURES = 8;  // of a tensor, see scheduler.tensor_features
constexpr int ROLES = 3;     // see scheduled.ROLE_FEATURES

struct Schedule {  // constants and meta-parameters, in the order of scheduled.py
  Real fractions[FRACTIONS], log_steps[LOG_STEPS];
  Real log_lengths[2], largest_power, doubt, usual, floors[2];
  Real schedule_fraction[FRACTIONS], schedule_length[FRACTIONS];
  Real schedule_early[LOG_STEPS], schedule_step[LOG_STEPS];
  Real tensor_powers[2][2][FEATURES];
  Real momentum_mix[2][3];
  Real growth[2], centering[2], caution[2];
  Real roles[ROLES][2], first_scale, cap, decay;
};

struct Rule : Common {
  Schedule schedule;
};

struct Shape {  // scheduler.shape_features and scheduled.role_features
  Real is_vector, log_size, log_fan_in, log_depth;
  Real role[ROLES];
};

struct MeanSquares {
  Real param, strength[3];  // of the value, and of the momenta / sqrt(second moment)
  Real first;               // of the value before the first step
};

struct Multipliers {
  Real factor;      // of the whole step
  Real momenta[3];  // weights; they sum to 1
  Real caution;     // fraction of a step against the gradient that is held back
  Real decay;       // fraction of the value that is taken off
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

// The natural logarithm of a matrix's fan-in.
inline Real log_fan_in(const Shape& shape) { return std::log(Real(10)) * (shape.log_fan_in + Real(1.5)); }

// What the growth of a matrix that only noise moves adds to its log factor.
Real growth_term(const Rule& rule, const Shape& shape, const MeanSquares& mean, double step) {
  const Real grown = (std::log(clamp(mean.param, Real(1e-30), INFINITY)) + log_fan_in(shape)) / 2;
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

// The log of a matrix's first root mean square relative to the usual one, at most 0; 0 where it began at 0.
Real first_scale(const Rule& rule, const Shape& shape, const MeanSquares& mean) {
  if (!(mean.first > 0)) return 0;
  const Real log_scale = (std::log(clamp(mean.first, Real(1e-30), INFINITY)) + log_fan_in(shape)) / 2;
  return std::min(Real(0), log_scale - std::log(rule.schedule.usual));
}

// The schedule's curve over the run relative to its highest point.
Real annealed(const Rule& rule, double step) {
  const Schedule& s = rule.schedule;
  if (!rule.num_steps) return 1;
  const Real highest = *std::max_element(s.schedule_fraction, s.schedule_fraction + FRACTIONS);
  return std::exp(interpolate(progress(rule, step), s.fractions, s.schedule_fraction, FRACTIONS) - highest);
}

// The fraction that a matrix loses in a step, besides the update.
Real decay_at(const Rule& rule, double step) {
  const double length = rule.num_steps ? std::max(10.0, (double)rule.num_steps) : std::max(1000.0, step + 1);
  return (Real)(rule.schedule.decay * annealed(rule, step) / length);
}

// The factor with which a matrix moves no farther than the cap allows, relative to its root mean square.
Real capped(const Rule& rule, const Multipliers& found, const MeanSquares& mean, double step) {
  Real direction = 0;
  for (int k = 0; k < 3; k++) direction += found.momenta[k] * std::sqrt(clamp(mean.strength[k], Real(1e-30), INFINITY));
  const Real floor = rule.schedule.floors[mean.first == 0 ? 0 : 1];
  const Real scale = std::max(std::sqrt(clamp(mean.param, Real(1e-30), INFINITY)), floor);
  const Real cap = std::exp(rule.schedule.cap) * scale * annealed(rule, step);
  return std::min(found.factor, cap / (rule.nominal * direction));
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
  if (!shape.is_vector) {
    own += growth_term(rule, shape, mean, step);
    for (int i = 0; i < ROLES; i++) own += shape.role[i] * (s.roles[i][0] + s.roles[i][1] * shape.log_fan_in);
    own += s.first_scale * first_scale(rule, shape, mean);
  }

  Multipliers found;
  found.factor = std::exp(log_factor_at(rule, step) + clamp(own, -s.largest_power, s.largest_power));
  found.caution = clamp(lerp(s.caution, fraction), 0, 1);
  Real total = 0;
  for (int k = 0; k < 3; k++) {
    found.momenta[k] = std::exp(lerp({s.momentum_mix[0][k], s.momentum_mix[1][k]}, fraction));
    total += found.momenta[k];
  }
  for (Real& weight : found.momenta) weight /= total;
  if (!shape.is_vector) found.factor = capped(rule, found, mean, step);
  found.decay = shape.is_vector ? 0 : decay_at(rule, step);
  return found;
}

}  // namespace
