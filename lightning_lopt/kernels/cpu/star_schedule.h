// The learned scheduler: a tensor's factor and the weights of its momenta; rules/scheduler.py, from where the names are.

#pragma once

#include "star_vectors.h"

// FRACTIONS and LOG_STEPS, numbers of knots, are set by star.py.

namespace {

struct Schedule {  // as packed by star.py: the scheduler's constants and meta-parameters
  float fractions[FRACTIONS], log_steps[LOG_STEPS], log_lengths[2], largest_power, doubt;
  float schedule_fraction[FRACTIONS], schedule_length[FRACTIONS];
  float schedule_early[LOG_STEPS], schedule_step[LOG_STEPS];
  float tensor_powers[2][2][8], momentum_mix[2][3], growth[2], centering[2], caution[2];
};

inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }  // NaN stays

inline float lerp(float start, float end, float fraction) { return start + fraction * (end - start); }

float interpolate(float x, const float* knots, const float* values, int n) {
  x = clamp(x, knots[0], knots[n - 1]);
  int i = 0;
  while (i < n - 2 && x > knots[i + 1]) i++;
  return lerp(values[i], values[i + 1], (x - knots[i]) / (knots[i + 1] - knots[i]));
}

// The fraction of the run that is done.
float progress(const Work& w) {
  float step = *w.part.step, length = w.rule.num_steps;
  return length ? std::min(1.0f, step / std::max(1.0f, length - 1)) : 0.5f;
}

const Schedule& schedule_of(const Work& w) { return *reinterpret_cast<const Schedule*>(w.rule.schedule); }

// How much of its rows' means is taken out of the gradient; 0 where nothing is.
float centering(const Work& w) {
  if (!w.rule.scheduled || !w.part.rows) return 0;
  const Schedule& s = schedule_of(w);
  return clamp(lerp(s.centering[0], s.centering[1], progress(w)), 0, 1);
}

// The logarithm of the slowest momentum's squared strength in white noise.
float noise_strength(const Work& w) {
  double b = w.rule.momentum[2], c = w.rule.rms, n = *w.part.step + 1.0;
  double of_momentum = std::log((1 - b) / (1 + b)) + std::log(-std::expm1(2 * n * std::log(std::abs(b))));
  return (float)(of_momentum - std::log(-std::expm1(n * std::log(c))));
}

// means: of the squares of the parameter and of the three momenta / sqrt(second moment)
void schedule(Work& w, const float (&means)[4]) {
  const Schedule& s = schedule_of(w);
  const float* shape = w.scalars.shape;
  float step = *w.part.step, length = w.rule.num_steps, curve[FRACTIONS], log_factor;
  float log_step = std::log10(step + 1);
  float fraction = progress(w);
  if (length) {
    float log_length = clamp(std::log10(length) - 3, s.log_lengths[0], s.log_lengths[1]);
    for (int i = 0; i < FRACTIONS; i++) curve[i] = s.schedule_fraction[i] + s.schedule_length[i] * log_length;
    log_factor = interpolate(fraction, s.fractions, curve, FRACTIONS);
    log_factor += interpolate(log_step, s.log_steps, s.schedule_early, LOG_STEPS);
  } else {
    log_factor = interpolate(log_step, s.log_steps, s.schedule_step, LOG_STEPS);
  }
  float x[8] = {1, std::log(clamp(means[0], 1e-4f, INFINITY) / 1e-2f) / 4, shape[1], shape[2], shape[3]}, own = 0;
  for (int k = 0; k < 3; k++) x[5 + k] = std::log(clamp(means[1 + k], 1e-6f, INFINITY)) / 4 + 1;
  const float(*powers)[8] = s.tensor_powers[shape[0] > 0 ? 0 : 1];
  for (int i = 0; i < 8; i++) own += lerp(powers[0][i], powers[1][i], fraction) * x[i];
  if (shape[0] == 0) {  // see scheduler.growth
    float grown = (std::log(clamp(means[0], 1e-30f, INFINITY)) + 2.302585f * (shape[2] + 1.5f)) / 2;
    float signal = std::log(clamp(means[3], 1e-12f, INFINITY)) - noise_strength(w);
    float noisy = clamp(2 - std::abs(signal) / s.doubt, 0, 1);
    own += lerp(s.growth[0], s.growth[1], fraction) * clamp(grown, 0, INFINITY) * noisy;
  }
  w.factor = std::exp(log_factor + clamp(own, -s.largest_power, s.largest_power));
  w.caution = clamp(lerp(s.caution[0], s.caution[1], fraction), 0, 1);
  if (!w.rule.mixed) return;
  float total = 0;
  for (int k = 0; k < 3; k++) total += w.momenta[k] = std::exp(lerp(s.momentum_mix[0][k], s.momentum_mix[1][k], fraction));
  for (float& m : w.momenta) m /= total;
}

}  // namespace
