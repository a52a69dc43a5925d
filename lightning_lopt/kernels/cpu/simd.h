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

// 1 / sqrt(x) for x > 0, 0 for infinity. AVX-512 has an instruction that does most of it.
#ifdef __AVX512F__
inline V inverse_root(V x) {
  const V y = (V)_mm512_rsqrt14_ps((__m512)x);
  const V correction = 1.5f - 0.5f * x * y * y;  // a Newton step, from 14 bits to all; NaN where x is infinite
  const __mmask16 finite = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(INFINITY), _CMP_NEQ_UQ);
  return (V)_mm512_maskz_mul_ps(finite, (__m512)y, (__m512)correction);
}
#else
inline V inverse_root(V x) {
  for (int i = 0; i < LANES; i++) x[i] = 1.0f / std::sqrt(x[i]);
  return x;
}
#endif

}  // namespace
