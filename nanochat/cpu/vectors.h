/* Vectors of as many floats as this CPU adds up at once: loading them from any kind of number, adding them up. */

#pragma once

#include "kernels.h"

#ifdef __AVX2__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* Floats in a vector; a tile of a product (decode.c) is TALL vectors of outputs for WIDE tokens: as many sums as the
   registers hold beside their factors. */
#if defined(__AVX512F__)
enum { LANES = 16, TALL = 2, WIDE = 8 };
#elif defined(__AVX__)
enum { LANES = 8, TALL = 2, WIDE = 4 };
#elif defined(__aarch64__)
enum { LANES = 4, TALL = 4, WIDE = 4 };
#else
enum { LANES = 4, TALL = 2, WIDE = 4 };
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));

INLINE vec all(float x) { return x - (vec){0}; } /* x in every place */

/* sum + a * b, rounded once where the CPU does both at once. Explicit intrinsics: a compiler
   left to choose (-ffp-contract) fuses in one loop and not in the next, and a row's bits would depend on its neighbours. */
INLINE vec add_product(vec sum, vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}

enum { F32, BF16, INT8 }; /* kinds of numbers */

INLINE long size_of(const int kind) { return kind == F32 ? 4 : kind == BF16 ? 2 : 1; }

/* sum + the products of two pairs of int16 in each place; where the CPU has no such instruction, int8 is multiplied as
   float. */
typedef int16_t pairs16 __attribute__((vector_size(4 * LANES)));
#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
enum { INTEGER_PRODUCTS = 1 };
#else
enum { INTEGER_PRODUCTS = 0 };
#endif

INLINE integers add_pairs(integers sum, pairs16 a, integers b) {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    return (integers)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (integers)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return sum + (integers)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return sum + (integers)a * b; /* not used */
#endif
}

/* int8, by way of int16: gcc takes the direct conversion apart into single numbers */
INLINE vec from_bytes(bytes b) {
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(b, shorts), integers), vec);
}

INLINE vec as_floats(const int32_t *p) {
    integers numbers;
    memcpy(&numbers, p, sizeof(numbers));
    return __builtin_convertvector(numbers, vec);
}

INLINE words widened(halves h) {
#if defined(__AVX512F__)
    return (words)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__) /* by name: gcc makes three instructions of it */
    return (words)_mm256_cvtepu16_epi32((__m128i)h);
#else
    return __builtin_convertvector(h, words);
#endif
}

INLINE vec get(const void *p, long at, const int kind) {
    vec floats;
    halves h;
    bytes b;
    switch (kind) {
    case BF16: memcpy(&h, (const bf16_t *)p + at, sizeof(h)); return (vec)(widened(h) << 16);
    case INT8: memcpy(&b, (const int8_t *)p + at, sizeof(b)); return from_bytes(b);
    default: memcpy(&floats, (const float *)p + at, sizeof(floats)); return floats;
    }
}

/* The sums of LANES vectors, in order: first within each four of a vector's floats, then the fours. v is overwritten.
   FOLD takes LANES of the floats of a (numbered from 0) and b (from LANES); LIST makes one macro argument of several. */
#if defined(__clang__) || __GNUC__ >= 12
#define FOLD(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FOLD(a, b, ...) __builtin_shuffle(a, b, (integers){__VA_ARGS__})
#endif
#define PAIRS(n, left, right)                                     \
    _Pragma("GCC unroll 8") for (int i = 0; i < n; i++) v[i] =  \
        FOLD(v[2 * i], v[2 * i + 1], left) + FOLD(v[2 * i], v[2 * i + 1], right)
#define LIST(...) __VA_ARGS__

INLINE vec totals(vec *v) {
#if defined(__AVX512F__)
    PAIRS(8, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
          LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
    PAIRS(4, LIST(0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30),
          LIST(1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31));
    PAIRS(2, LIST(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
          LIST(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
    PAIRS(1, LIST(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
          LIST(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
#elif defined(__AVX__)
    PAIRS(4, LIST(0, 1, 8, 9, 4, 5, 12, 13), LIST(2, 3, 10, 11, 6, 7, 14, 15));
    PAIRS(2, LIST(0, 2, 8, 10, 4, 6, 12, 14), LIST(1, 3, 9, 11, 5, 7, 13, 15));
    PAIRS(1, LIST(0, 1, 2, 3, 8, 9, 10, 11), LIST(4, 5, 6, 7, 12, 13, 14, 15));
#else
    PAIRS(2, LIST(0, 1, 4, 5), LIST(2, 3, 6, 7));
    PAIRS(1, LIST(0, 2, 4, 6), LIST(1, 3, 5, 7));
#endif
    return v[0];
}
