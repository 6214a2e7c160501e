/* One decode step of the whole model on a CPU: B rows, one new token each.

   A step has so little to compute per weight that in PyTorch the calls cost more than the arithmetic. Here the step is
   one function, run by all threads together from start to end, that reads every weight once: as fast as memory gives
   them for one row, and for many rows each weight is used for all of them while it is in a register.

   gpt.py is what this must agree with. Activations are float32 where PyTorch rounds each to bfloat16; only what enters
   a product with bfloat16 weights, and what goes into the cache, is rounded. Every sum is taken in an order that does
   not depend on B: what a row is given is the same, bit for bit, whoever is beside it.

   C channels, H query heads, G key/value heads, D head size, V vocabulary. The structs are mirrored in cpu_decoder.py. */

#include "kernels.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { F32, BF16, INT8 }; /* how a matrix is stored; int8 has a scale for each row */

typedef struct { const void *weight; const float *scale; } Matrix;

typedef struct {
    Matrix q, k, v, proj, fc, out;
    const void *gate, *value_embed; /* (G, gate_channels) and (V, G*D), or NULL */
    void *keys, *values;            /* rings (rows, slots, G, D) */
    long slots;
} Layer;

typedef struct {
    long C, H, G, D, V, num_layers, middle, gate_channels, smear_channels;
    long kind, bf16; /* of the matrices; whether embeddings and cache are bfloat16 */
    long room;       /* the most slots of a ring, rounded up to 16 */
    float softcap, qk_scale, gate_scale, eps;
    const void *wte, *smear_gate;                                        /* (V, C), (smear_channels) or NULL */
    const float *resid, *x0, *smear_lambda, *backout, *cosine, *sine; /* the first four may be NULL; (positions, D/2) */
    Matrix head;
    const Layer *layers;
} Model;

typedef struct { /* float32 unless said otherwise; `in` is what enters a product: bfloat16 if the matrices are */
    float *x, *first, *middle, *q, *k, *v; /* (B, C) thrice, (B, H*D), (B, G*D) twice */
    void *in, *wide;                       /* (B, max(C, H*D)) and (B, 4C) */
    float *scores;                         /* (B*G, room) */
    void *previous;                        /* (B, C) embedding of each row's last token, in the cache's dtype; or NULL */
} Scratch;

/* ---- vectors of 16 floats, which the compiler maps to what the CPU has --------------------------------------- */

typedef float v16 __attribute__((vector_size(64)));
typedef uint32_t u16x32 __attribute__((vector_size(64)));
typedef uint16_t half16 __attribute__((vector_size(32)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef int8_t byte16 __attribute__((vector_size(16)));
#define INLINE static inline __attribute__((always_inline))

INLINE v16 from_bytes(byte16 bytes) {
#ifdef __AVX512F__
    return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes));
#else /* by way of int16: gcc takes the direct conversion apart into single numbers */
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bytes, i16x16), i32x16), v16);
#endif
}

INLINE v16 get(const void *p, long at, const int kind) {
    v16 floats;
    half16 halves;
    byte16 bytes;
    switch (kind) {
    case BF16: memcpy(&halves, (const bf16_t *)p + at, 32); return (v16)(__builtin_convertvector(halves, u16x32) << 16);
    case INT8: memcpy(&bytes, (const int8_t *)p + at, 16); return from_bytes(bytes);
    default: memcpy(&floats, (const float *)p + at, 64); return floats;
    }
}

/* Ask for the weights of the next tile while this one is worked on: with several rows memory would idle else. */
INLINE void fetch_ahead(const void *p, long at, const int kind) {
    __builtin_prefetch((const char *)p + at * (kind == F32 ? 4 : kind == BF16 ? 2 : 1));
}

#define FOLD(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__) /* 16 of the floats of a (0-15) and b (16-31) */

/* The sums of 16 vectors, each taken as by halves: i and i+8, then i and i+4, i+2, i+1. The vectors are used up. */
INLINE v16 totals(v16 *v) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        v[i] = FOLD(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               FOLD(v[2 * i], v[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        v[i] = FOLD(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               FOLD(v[2 * i], v[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        v[i] = FOLD(v[2 * i], v[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
               FOLD(v[2 * i], v[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    return FOLD(v[0], v[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           FOLD(v[0], v[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* ---- matrix products ----------------------------------------------------------------------------------------- */

enum Then { STORE, ADD, RELU2 }; /* what becomes of a product */

INLINE void finish(float *values, const int R, void *y, long at, enum Then then, const int in_kind) {
    float *floats = (float *)y + at;
    switch (then) {
    case STORE: memcpy(floats, values, R * sizeof(float)); break;
    case ADD:
        for (int r = 0; r < R; r++) floats[r] += values[r];
        break;
    case RELU2:
        for (int r = 0; r < R; r++) values[r] = values[r] > 0 ? values[r] * values[r] : 0;
        store(y, at, values, R, in_kind == BF16);
    }
}

/* R rows of the matrix times N rows of x; both constants, so that the sums stay in registers. */
INLINE void tile(const int kind, const int R, const int N, Matrix w, long m, const void *x, long b, long K, void *y,
                 long M, enum Then then) {
    const int in_kind = kind == BF16 ? BF16 : F32;
    v16 sum[16] = {{0}}; /* of row n of x and row r of the matrix at 4n + r */
    long k = 0;
#ifdef __AVX512BF16__
    for (; kind == BF16 && k + 32 <= K; k += 32) {
        __m512bh left[4];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            left[r] = (__m512bh)_mm512_loadu_si512((const bf16_t *)w.weight + (m + r) * K + k);
            fetch_ahead(w.weight, (m + R + r) * K + k, kind);
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            __m512bh right = (__m512bh)_mm512_loadu_si512((const bf16_t *)x + (b + n) * K + k);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sum[4 * n + r] = (v16)_mm512_dpbf16_ps((__m512)sum[4 * n + r], left[r], right);
        }
    }
#endif
    for (; k < K; k += 16) {
        v16 left[4];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            left[r] = get(w.weight, (m + r) * K + k, kind);
            fetch_ahead(w.weight, (m + R + r) * K + k, kind);
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            v16 right = get(x, (b + n) * K + k, in_kind);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sum[4 * n + r] += left[r] * right;
        }
    }
    v16 results = totals(sum);
    float values[16];
    memcpy(values, &results, sizeof(values));
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        for (int r = 0; kind == INT8 && r < R; r++) values[4 * n + r] *= w.scale[m + r];
        finish(values + 4 * n, R, y, (b + n) * M + m, then, in_kind);
    }
}

INLINE void product_of(const int kind, Matrix w, const void *x, void *y, long B, long K, long M, enum Then then) {
#pragma omp for schedule(static) nowait
    for (long block = 0; block < (M + 3) / 4; block++) {
        long m = 4 * block, b = 0;
        if (m + 4 <= M) {
            for (; b + 4 <= B; b += 4) tile(kind, 4, 4, w, m, x, b, K, y, M, then);
            for (; b < B; b++) tile(kind, 4, 1, w, m, x, b, K, y, M, then);
        } else
            for (; m < M; m++)
                for (b = 0; b < B; b++) tile(kind, 1, 1, w, m, x, b, K, y, M, then);
    }
}

/* y (B, M) from x (B, K), the matrix's rows shared out among the threads. No barrier: the caller sets one. */
static void product(const Model *model, Matrix w, const void *x, void *y, long B, long K, long M, enum Then then) {
    switch (model->kind) {
    case BF16: product_of(BF16, w, x, y, B, K, M, then); break;
    case INT8: product_of(INT8, w, x, y, B, K, M, then); break;
    default: product_of(F32, w, x, y, B, K, M, then);
    }
}

/* ---- row by row ---------------------------------------------------------------------------------------------- */

static float norm_factor(const float *x, long n, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / n + eps);
}

/* Row b of `in`: what the next product is given, x normed. */
static void norm_row(const Model *m, const float *x, void *in, long b) {
    float y[m->C], f = norm_factor(x, m->C, m->eps);
    SIMD for (long i = 0; i < m->C; i++) y[i] = f * x[i];
    store(in, b * m->C, y, m->C, m->kind == BF16);
}

/* sigmoid of the product of x (n) with row g of a small matrix (rows, n) */
static float gate_of(const Model *m, const void *gate, long g, const float *x, long n) {
    float sum = 0;
    for (long i = 0; i < n; i++)
        sum += x[i] * (m->bf16 ? from_bf16(((const bf16_t *)gate)[g * n + i]) : ((const float *)gate)[g * n + i]);
    return 1.0f / (1.0f + expf(-sum));
}

/* The normed embedding, with a gated bit of the previous token's. */
static void embed(const Model *m, const Scratch *s, long b, long token) {
    long C = m->C;
    float *x = s->x + b * C, old[C];
    load(x, m->wte, token * C, C, m->bf16);
    float f = norm_factor(x, C, m->eps);
    for (long i = 0; i < C; i++) x[i] *= f;
    if (m->smear_gate) {
        load(old, s->previous, b * C, C, m->bf16);
        store(s->previous, b * C, x, C, m->bf16);
        float share = *m->smear_lambda * gate_of(m, m->smear_gate, 0, x, m->smear_channels);
        for (long i = 0; i < C; i++) x[i] += share * old[i];
    }
    memcpy(s->first + b * C, x, C * sizeof(float));
}

/* A head's query or key, in place: rotated to its position, normed, scaled. */
static void rotate(const Model *m, float *v, long position) {
    long half = m->D / 2;
    const float *c = m->cosine + position * half, *s = m->sine + position * half;
    float f = m->qk_scale * norm_factor(v, m->D, m->eps);
    for (long i = 0; i < half; i++) {
        float a = v[i], b = v[half + i];
        v[i] = f * (a * c[i] + b * s[i]);
        v[half + i] = f * (b * c[i] - a * s[i]);
    }
}

/* Attention of one query (D) over `n` slots that lie `stride` apart; y (D). The order of the slots does not matter. */
INLINE void look(const int kind, const long D, const float *q, const char *keys, const char *values, long stride, long n,
                 float *p, float *y) {
    const long step = stride * (kind == BF16 ? 2 : 4);
    float most = -INFINITY, sum = 0, scale = 1.0f / sqrtf((float)D);
    for (long i = 0; i < n; i += 16) {
        v16 dots[16] = {{0}};
        const long some = n - i < 16 ? n - i : 16;
        for (long d = 0; d < D; d += 16) {
            v16 part = get(q, d, F32);
#pragma GCC unroll 16
            for (int j = 0; j < 16; j++) /* past the last slot again the last: what is read must be there */
                dots[j] += part * get(keys + (i + (j < some ? j : some - 1)) * step, d, kind);
        }
        v16 products = totals(dots) * scale;
        memcpy(p + i, &products, 64);
    }
    for (long i = 0; i < n; i++) most = p[i] > most ? p[i] : most;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += p[i] = fast_exp(p[i] - most);
    for (long d = 0; d < D; d += 64) { /* four sums at a time stay in registers */
        v16 mixed[4] = {{0}};
        const int parts = D - d < 64 ? (D - d) / 16 : 4;
        for (long i = 0; i < n; i++)
            for (int j = 0; j < parts; j++) mixed[j] += p[i] * get(values + i * step, d + 16 * j, kind);
        for (int j = 0; j < parts; j++) mixed[j] /= sum, memcpy(y + d + 16 * j, &mixed[j], 64);
    }
}

/* Row b, key/value head g: its new key and value into the ring, then the query heads that share them. */
static void attend(const Model *m, const Layer *layer, const Scratch *s, long b, long g, long token, long length) {
    long D = m->D, GD = m->G * D, group = m->H / m->G, slot = length % layer->slots;
    float *k = s->k + b * GD + g * D, *v = s->v + b * GD + g * D, *p = s->scores;
    rotate(m, k, length);
    if (layer->value_embed) {
        float x[m->gate_channels], ve[D];
        load(x, s->in, b * m->C, m->gate_channels, m->kind == BF16);
        load(ve, layer->value_embed, token * GD + g * D, D, m->bf16);
        float share = m->gate_scale * gate_of(m, layer->gate, g, x, m->gate_channels);
        for (long i = 0; i < D; i++) v[i] += share * ve[i];
    }
    long ring = b * layer->slots * GD + g * D, n = length + 1 < layer->slots ? length + 1 : layer->slots;
    store(layer->keys, ring + slot * GD, k, D, m->bf16);
    store(layer->values, ring + slot * GD, v, D, m->bf16);
    p += (b * m->G + g) * m->room;
    const char *keys = (char *)layer->keys + ring * (m->bf16 ? 2 : 4);
    const char *values = (char *)layer->values + ring * (m->bf16 ? 2 : 4);
    for (long h = g * group; h < (g + 1) * group; h++) {
        float *q = s->q + (b * m->H + h) * D;
        rotate(m, q, length);
        if (m->bf16 && D == 64) look(BF16, 64, q, keys, values, GD, n, p, q);
        else if (m->bf16 && D == 128) look(BF16, 128, q, keys, values, GD, n, p, q);
        else if (m->bf16) look(BF16, D, q, keys, values, GD, n, p, q);
        else look(F32, D, q, keys, values, GD, n, p, q);
    }
}

/* ---- the step ------------------------------------------------------------------------------------------------ */

#define EACH_ROW _Pragma("omp for schedule(static)") for (long b = 0; b < B; b++)
#define BARRIER _Pragma("omp barrier")

/* The tokens of B rows that hold `lengths` tokens -> logits (B, V); the cache then holds one more in each. */
void decode_step(const Model *m, const Scratch *s, const long *tokens, const long *lengths, float *logits, long B) {
    const long C = m->C, HD = m->H * m->D, GD = m->G * m->D;
#pragma omp parallel
    {
        EACH_ROW embed(m, s, b, tokens[b]);
        for (long i = 0; i < m->num_layers; i++) {
            const Layer *layer = &m->layers[i];
            EACH_ROW {
                float *x = s->x + b * C, *first = s->first + b * C;
                if (m->resid)
                    for (long c = 0; c < C; c++) x[c] = m->resid[i] * x[c] + m->x0[i] * first[c];
                norm_row(m, x, s->in, b);
            }
            product(m, layer->q, s->in, s->q, B, C, HD, STORE);
            product(m, layer->k, s->in, s->k, B, C, GD, STORE);
            product(m, layer->v, s->in, s->v, B, C, GD, STORE);
            BARRIER
#pragma omp for collapse(2) schedule(static)
            for (long b = 0; b < B; b++)
                for (long g = 0; g < m->G; g++) attend(m, layer, s, b, g, tokens[b], lengths[b]);
            EACH_ROW store(s->in, b * HD, s->q + b * HD, HD, m->kind == BF16);
            product(m, layer->proj, s->in, s->x, B, HD, C, ADD);
            BARRIER
            EACH_ROW norm_row(m, s->x + b * C, s->in, b);
            product(m, layer->fc, s->in, s->wide, B, C, 4 * C, RELU2);
            BARRIER
            product(m, layer->out, s->wide, s->x, B, 4 * C, C, ADD);
            BARRIER
            if (m->backout && i == m->middle)
                EACH_ROW memcpy(s->middle + b * C, s->x + b * C, C * sizeof(float));
        }
        EACH_ROW {
            float *x = s->x + b * C;
            if (m->backout)
                for (long c = 0; c < C; c++) x[c] -= *m->backout * s->middle[b * C + c];
            norm_row(m, x, s->in, b);
        }
        product(m, m->head, s->in, logits, B, C, m->V, STORE);
        BARRIER
#pragma omp for simd schedule(static)
        for (long i = 0; i < B * m->V; i++) /* cap * tanh(logit / cap) */
            logits[i] = m->softcap * (1 - 2 / (1 + fast_exp(2 / m->softcap * logits[i])));
    }
}
