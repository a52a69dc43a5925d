// Two vectors that are worked on in turns: a processor that need not wait for the result of either is twice as fast in
// what is one long chain of multiplications, such as a network. Functions below take both, V and Two, as T.

#pragma once

#include "simd.h"

namespace {

#ifdef __AVX512F__
inline __mmask16 first(int n) { return (__mmask16)((1u << n) - 1); }
inline V some(const float* p, int n) { return (V)_mm512_maskz_loadu_ps(first(n), p); }
inline void put(float* p, V v, int n) { _mm512_mask_storeu_ps(p, first(n), (__m512)v); }
inline V head_of(V v, int n) { return (V)_mm512_maskz_mov_ps(first(n), (__m512)v); }
inline V positive(V x) { return (V)_mm512_max_epi32((__m512i)x, _mm512_setzero_si512()); }  // not by the units that add
inline bool small(V x) {
  return !_mm512_cmp_ps_mask(_mm512_abs_ps((__m512)x), _mm512_set1_ps(0.006f), _CMP_NLT_UQ);
}
#else
inline V some(const float* p, int n) { return load(p, n); }
inline void put(float* p, V v, int n) { store(p, v, n); }
inline V head_of(V v, int n) { for (int i = n; i < LANES; i++) v[i] = 0; return v; }
inline V positive(V x) { return relu(x); }
inline bool small(V) { return false; }  // cannot be told in less time than it saves
#endif

#ifdef __AVX512F__
constexpr bool PAIRS = HIDDEN <= 8;  // two of each unit in 32 registers of a whole vector
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

// n numbers at p, n being all or, in a single vector, fewer.
template <typename T> inline T get(const float* p, int n);
template <> inline V get<V>(const float* p, int n) { return n == LANES ? load(p) : some(p, n); }
template <> inline Two get<Two>(const float* p, int) { return {load(p), load(p + LANES)}; }

inline void set(float* p, V v, int n) { if (n == LANES) store(p, v); else put(p, v, n); }
inline void set(float* p, Two v, int) { store(p, v.a), store(p + LANES, v.b); }

template <typename T> inline T same(float x);
template <> inline V same<V>(float x) { return each(x); }
template <> inline Two same<Two>(float x) { return {each(x), each(x)}; }

// Read once, where the compiler would rather read from memory wherever it is used.
#ifdef __AVX512F__
inline V in_register(V x) { asm("" : "+v"(x)); return x; }
#else
inline V in_register(V x) { return x; }
#endif
inline Two in_register(Two x) { return {in_register(x.a), in_register(x.b)}; }

inline V flipped(V x, VI bits) { return (V)((VI)x ^ bits); }
inline Two flipped(Two x, VI bits) { return {flipped(x.a, bits), flipped(x.b, bits)}; }
inline Two inverse_root(Two x) { return {inverse_root(x.a), inverse_root(x.b)}; }
inline Two positive(Two x) { return {positive(x.a), positive(x.b)}; }
inline Two exponential(Two x) { return {exponential(x.a), exponential(x.b)}; }
inline bool small(Two x) { return small(x.a) && small(x.b); }

// e^x; most magnitudes are next to 1, where a short series is exact.
template <typename T>
__attribute__((always_inline)) inline T magnitude_of(T x) {
  if (!small(x)) return exponential(x);
  return (x * 0.5f + 1.0f) * x + 1.0f;
}

// What centering leaves of a gradient; `mean` is a share of its row's. See features.centered.
inline float without(float grad, float mean) { return grad == 0 ? grad : grad - mean; }
inline V without(V grad, float mean) { return grad == 0 ? grad : grad - mean; }
inline Two without(Two grad, float mean) { return {without(grad.a, mean), without(grad.b, mean)}; }

// x times `kept` where x * y is negative.
inline V held_back(V x, V y, float kept) { return y * x < 0 ? x * kept : x; }
inline Two held_back(Two x, Two y, float kept) { return {held_back(x.a, y.a, kept), held_back(x.b, y.b, kept)}; }

}  // namespace
