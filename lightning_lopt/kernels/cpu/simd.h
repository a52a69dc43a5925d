// Vectors of numbers, by the vector types of GCC and Clang: the compiler turns them into what the processor has. The
// numbers are floats; a library that is compiled with DOUBLE is the same in double precision.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && !defined(DOUBLE)
#define AVX512_FLOATS  // instructions for these are named below
#endif

namespace {

#ifdef DOUBLE
typedef double Real;
typedef int64_t Bits;
#else
typedef float Real;
typedef int32_t Bits;
#endif

// As many numbers as the processor's vectors hold: the compiler takes wider ones apart, number by number.
#if defined(__AVX512F__)
constexpr int WIDTH = 64;
#elif defined(__AVX__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
constexpr int LANES = WIDTH / sizeof(Real);

typedef Real V __attribute__((vector_size(WIDTH)));
typedef Bits VI __attribute__((vector_size(WIDTH)));

// Memory. With a number n <= LANES of coordinates, the rest of a vector is 0, and is not stored.

inline V load(const Real* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(Real* p, V v) { std::memcpy(p, &v, sizeof v); }

#ifdef AVX512_FLOATS
inline __mmask16 first(int n) { return (__mmask16)((1u << n) - 1); }
inline V load(const Real* p, int n) { return n == LANES ? load(p) : (V)_mm512_maskz_loadu_ps(first(n), p); }
inline void store(Real* p, V v, int n) {
  if (n == LANES)
    store(p, v);
  else
    _mm512_mask_storeu_ps(p, first(n), (__m512)v);
}
inline V head_of(V v, int n) { return (V)_mm512_maskz_mov_ps(first(n), (__m512)v); }
#else
inline V load(const Real* p, int n) {
  if (n == LANES) return load(p);
  V v = {};
  std::memcpy(&v, p, n * sizeof(Real));
  return v;
}
inline void store(Real* p, V v, int n) {
  if (n == LANES)
    store(p, v);
  else
    std::memcpy(p, &v, n * sizeof(Real));
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

inline V each(Real x) { return x - V{}; }  // 0 + x would be an addition, because of the sign of zero
inline V flipped(V x, VI sign_bits) { return (V)((VI)x ^ sign_bits); }

#ifdef AVX512_FLOATS
inline Real sum(V v) { return _mm512_reduce_add_ps((__m512)v); }
#else
inline Real sum(V v) {
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}
#endif

// 1 / sqrt(x) for x > 0, 0 for infinity.
#ifdef AVX512_FLOATS
inline V inverse_root(V x) {
  const V y = (V)_mm512_rsqrt14_ps((__m512)x);
  const V correction = 1.5f - 0.5f * x * y * y;  // a Newton step, from 14 bits to all; NaN where x is infinite
  const __mmask16 finite = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(INFINITY), _CMP_NEQ_UQ);
  return (V)_mm512_maskz_mul_ps(finite, (__m512)y, (__m512)correction);
}
#else
inline V inverse_root(V x) {
  for (int i = 0; i < LANES; i++) x[i] = 1 / std::sqrt(x[i]);
  return x;
}
#endif

}  // namespace
