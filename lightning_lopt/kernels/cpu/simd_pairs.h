// Two vectors that are worked on in turns: a processor that need not wait for the result of either is twice as fast in
// what is one long chain of multiplications, such as a network. The functions below take both, V and Two, as T.

#pragma once

#include "simd.h"

// HIDDEN, the number of units of a layer, is set by star.py.

namespace {

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

// e^x = 2^n e^r. AVX-512 has instructions that do most of it.
#ifdef __AVX512F__
inline V exponential(V x) {
  V n = (V)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  V r = x - n * 0.693359375f;
  return (V)_mm512_scalef_ps((__m512)power_series(r + n * 2.12194440e-4f), (__m512)n);
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
#endif

#ifdef __AVX512F__
constexpr bool PAIRS = HIDDEN <= 8;  // two vectors of each unit fit into 32 registers
#else
constexpr bool PAIRS = false;
#endif

struct Two {
  V a, b;
  static constexpr int SIZE = 2 * LANES;
};

#define IN_TURNS(OP)                                                             \
  inline Two operator OP(Two x, Two y) { return {x.a OP y.a, x.b OP y.b}; }      \
  inline Two operator OP(Two x, float y) { return {x.a OP y, x.b OP y}; }        \
  inline Two& operator OP##=(Two & x, Two y) { return x = x OP y; }              \
  inline Two& operator OP##=(Two & x, float y) { return x = x OP y; }
IN_TURNS(+)
IN_TURNS(-)
IN_TURNS(*)
#undef IN_TURNS

// n numbers at p: all that fit, or, of a single vector, fewer.
template <typename T> inline T get(const float* p, int n);
template <> inline V get<V>(const float* p, int n) { return load(p, n); }
template <> inline Two get<Two>(const float* p, int) { return {load(p), load(p + LANES)}; }

inline void set(float* p, V v, int n) { store(p, v, n); }
inline void set(float* p, Two v, int) {
  store(p, v.a);
  store(p + LANES, v.b);
}

template <typename T> inline T same(float x);
template <> inline V same<V>(float x) { return each(x); }
template <> inline Two same<Two>(float x) { return {each(x), each(x)}; }

#ifdef __AVX512F__
// The comparison of integers is not done by the units that add and multiply.
inline V positive(V x) { return (V)_mm512_max_epi32((__m512i)x, _mm512_setzero_si512()); }
inline bool is_small(V x) {
  return !_mm512_cmp_ps_mask(_mm512_abs_ps((__m512)x), _mm512_set1_ps(0.006f), _CMP_NLT_UQ);
}
#else
inline V positive(V x) { return x > 0 ? x : V{}; }
inline bool is_small(V) { return false; }  // cannot be told in less time than it saves
#endif

inline Two in_register(Two x) { return {in_register(x.a), in_register(x.b)}; }
inline Two flipped(Two x, VI bits) { return {flipped(x.a, bits), flipped(x.b, bits)}; }
inline Two inverse_root(Two x) { return {inverse_root(x.a), inverse_root(x.b)}; }
inline Two positive(Two x) { return {positive(x.a), positive(x.b)}; }
inline Two exponential(Two x) { return {exponential(x.a), exponential(x.b)}; }
inline bool is_small(Two x) { return is_small(x.a) && is_small(x.b); }

// e^x. Most magnitudes are next to 1, where a short series is exact.
template <typename T>
__attribute__((always_inline)) inline T magnitude_of(T x) {
  if (!is_small(x)) return exponential(x);
  return (x * 0.5f + 1.0f) * x + 1.0f;
}

}  // namespace
