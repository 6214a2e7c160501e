/* What the C files share: bfloat16, rows of either dtype as floats, and e^x. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512VL__
#include <immintrin.h>
#endif

typedef uint16_t bf16_t; /* the upper half of a float32 */

#define SIMD _Pragma("omp simd")

static inline float from_bf16(bf16_t h) {
    union { uint32_t i; float f; } u = {.i = (uint32_t)h << 16};
    return u.f;
}

static inline bf16_t to_bf16(float f) { /* to nearest, ties to even; a NaN stays one */
    union { float f; uint32_t i; } u = {.f = f};
    uint32_t rounded = (u.i + 0x7fff + ((u.i >> 16) & 1)) >> 16;
    return f != f ? 0x7fc0 : (bf16_t)rounded;
}

static inline void load(float *restrict to, const void *from, long at, long n, int bf16) {
    if (!bf16) { memcpy(to, (const float *)from + at, n * sizeof(float)); return; }
    const bf16_t *restrict p = (const bf16_t *)from + at;
    SIMD for (long i = 0; i < n; i++) to[i] = from_bf16(p[i]);
}

static inline void store(void *to, long at, const float *restrict from, long n, int bf16) {
    if (!bf16) { memcpy((float *)to + at, from, n * sizeof(float)); return; }
    bf16_t *restrict p = (bf16_t *)to + at;
    long done = 0;
#if defined(__AVX512BF16__) && defined(__AVX512VL__) /* the compiler takes to_bf16 for eight instructions */
    for (; done + 16 <= n; done += 16)
        _mm256_storeu_si256((void *)(p + done), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + done)));
#endif
    SIMD for (long i = done; i < n; i++) p[i] = to_bf16(from[i]);
}

/* e^x for |x| < 87, to about one part in 10^7: a polynomial on [-ln2/2, ln2/2] whose exponent is raised by k. Without
   branches, so that it vectorises. */
static inline float bounded_exp(float x) {
    float k = rintf(x * 1.44269504f);
    float r = fmaf(k, -0.693359375f, x); /* ln 2 in two parts, so that the difference is exact */
    r = fmaf(k, 2.12194440e-4f, r);
    float p = 1.0f / 720;
    p = fmaf(p, r, 1.0f / 120);
    p = fmaf(p, r, 1.0f / 24);
    p = fmaf(p, r, 1.0f / 6);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    union { float f; int32_t i; } scaled = {.f = p};
    scaled.i += (int32_t)k << 23;
    return scaled.f;
}

static inline float fast_exp(float x) { /* in this form a limit is one instruction, and a NaN stays one */
    x = -86.0f > x ? -86.0f : x;
    x = 88.0f < x ? 88.0f : x;
    return bounded_exp(x);
}

/* scores v (K), of a query that sees the keys from .. to - 1, become its probabilities */
static inline void softmax_row(float *v, long from, long to, long K, float scale) {
    float sum = 0, most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (long i = from; i < to; i++) most = v[i] > most ? v[i] : most;
#pragma omp simd reduction(+ : sum)
    for (long i = from; i < to; i++) sum += v[i] = fast_exp(scale * (v[i] - most));
    float share = 1 / sum;
    for (long i = 0; i < from; i++) v[i] = 0;
    SIMD for (long i = from; i < to; i++) v[i] *= share;
    for (long i = to; i < K; i++) v[i] = 0;
}

/* g = scale * p * (g - sum(p * g)): the gradient of K scores from that of their probabilities p */
static inline void softmax_row_backward(float *restrict g, const float *restrict p, long K, float scale) {
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (long i = 0; i < K; i++) dot += g[i] * p[i];
    SIMD for (long i = 0; i < K; i++) g[i] = scale * p[i] * (g[i] - dot);
}
