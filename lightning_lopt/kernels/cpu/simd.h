// Vectors of floats, by the vector types of GCC and Clang: the compiler turns them into what the processor has.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// As many numbers as the processor's vectors hold: the compiler takes wider ones apart, number by number.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t VI __attribute__((vector_size(4 * LANES)));

// Memory. With a number n <= LANES of coordinates, the rest of a vector is 0, and is not stored.

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }

#ifdef __AVX512F__
inline __mmask16 first(int n) { return (__mmask16)((1u << n) - 1); }
inline V load(const float* p, int n) { return n == LANES ? load(p) : (V)_mm512_maskz_loadu_ps(first(n), p); }
inline void store(float* p, V v, int n) {
  if (n == LANES)
    store(p, v);
  else
    _mm512_mask_storeu_ps(p, first(n), (__m512)v);
}
inline V head_of(V v, int n) { return (V)_mm512_maskz_mov_ps(first(n), (__m512)v); }
#else
inline V load(const float* p, int n) {
  if (n == LANES) return load(p);
  V v = {};
  std::memcpy(&v, p, 4 * n);
  return v;
}
inline void store(float* p, V v, int n) {
  if (n == LANES)
    store(p, v);
  else
    std::memcpy(p, &v, 4 * n);
}
inline V head_of(V v, int n) {
  for (int i = n; i < LANES; i++) v[i] = 0;
  return v;
}
#endif

// Keeps what was read in a register, where the compiler would rather read it from memory wherever it is used.
#ifdef __AVX512F__
inline V in_register(V x) {
  asm("" : "+v"(x));
  return x;
}
#else
inline V in_register(V x) { return x; }
#endif

// Arithmetic

inline V each(float x) { return x - V{}; }  // 0 + x would be an addition, because of the sign of zero
inline V relu(V x) { return x > 0 ? x : V{}; }
inline V larger(V a, V b) { return a > b ? a : b; }
inline V smaller(V a, V b) { return a < b ? a : b; }
inline V magnitude(V a) { return a < 0 ? -a : a; }
inline V flipped(V x, VI sign_bits) { return (V)((VI)x ^ sign_bits); }

#ifdef __AVX512F__
inline float sum(V v) { return _mm512_reduce_add_ps((__m512)v); }
#else
inline float sum(V v) {
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}
#endif

inline V permuted(V table, VI index) {
#if defined(__clang__)
  V out;
  for (int i = 0; i < LANES; i++) out[i] = table[index[i]];
  return out;
#else
  return __builtin_shuffle(table, index);
#endif
}

// Polynomial of e^r for |r| <= log(2) / 2.
inline V power_series(V r) {
  V e = r * 1.9875691500e-4f + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 0.5f;
  return e * (r * r) + (r + 1.0f);
}

// e^x = 2^n e^r, and 1 / sqrt(x) for x > 0, 0 for infinity. AVX-512 has instructions that do most of either.
#ifdef __AVX512F__
inline V exponential(V x) {
  V n = (V)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  V r = x - n * 0.693359375f;
  return (V)_mm512_scalef_ps((__m512)power_series(r + n * 2.12194440e-4f), (__m512)n);
}

inline V inverse_root(V x) {
  const V y = (V)_mm512_rsqrt14_ps((__m512)x);
  const V correction = 1.5f - 0.5f * x * y * y;  // a Newton step, from 14 bits to all; NaN where x is infinite
  const __mmask16 finite = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(INFINITY), _CMP_NEQ_UQ);
  return (V)_mm512_maskz_mul_ps(finite, (__m512)y, (__m512)correction);
}
#else
inline V exponential(V x) {
  x = x > 89.0f ? each(89.0f) : x;  // infinity from 88.4 on
  x = x < -87.0f ? each(-87.0f) : x;
  V shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // 1.5 * 2^23: n is in the low bits
  V r = x - n * 0.693359375f;
  VI bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - (0x4B400000 - 127)) << 23;
  V power;
  std::memcpy(&power, &bits, sizeof power);
  return power_series(r + n * 2.12194440e-4f) * power;
}

inline V inverse_root(V x) {
  for (int i = 0; i < LANES; i++) x[i] = 1.0f / std::sqrt(x[i]);
  return x;
}
#endif

}  // namespace
