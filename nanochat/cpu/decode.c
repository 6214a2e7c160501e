/* One decode step of the whole model on a CPU: B new tokens, one for each of B rows or several for one row.

   A step computes so little per weight that in PyTorch the calls cost more than the arithmetic. Here the step is one
   function, executed by all threads together from start to end, that reads every weight once: at memory bandwidth for
   one token, and for many each weight is used for all of them while it is in a register.

   gpt.py is the definition. cpu_decoder.py lists what of it is implemented here and compares the two at start.
   Activations are float32 where PyTorch rounds each to bfloat16; only the inputs of products are rounded, to bfloat16 or
   beside int8 weights to 16-bit integers, and the cache. The order of every sum is independent of B, so a row's results
   are the same bits whichever rows are beside it and however a prompt is split.

   C channels, H query heads, G key/value heads, D head size, V vocabulary. The structs are mirrored in cpu_decoder.py. */

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#define NUM_THREADS omp_get_num_threads()
#else
#define NUM_THREADS 1
#endif

enum { RECENT = 3 };   /* gpt.RECENT */
enum { AHEAD = 4096 }; /* prefetch distance in a ring, bytes */
enum { INT16_SUMS = 512 }; /* products of int16 and int8, of at most 32639 and 127, that an int32 can add up */

/* Inputs of products with bfloat16 weights are rounded to bfloat16. They are stored as bfloat16 if the CPU multiplies
   pairs of bfloat16, else as float32, which avoids a conversion per tile. */
#ifdef __AVX512BF16__
enum { PAIRWISE = 1 };
#else
enum { PAIRWISE = 0 };
#endif

/* (M, K), packed (packed_weights.py): blocks of LANES outputs, in each of them input after input (bfloat16: pair after
   pair, int8: four after four), so that a product reads it from start to end and needs no sum across a vector. M is
   padded to a whole block. int8 has a scale for each output. */
typedef struct { const void *weight; const float *scale; } Matrix;

typedef struct {
    Matrix q, k, v, proj, fc, out;
    const void *gate, *value_embed; /* (G, gate_channels) and (V, G*D), or NULL */
    void *keys, *values;            /* rings (rows, slots, G, D) */
    long slots;
} Layer;

typedef struct {
    long C, H, G, D, V, num_layers, middle, gate_channels, smear_channels, ngram_rows, ngram_dim;
    long kind, bf16; /* F32, BF16 or INT8 matrices; whether embeddings and cache are bfloat16 */
    long room;       /* slots of the largest ring, rounded up to 16 */
    float softcap, qk_scale, gate_scale, eps;
    const void *wte, *smear_gate;             /* (V, C), (smear_channels) or NULL */
    const void *ngram_embed, *ngram_proj;     /* (ngram_rows, ngram_dim), (C, ngram_dim), if there are rows */
    const float *resid, *x0, *smear_lambda, *backout, *cosine, *sine; /* the first four may be NULL; (positions, D/2) */
    Matrix head;
    const Layer *layers;
} Model;

typedef struct { /* float32 unless noted; `in` and `wide` are inputs of products */
    float *x, *first, *middle, *q, *k, *v; /* (B, C) thrice, (B, H*D), (B, G*D) twice */
    void *in, *wide;                       /* (B, C) and (B, max(4C, H*D)) */
    void *integers;                        /* for products of int8: the last of these two, as `quantize` leaves it, */
    float *scale;                          /* (B) and what one is worth in each row */
    float *scores;                         /* (B, H, room) */
    long *recent;                          /* (rows, RECENT) ids of each row's last tokens, as in the cache */
} Scratch;

typedef struct { /* B tokens: either one each of B rows, or all of one row, in order */
    const long *ids, *rows, *positions;
    long B;
} Tokens;

/* ---- matrix products ----------------------------------------------------------------------------------------- */

const int block_outputs = LANES, int8_inputs = INTEGER_PRODUCTS ? 4 : 1; /* for packed_weights.py */

typedef struct { /* where a product (B, M) is written, and how */
    enum { STORE, ADD, RELU2 } then;
    void *y;
    const float *scale; /* of each row's integers, for int8 */
} Output;

/* Write the sums of a block's n outputs for token b. */
INLINE void finish_some(const int kind, vec sum, Matrix w, long block, const long n, Output out, long b, long M) {
    const long at = b * M + LANES * block;
    float *y = (float *)out.y + at;
    vec before = {0};
    if (out.then == ADD) memcpy(&before, y, n * sizeof(float));
    if (kind == INT8) {
        vec scale = get(w.scale, LANES * block, F32);
        sum = add_product(before, sum, INTEGER_PRODUCTS ? scale * out.scale[b] : scale);
    } else sum += before;
    if (out.then == RELU2) {
        words bits = (words)(sum * sum) & ~(words)(sum <= 0); /* a NaN stays one */
        sum = (vec)bits;
        if (kind == BF16) {
            words is_nan = (words)(sum != sum), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
            rounded = (rounded & ~is_nan) | (0x7fc0 & is_nan);
            if (PAIRWISE) {
                halves h = __builtin_convertvector(rounded, halves);
                memcpy((bf16_t *)out.y + at, &h, n * sizeof(bf16_t));
                return;
            }
            sum = (vec)(rounded << 16);
        }
    }
    memcpy(y, &sum, n * sizeof(float));
}

INLINE void finish(const int kind, vec sum, Matrix w, long block, Output out, long b, long M) {
    const long left = M - LANES * block;
    if (left >= LANES) finish_some(kind, sum, w, block, LANES, out, b, M);
    else finish_some(kind, sum, w, block, left, out, b, M);
}

/* Prefetch into the level 2 cache, for the next four blocks. */
INLINE void fetch(const void *p) { __builtin_prefetch(p, 0, 2); }

/* R blocks of outputs for N rows of x, both compile-time constants: the sums stay in registers. Each runs from the first
   input to the last, so R and N do not change results. */
INLINE void tile(const int kind, const int R, const int N, Matrix w, long block, const void *x, long b, long K,
                 Output out, long M) {
    const int ahead = N > 2 || kind == INT8; /* otherwise the loop already waits for memory, and prefetching only adds work */
    const long size = size_of(kind);
    const char *weight[4];
    vec sum[16] = {{0}};
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) weight[r] = (const char *)w.weight + (block + r) * LANES * K * size;
    if (kind == BF16) {
        for (long k = 0; k < K; k += 2) { /* two inputs of each output lie together */
            words pairs[4];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                memcpy(&pairs[r], weight[r] + 2 * LANES * k, sizeof(words));
                if (ahead) fetch(weight[r] + 2 * LANES * (k + 4 * K));
            }
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) {
#ifdef __AVX512BF16__
                int pair;
                memcpy(&pair, (const bf16_t *)x + (b + n) * K + k, 4);
                __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++)
                    sum[N * r + n] = (vec)_mm512_dpbf16_ps((__m512)sum[N * r + n], (__m512bh)pairs[r], both);
#else
                const float *in = (const float *)x + (b + n) * K + k;
                vec one = all(in[0]), two = all(in[1]);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++)
                    sum[N * r + n] = add_product(sum[N * r + n], (vec)(pairs[r] << 16), one);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++)
                    sum[N * r + n] = add_product(sum[N * r + n], (vec)(pairs[r] & 0xffff0000u), two);
#endif
            }
        }
    } else if (kind == INT8 && INTEGER_PRODUCTS) {
        const int16_t *in = (const int16_t *)x + b * K;
        for (long start = 0; start < K; start += INT16_SUMS) {
            const long end = start + INT16_SUMS < K ? start + INT16_SUMS : K;
            integers part[16] = {{0}};
            for (long k = start; k < end; k += 4) {
                pairs16 fours[4];
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    memcpy(&fours[r], weight[r] + LANES * k, sizeof(pairs16));
                    if (LANES * k % 64 == 0) fetch(weight[r] + LANES * (k + 4 * K));
                }
#pragma GCC unroll 8
                for (int n = 0; n < N; n++) {
                    int32_t even, odd;
                    memcpy(&even, in + n * K + k, 4);
                    memcpy(&odd, in + n * K + k + 2, 4);
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++)
                        part[N * r + n] = add_pairs(part[N * r + n], fours[r] << 8 >> 8, even - (integers){0});
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++)
                        part[N * r + n] = add_pairs(part[N * r + n], fours[r] >> 8, odd - (integers){0});
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < R * N; i++) sum[i] += __builtin_convertvector(part[i], vec);
        }
    } else {
        const float *in = (const float *)x + b * K;
        for (long k = 0; k < K; k++) {
            vec some[4];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                some[r] = get(weight[r], LANES * k, kind);
                if (ahead && k * LANES * size % 64 == 0) fetch(weight[r] + LANES * size * (k + 4 * K));
            }
#pragma GCC unroll 8
            for (int n = 0; n < N; n++)
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sum[N * r + n] = add_product(sum[N * r + n], some[r], all(in[n * K + k]));
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) finish(kind, sum[N * r + n], w, block + r, out, b + n, M);
}

/* Separate functions: in a single one gcc spills the sums to memory. */
#define TILE(name, kind, R, N)                                                                                        \
    static __attribute__((noinline)) void name##_##kind(Matrix w, long block, const void *x, long b, long K,          \
                                                        Output out, long M) {                                         \
        tile(kind, R, N, w, block, x, b, K, out, M);                                                                  \
    }
#define PRODUCT(kind)                                                                                                 \
    TILE(many, kind, TALL, WIDE)                                                                                      \
    TILE(two, kind, 4, 2)                                                                                             \
    TILE(one, kind, 4, 1)                                                                                             \
    TILE(block_of_many, kind, 1, WIDE)                                                                                \
    TILE(block_of_one, kind, 1, 1)                                                                                    \
    static void product_##kind(Matrix w, const void *x, Output out, long B, long K, long M) {                         \
        const long blocks = (M + LANES - 1) / LANES, unit = blocks >= 4 * NUM_THREADS ? 4 : 1;                        \
        _Pragma("omp for schedule(static) nowait") for (long first = 0; first < blocks; first += unit) {              \
            const long last = first + unit < blocks ? first + unit : blocks;                                          \
            long b = 0;                                                                                               \
            if (last - first == 4) { /* these weights stay in cache while all of x passes */                          \
                for (; b + WIDE <= B; b += WIDE)                                                                      \
                    for (long i = first; i < last; i += TALL) many_##kind(w, i, x, b, K, out, M);                     \
                for (; b + 2 <= B; b += 2) two_##kind(w, first, x, b, K, out, M);                                     \
                for (; b < B; b++) one_##kind(w, first, x, b, K, out, M);                                             \
            } else                                                                                                    \
                for (long i = first; i < last; i++) {                                                                 \
                    for (b = 0; b + WIDE <= B; b += WIDE) block_of_many_##kind(w, i, x, b, K, out, M);                \
                    for (; b < B; b++) block_of_one_##kind(w, i, x, b, K, out, M);                                    \
                }                                                                                                     \
        }                                                                                                             \
    }

PRODUCT(F32)
PRODUCT(BF16)
PRODUCT(INT8)

#ifdef TILES
/* AMX: registers of 16 rows of 64 bytes. One instruction multiplies 64 bytes of inputs of up to 16 rows by a block's 16
   outputs: 32 bfloat16 numbers of a token, or 64 of its integers' high or low bytes, two rows a token. The packed weights
   have its layout. Its order of summation differs for bfloat16, so it is used for a single token too. */
enum { TILE_ROWS = 16, TILE_BYTES = 64 };
static int tiles_allowed;

__attribute__((constructor)) static void ask_for_tiles(void) { /* Linux grants these registers on request */
    const long request_permission = 0x1023, tile_data = 18;
    tiles_allowed = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

/* Registers 0-3 hold sums, 4 and 5 N rows of inputs each, 6 and 7 weights. */
static void shape_tiles(long N) {
    struct { uint8_t palette, start[15]; uint16_t row_bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = TILE_BYTES, shape.rows[i] = i < 6 ? N : 16;
    __asm__ volatile("" : : "r"(&shape) : "memory"); /* gcc's next line claims to read its first bytes only */
    _tile_loadconfig(&shape);
}

/* R blocks of outputs for P parts of N tokens each: R, P are 4, 1 or 2, 2 or 1, 1. The last part of all B tokens may
   begin in the one before. A row of inputs has `bytes`, and so does each output of a block. */
INLINE void sums_of_tiles(const int kind, const int R, const int P, Matrix w, long block, const char *x, long part,
                          long N, long B, long bytes, Output out, long M) {
    const int rows = kind == INT8 ? 2 : 1; /* of a token */
    const char *weight = (const char *)w.weight + block * LANES * bytes;
    const long parts = (B + N - 1) / N, ahead = R * P == 4 && parts > 2 ? 4 * LANES / parts + 1 : 0; /* lines a step */
    long b[2];
    for (int p = 0; p < P; p++) b[p] = (part + p + 1) * N < B ? (part + p) * N : B - N;
    const char *first = x + b[0] * rows * bytes, *second = x + b[P - 1] * rows * bytes;
    int32_t sum[4][TILE_ROWS][LANES];
#define WEIGHTS(to, r) _tile_loadd(to, weight + LANES * (r * bytes + k), TILE_BYTES); /* registers have fixed numbers */
#define ADD_UP(sum, in, w) if (kind == INT8) _tile_dpbssd(sum, in, w); else _tile_dpbf16ps(sum, in, w);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = 0; k < bytes; k += TILE_BYTES) {
        _tile_loadd(4, first + k, bytes);
        for (long i = part / P * ahead; i < (part / P + 1) * ahead; i++) /* each part a share of the next blocks */
            fetch(weight + LANES * (4 * bytes + R * k) + i * TILE_BYTES);
        if (P == 2) {
            _tile_loadd(5, second + k, bytes);
            WEIGHTS(6, 0) ADD_UP(0, 4, 6) ADD_UP(2, 5, 6)
            WEIGHTS(7, 1) ADD_UP(1, 4, 7) ADD_UP(3, 5, 7)
        } else {
            WEIGHTS(6, 0) ADD_UP(0, 4, 6)
            if (R == 4) { WEIGHTS(7, 1) ADD_UP(1, 4, 7) WEIGHTS(6, 2) ADD_UP(2, 4, 6) WEIGHTS(7, 3) ADD_UP(3, 4, 7) }
        }
    }
    _tile_stored(0, sum[0], TILE_BYTES);
    _tile_stored(1, sum[1], TILE_BYTES);
    _tile_stored(2, sum[2], TILE_BYTES);
    _tile_stored(3, sum[3], TILE_BYTES);
    for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++)
            for (long n = (part + p) * N - b[p]; n < N; n++) { /* those before are in the part before */
                const int32_t (*of)[LANES] = &sum[R * p + r][rows * n];
                vec total = get(of[0], 0, F32);
                if (kind == INT8) total = add_product(as_floats(of[1]), as_floats(of[0]), all(256)); /* low, high */
                finish(kind, total, w, block + r, out, b[p] + n, M);
            }
}

INLINE void product_of_tiles(const int kind, Matrix w, const void *x, Output out, long B, long K, long M) {
    const long blocks = (M + LANES - 1) / LANES, unit = blocks >= 4 * NUM_THREADS ? 4 : 1;
    const long rows = kind == INT8 ? 2 : 1, bytes = kind == INT8 ? K : 2 * K, most = TILE_ROWS / rows;
    const long parts = (B + most - 1) / most, N = (B + parts - 1) / parts; /* all of one size */
    shape_tiles(rows * N);
#pragma omp for schedule(static) nowait
    for (long i = 0; i < blocks; i += unit)
        if (unit == 4 && i + 4 <= blocks) {
            for (long j = i; j < i + 4; j += 2)
                for (long part = 0; part + 1 < parts; part += 2)
                    sums_of_tiles(kind, 2, 2, w, j, x, part, N, B, bytes, out, M);
            if (parts % 2) sums_of_tiles(kind, 4, 1, w, i, x, parts - 1, N, B, bytes, out, M);
        } else
            for (long j = i; j < i + unit && j < blocks; j++)
                for (long part = 0; part < parts; part++)
                    sums_of_tiles(kind, 1, 1, w, j, x, part, N, B, bytes, out, M);
    _tile_release();
}
#endif

/* Whether a model's products use tiles: its inputs fill them. */
static int tiled(const Model *m) {
#ifdef TILES
    const long inputs = m->kind == INT8 ? TILE_BYTES : TILE_BYTES / 2;
    return m->kind != F32 && tiles_allowed && m->C % inputs == 0 && m->H * m->D % inputs == 0;
#else
    (void)m;
    return 0;
#endif
}

/* Product of x (B, K) with w, outputs divided among the threads. No barrier: the caller sets one. */
static void product(const Model *model, Matrix w, const void *x, Output out, long B, long K, long M) {
#ifdef TILES
    if (tiled(model)) {
        if (model->kind == INT8) product_of_tiles(INT8, w, x, out, B, K, M);
        else product_of_tiles(BF16, w, x, out, B, K, M);
        return;
    }
#endif
    switch (model->kind) {
    case BF16: product_BF16(w, x, out, B, K, M); break;
    case INT8: product_INT8(w, x, out, B, K, M); break;
    default: product_F32(w, x, out, B, K, M);
    }
}

/* Row b of `integers`, the inputs of a product with int8 weights, from x (K): rounded to 16 bits, the largest to 32639.
   The error is at most sqrt(K) / 2 in 32639 of the length of x, whatever outliers it has; in bfloat16 it is 1 in 512.
   Tiles multiply bytes: all high ones, then all low ones, both signed (hence 32639 and not 32767). Vectors multiply
   pairs: even and odd numbers of each four, as their weights lie. A value that is no number makes the whole row so. */
static void quantize(const Model *m, const Scratch *s, const float *x, long b, long K) {
    float most = 1e-30f, damage = 0;
#pragma omp simd reduction(max : most) reduction(+ : damage)
    for (long i = 0; i < K; i++) {
        most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        damage += 0 * x[i];
    }
    const float factor = 32639 / most;
    s->scale[b] = most / 32639 + damage;
    if (tiled(m)) {
        int8_t *restrict high = (int8_t *)s->integers + 2 * b * K, *restrict low = high + K;
        SIMD for (long i = 0; i < K; i++) {
            int number = (int)rintf(factor * x[i]);
            high[i] = (number + 128) >> 8, low[i] = number;
        }
    } else {
        int16_t *restrict to = (int16_t *)s->integers + b * K;
        SIMD for (long i = 0; i < K; i += 4) {
            to[i] = (int16_t)rintf(factor * x[i]), to[i + 1] = (int16_t)rintf(factor * x[i + 2]);
            to[i + 2] = (int16_t)rintf(factor * x[i + 1]), to[i + 3] = (int16_t)rintf(factor * x[i + 3]);
        }
    }
}

/* ---- row by row ---------------------------------------------------------------------------------------------- */

static float norm_factor(const float *x, long n, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / n + eps);
}

/* Write elements at .. at+n-1 of `in` or `wide`. */
static void put(const Model *m, void *to, long at, const float *from, long n) {
    if (m->kind != BF16 || PAIRWISE) { store(to, at, from, n, m->kind == BF16); return; }
    float *y = (float *)to + at;
    SIMD for (long i = 0; i < n; i++) y[i] = from_bf16(to_bf16(from[i]));
}

/* Row b of the input of the next product: x normed. */
static void norm_row(const Model *m, const Scratch *s, const float *x, long b) {
    float y[m->C], f = norm_factor(x, m->C, m->eps);
    SIMD for (long i = 0; i < m->C; i++) y[i] = f * x[i];
    put(m, s->in, b * m->C, y, m->C);
    if (INTEGER_PRODUCTS && m->kind == INT8) quantize(m, s, y, b, m->C);
}

/* sigmoid of the product of x (n) with row g of a small matrix (rows, n) */
static float gate_of(const Model *m, const void *gate, long g, const float *x, long n) {
    float sum = 0;
    for (long i = 0; i < n; i++)
        sum += x[i] * (m->bf16 ? from_bf16(((const bf16_t *)gate)[g * n + i]) : ((const float *)gate)[g * n + i]);
    return 1.0f / (1.0f + expf(-sum));
}

/* Id of the token `back` places before token b in its row, -1 if there is none. */
static long id_before(const Scratch *s, const Tokens *t, long b, long back) {
    const long here = t->B > 1 && t->rows[0] == t->rows[1] ? b : 0; /* so many of them are in this call */
    return back <= here ? t->ids[b - back] : s->recent[RECENT * t->rows[b] + RECENT + here - back];
}

/* The normed embedding of the token `back` places before token b, with its n-grams (GPT._embed). */
static void embedding(const Model *m, const Scratch *s, const Tokens *t, long b, long back, float *x) {
    const long id = id_before(s, t, b, back), C = m->C, D = m->ngram_dim;
    load(x, m->wte, id * C, C, m->bf16);
    if (m->ngram_rows) {
        const long pair = 998244353 * id + 1000000007 * (id_before(s, t, b, back + 1) + 1);
        const long triple = pair + 1610612741 * (id_before(s, t, b, back + 2) + 1);
        float one[D], two[D], weights[D];
        load(one, m->ngram_embed, pair % m->ngram_rows * D, D, m->bf16);
        load(two, m->ngram_embed, triple % m->ngram_rows * D, D, m->bf16);
        SIMD for (long i = 0; i < D; i++) one[i] += two[i];
        for (long c = 0; c < C; c++) {
            float sum = 0;
            load(weights, m->ngram_proj, c * D, D, m->bf16);
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < D; i++) sum += weights[i] * one[i];
            x[c] += sum;
        }
    }
    float f = norm_factor(x, C, m->eps);
    SIMD for (long i = 0; i < C; i++) x[i] *= f;
}

/* Token b's embedding plus a gated share of the previous token's (smear). */
static void embed(const Model *m, const Scratch *s, const Tokens *t, long b) {
    long C = m->C;
    float *x = s->x + b * C, old[C];
    embedding(m, s, t, b, 0, x);
    if (m->smear_gate && id_before(s, t, b, 1) >= 0) {
        embedding(m, s, t, b, 1, old);
        float share = *m->smear_lambda * gate_of(m, m->smear_gate, 0, x, m->smear_channels);
        for (long i = 0; i < C; i++) x[i] += share * old[i];
    }
    memcpy(s->first + b * C, x, C * sizeof(float));
}

/* Keep the ids of token b and those before it for the next step, if it is its row's last; after every thread has read
   the old ones. */
static void remember(const Scratch *s, const Tokens *t, long b) {
    if (b + 1 < t->B && t->rows[b + 1] == t->rows[b]) return;
    long ids[RECENT];
    for (long i = 0; i < RECENT; i++) ids[i] = id_before(s, t, b, RECENT - 1 - i);
    memcpy(s->recent + RECENT * t->rows[b], ids, sizeof(ids));
}

/* A head's query or key, in place: rotated to its position, normed, scaled. */
static void rotate(const Model *m, float *v, long position) {
    long half = m->D / 2;
    const float *c = m->cosine + position * half, *s = m->sine + position * half;
    float f = m->qk_scale * norm_factor(v, m->D, m->eps);
    SIMD for (long i = 0; i < half; i++) {
        float a = v[i], b = v[half + i];
        v[i] = f * (a * c[i] + b * s[i]);
        v[half + i] = f * (b * c[i] - a * s[i]);
    }
}

/* Write token b's key and value of head g to the ring, and rotate the queries of its group. */
static void place(const Model *m, const Layer *layer, const Scratch *s, const Tokens *t, long b, long g) {
    long D = m->D, GD = m->G * D, group = m->H / m->G, position = t->positions[b];
    float *k = s->k + b * GD + g * D, *v = s->v + b * GD + g * D;
    for (long h = g * group; h < (g + 1) * group; h++) rotate(m, s->q + (b * m->H + h) * D, position);
    rotate(m, k, position);
    if (layer->value_embed) {
        float x[m->gate_channels], ve[D];
        load(x, s->in, b * m->C, m->gate_channels, m->kind == BF16 && PAIRWISE);
        load(ve, layer->value_embed, t->ids[b] * GD + g * D, D, m->bf16);
        float share = m->gate_scale * gate_of(m, layer->gate, g, x, m->gate_channels);
        for (long i = 0; i < D; i++) v[i] += share * ve[i];
    }
    long at = (t->rows[b] * layer->slots + position % layer->slots) * GD + g * D;
    store(layer->keys, at, k, D, m->bf16);
    store(layer->values, at, v, D, m->bf16);
}

/* p[i] = e^(p[i] - max) for i < n; p has room for a multiple of 16. Returns their sum. */
static float exponentials(float *p, long n) {
    float most = -INFINITY, sum = 0;
    for (long i = n; i % 16; i++) p[i] = -INFINITY;
#pragma omp simd reduction(max : most)
    for (long i = 0; i < n; i++) most = p[i] > most ? p[i] : most;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += p[i] = fast_exp(p[i] - most);
    return sum;
}

/* Add to sums of queries (heads, D) the values of n slots times p (heads, room), which is for these slots. */
INLINE void add_values(const int kind, const long D, const int n, const Model *m, float *sums, const char *value,
                       long from, long to, const float *p) {
    const long size = size_of(kind), step = m->G * D * size, group = m->H / m->G, ahead = (AHEAD / step + 1) * step;
    for (int i = 0; i < n; i++)
        for (long at = from * D * size; at < to * D * size; at += 64) __builtin_prefetch(value + i * step + ahead + at);
    for (long h = from * group; h < to * group; h++)
        for (long d = 0; d < D; d += LANES) {
            vec sum = get(sums + h * D, d, F32);
#pragma GCC unroll 4
            for (int i = 0; i < n; i++)
                sum = add_product(sum, all(p[h * m->room + i]), get(value + i * step, h / group * D + d, kind));
            memcpy(sums + h * D + d, &sum, sizeof(sum));
        }
}

/* Attention of a token's queries of heads from .. to-1, in place, over n slots of its row; the order of slots does not
   matter. All heads process a slot before the next one, so memory is read sequentially: twice the bandwidth of each head
   jumping from slot to slot. p (H, room). */
INLINE void look(const int kind, const long D, const Model *m, float *q, const char *keys, const char *values,
                 long from, long to, long n, float *p) {
    const long size = size_of(kind), step = m->G * D * size, group = m->H / m->G, ahead = (AHEAD / step + 1) * step;
    const float scale = 1.0f / sqrtf((float)D);
    vec products[to * group][LANES]; /* of each query with each of LANES slots, not yet summed */
    for (long first = 0; first < n; first += LANES) {
        for (long j = 0; j < LANES; j++) { /* past the end, the last slot again: reads must stay in bounds */
            const char *key = keys + (first + j < n ? first + j : n - 1) * step;
            for (long at = from * D * size; at < to * D * size; at += 64) __builtin_prefetch(key + ahead + at);
            for (long h = from * group; h < to * group; h++) {
                vec sum = {0};
                for (long d = 0; d < D; d += LANES)
                    sum = add_product(sum, get(q + h * D, d, F32), get(key, h / group * D + d, kind));
                products[h][j] = sum;
            }
        }
        for (long h = from * group; h < to * group; h++) {
            vec dots = totals(products[h]) * scale;
            memcpy(p + h * m->room + first, &dots, sizeof(dots));
        }
    }
    float sum[to * group];
    for (long h = from * group; h < to * group; h++) {
        sum[h] = exponentials(p + h * m->room, n);
        memset(q + h * D, 0, D * sizeof(float));
    }
    long i = 0;
    for (; i + 4 <= n; i += 4) add_values(kind, D, 4, m, q, values + i * step, from, to, p + i); /* loads sums once */
    for (; i < n; i++) add_values(kind, D, 1, m, q, values + i * step, from, to, p + i);
    for (long h = from * group; h < to * group; h++)
        for (long d = 0; d < D; d++) q[h * D + d] /= sum[h];
}

/* Attention output of token b's heads from .. to-1, into `wide`. */
static void attend(const Model *m, const Layer *layer, const Scratch *s, const Tokens *t, long b, long from, long to) {
    long D = m->D, seen = t->positions[b] + 1, n = seen < layer->slots ? seen : layer->slots;
    long ring = t->rows[b] * layer->slots * m->G * D * (m->bf16 ? 2 : 4), part = from * (m->H / m->G) * D;
    const char *keys = (char *)layer->keys + ring, *values = (char *)layer->values + ring;
    float *q = s->q + b * m->H * D, *p = s->scores + b * m->H * m->room;
    if (m->bf16 && D == 64) look(BF16, 64, m, q, keys, values, from, to, n, p);
    else if (m->bf16 && D == 128) look(BF16, 128, m, q, keys, values, from, to, n, p);
    else if (m->bf16) look(BF16, D, m, q, keys, values, from, to, n, p);
    else if (D == 64) look(F32, 64, m, q, keys, values, from, to, n, p);
    else if (D == 128) look(F32, 128, m, q, keys, values, from, to, n, p);
    else look(F32, D, m, q, keys, values, from, to, n, p);
    put(m, s->wide, b * m->H * D + part, q + part, (to - from) * (m->H / m->G) * D);
}

/* ---- the step ------------------------------------------------------------------------------------------------ */

#define EACH_TOKEN _Pragma("omp for schedule(static)") for (long b = 0; b < B; b++)
#define BARRIER _Pragma("omp barrier")

/* Tokens -> logits (B - first, V) of tokens first .. B-1; the cache then holds all of them. */
void decode_step(const Model *m, const Scratch *s, const Tokens *t, float *logits, long first) {
    const long B = t->B, C = m->C, HD = m->H * m->D, GD = m->G * m->D, one_row = B > 1 && t->rows[0] == t->rows[1];
    const int whole = INTEGER_PRODUCTS && m->kind == INT8; /* rows are rounded whole, once they are complete */
    const void *in = whole ? s->integers : s->in, *wide = whole ? s->integers : s->wide;
    const long parts = B < 8 ? m->G : 1, heads = m->G / parts; /* of a token's heads, for a thread each */
#pragma omp parallel
    {
        EACH_TOKEN embed(m, s, t, b);
        for (long i = 0; i < m->num_layers; i++) {
            const Layer *layer = &m->layers[i];
            EACH_TOKEN {
                float *x = s->x + b * C, *start = s->first + b * C;
                if (m->resid)
                    for (long c = 0; c < C; c++) x[c] = m->resid[i] * x[c] + m->x0[i] * start[c];
                norm_row(m, s, x, b);
            }
            product(m, layer->q, in, (Output){STORE, s->q, s->scale}, B, C, HD);
            product(m, layer->k, in, (Output){STORE, s->k, s->scale}, B, C, GD);
            product(m, layer->v, in, (Output){STORE, s->v, s->scale}, B, C, GD);
            BARRIER
#pragma omp for collapse(2) schedule(static, 1) nowait
            for (long b = 0; b < B; b++)
                for (long part = 0; part < parts; part++)
                    for (long g = part * heads; g < (part + 1) * heads; g++) place(m, layer, s, t, b, g);
            if (one_row) { BARRIER } /* otherwise a thread reads only what it wrote itself */
#pragma omp for collapse(2) schedule(static, 1)
            for (long b = 0; b < B; b++)
                for (long part = 0; part < parts; part++)
                    attend(m, layer, s, t, b, part * heads, (part + 1) * heads);
            if (whole) EACH_TOKEN quantize(m, s, (float *)s->wide + b * HD, b, HD);
            product(m, layer->proj, wide, (Output){ADD, s->x, s->scale}, B, HD, C);
            BARRIER
            EACH_TOKEN norm_row(m, s, s->x + b * C, b);
            product(m, layer->fc, in, (Output){RELU2, s->wide, s->scale}, B, C, 4 * C);
            BARRIER
            if (whole) EACH_TOKEN quantize(m, s, (float *)s->wide + b * 4 * C, b, 4 * C);
            product(m, layer->out, wide, (Output){ADD, s->x, s->scale}, B, 4 * C, C);
            BARRIER
            if (m->backout && i == m->middle)
                EACH_TOKEN memcpy(s->middle + b * C, s->x + b * C, C * sizeof(float));
        }
        EACH_TOKEN {
            float *x = s->x + b * C;
            remember(s, t, b);
            if (m->backout)
                for (long c = 0; c < C; c++) x[c] -= *m->backout * s->middle[b * C + c];
            norm_row(m, s, x, b);
        }
        const void *last = (char *)in + first * C * (whole || (m->kind == BF16 && PAIRWISE) ? 2 : 4);
        product(m, m->head, last, (Output){STORE, logits, s->scale + first}, B - first, C, m->V);
        BARRIER
#pragma omp for simd schedule(static)
        for (long i = 0; i < (B - first) * m->V; i++) /* cap * tanh(logit / cap) */
            logits[i] = m->softcap * (1 - 2 / (1 + fast_exp(2 / m->softcap * logits[i])));
    }
}
