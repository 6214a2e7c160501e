/* One decode step of the whole model on a CPU: B new tokens, one for each of B rows or several for one row.

   A step computes so little per weight that in PyTorch the calls cost more than the arithmetic. Here the step is one
   function, executed by all threads together from start to end, that reads every weight once: at memory bandwidth for
   one token, and for many each weight is used for all of them while it is in a register.

   gpt.py is the definition. cpu_decoder.py lists what of it is implemented here and compares the two at start.
   Activations are float32 where PyTorch rounds each to bfloat16; only the inputs of products with bfloat16 weights, and
   the cache, are rounded. The order of every sum is independent of B, so a row's results are the same bits whichever
   rows are beside it and however a prompt is split.

   C channels, H query heads, G key/value heads, D head size, V vocabulary. The structs are mirrored in cpu_decoder.py. */

#include "vectors.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#define NUM_THREADS omp_get_num_threads()
#else
#define NUM_THREADS 1
#endif

enum { AHEAD = 4096 }; /* prefetch distance in a ring, bytes */

/* Inputs of products with bfloat16 weights are rounded to bfloat16. They are stored as bfloat16 if the CPU multiplies
   pairs of bfloat16, else as float32, which avoids a conversion per tile. */
#ifdef __AVX512BF16__
enum { PAIRWISE = 1 };
#else
enum { PAIRWISE = 0 };
#endif

/* (M, K), packed (packed_weights.py): blocks of LANES outputs, in each of them input after input (bfloat16: pair after
   pair), so that a product reads it from start to end and needs no sum across a vector. M is padded to a whole block.
   int8 has a scale for each output. */
typedef struct { const void *weight; const float *scale; } Matrix;

typedef struct {
    Matrix q, k, v, proj, fc, out;
    const void *gate, *value_embed; /* (G, gate_channels) and (V, G*D), or NULL */
    void *keys, *values;            /* rings (rows, slots, G, D) */
    long slots;
} Layer;

typedef struct {
    long C, H, G, D, V, num_layers, middle, gate_channels, smear_channels;
    long kind, bf16; /* F32, BF16 or INT8 matrices; whether embeddings and cache are bfloat16 */
    long room;       /* slots of the largest ring, rounded up to 16 */
    float softcap, qk_scale, gate_scale, eps;
    const void *wte, *smear_gate;                                        /* (V, C), (smear_channels) or NULL */
    const float *resid, *x0, *smear_lambda, *backout, *cosine, *sine; /* the first four may be NULL; (positions, D/2) */
    Matrix head;
    const Layer *layers;
} Model;

typedef struct { /* float32 unless noted; `in` and `wide` are inputs of products */
    float *x, *first, *middle, *q, *k, *v; /* (B, C) thrice, (B, H*D), (B, G*D) twice */
    void *in, *wide;                       /* (B, C) and (B, max(4C, H*D)) */
    float *scores;                         /* (B, H, room) */
    void *previous;                        /* (rows, C) embedding of each row's last token, as in the cache; or NULL */
} Scratch;

typedef struct { /* B tokens: either one each of B rows, or all of one row, in order */
    const long *ids, *rows, *positions;
    long B;
} Tokens;

/* ---- matrix products ----------------------------------------------------------------------------------------- */

const int block_outputs = LANES; /* for packed_weights.py */

typedef struct { /* where a product (B, M) is written, and how */
    enum { STORE, ADD, RELU2 } then;
    void *y;
} Output;

/* Write the sums of a block's n outputs. */
INLINE void finish(const int kind, vec sum, Matrix w, long block, const long n, Output out, long at) {
    float *y = (float *)out.y + at;
    vec before = {0};
    if (out.then == ADD) memcpy(&before, y, n * sizeof(float));
    if (kind == INT8)
        for (int i = 0; i < LANES; i++) sum[i] = fmaf(sum[i], w.scale[LANES * block + i], before[i]); /* rounded once */
    else sum += before;
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
    for (int r = 0; r < R; r++) {
        const long m = LANES * (block + r), left = M - m < LANES ? M - m : LANES;
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
            if (left == LANES) finish(kind, sum[N * r + n], w, block + r, LANES, out, (b + n) * M + m);
            else finish(kind, sum[N * r + n], w, block + r, left, out, (b + n) * M + m);
    }
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
            if (last - first == 4) { /* these weights stay in cache while all of x passes */                                      \
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

#ifdef __AMX_BF16__
/* AMX: registers of 16 rows of 64 bytes. One instruction multiplies 32 inputs of up to 16 tokens by a block's 16 outputs;
   the packed weights have its layout. Its order of summation differs, so it is used for a single token too. */
enum { TILE_TOKENS = 16, TILE_INPUTS = 32 };
static int tiles_allowed;

__attribute__((constructor)) static void ask_for_tiles(void) { /* Linux grants these registers on request */
    const long request_permission = 0x1023, tile_data = 18;
    tiles_allowed = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

/* Registers 0-3 hold sums, 4 the inputs of N tokens, 5-7 weights. */
static void shape_tiles(long N) {
    struct { uint8_t palette, start[15]; uint16_t row_bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = 64, shape.rows[i] = i < 5 ? N : 16;
    __asm__ volatile("" : : "r"(&shape) : "memory"); /* gcc's next line claims to read its first bytes only */
    _tile_loadconfig(&shape);
}

/* R blocks of outputs, 4 or 1, for N rows of x from b on; `skip` of these are already computed. */
INLINE void sums_of_tiles(const int R, Matrix w, long block, const bf16_t *x, long b, long N, long skip, long K,
                          Output out, long M) {
    const char *weight = (const char *)w.weight + block * LANES * K * 2;
    float sum[4][TILE_TOKENS][LANES];
#define EACH_BLOCK(DO) { DO(0, 5) if (R == 4) { DO(1, 6) DO(2, 7) DO(3, 5) } } /* registers have fixed numbers */
#define CLEAR(r, w) _tile_zero(r);
#define ADD_UP(r, w) _tile_loadd(w, weight + 2 * LANES * (r * K + k), 64); _tile_dpbf16ps(r, 4, w);
#define KEEP(r, w) _tile_stored(r, sum[r], 64);
    EACH_BLOCK(CLEAR)
    for (long k = 0; k < K; k += TILE_INPUTS) {
        _tile_loadd(4, x + b * K + k, 2 * K);
        EACH_BLOCK(ADD_UP)
    }
    EACH_BLOCK(KEEP)
    for (int r = 0; r < R; r++) {
        const long m = LANES * (block + r), left = M - m < LANES ? M - m : LANES;
        for (long n = skip; n < N; n++)
            if (left == LANES) finish(BF16, get(sum[r][n], 0, F32), w, block + r, LANES, out, (b + n) * M + m);
            else finish(BF16, get(sum[r][n], 0, F32), w, block + r, left, out, (b + n) * M + m);
    }
}

static void product_of_tiles(Matrix w, const bf16_t *x, Output out, long B, long K, long M) {
    const long blocks = (M + LANES - 1) / LANES, unit = blocks >= 4 * NUM_THREADS ? 4 : 1;
    const long parts = (B + TILE_TOKENS - 1) / TILE_TOKENS, N = (B + parts - 1) / parts; /* B in parts of one size, */
    shape_tiles(N);
#pragma omp for schedule(static) nowait
    for (long first = 0; first < blocks; first += unit)
        for (long from = 0; from < B; from += N) {
            const long b = from + N < B ? from : B - N; /* of which the last may begin in the one before */
            if (first + 4 <= blocks && unit == 4) sums_of_tiles(4, w, first, x, b, N, from - b, K, out, M);
            else
                for (long i = first; i < first + unit && i < blocks; i++)
                    sums_of_tiles(1, w, i, x, b, N, from - b, K, out, M);
        }
    _tile_release();
}
#endif

/* Product of x (B, K) with w, outputs divided among the threads. No barrier: the caller sets one. */
static void product(const Model *model, Matrix w, const void *x, Output out, long B, long K, long M) {
#ifdef __AMX_BF16__
    if (model->kind == BF16 && tiles_allowed && K % TILE_INPUTS == 0) {
        product_of_tiles(w, x, out, B, K, M);
        return;
    }
#endif
    switch (model->kind) {
    case BF16: product_BF16(w, x, out, B, K, M); break;
    case INT8: product_INT8(w, x, out, B, K, M); break;
    default: product_F32(w, x, out, B, K, M);
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

/* Row b of `in`, the input of the next product: x normed. */
static void norm_row(const Model *m, const float *x, void *in, long b) {
    float y[m->C], f = norm_factor(x, m->C, m->eps);
    SIMD for (long i = 0; i < m->C; i++) y[i] = f * x[i];
    put(m, in, b * m->C, y, m->C);
}

/* sigmoid of the product of x (n) with row g of a small matrix (rows, n) */
static float gate_of(const Model *m, const void *gate, long g, const float *x, long n) {
    float sum = 0;
    for (long i = 0; i < n; i++)
        sum += x[i] * (m->bf16 ? from_bf16(((const bf16_t *)gate)[g * n + i]) : ((const float *)gate)[g * n + i]);
    return 1.0f / (1.0f + expf(-sum));
}

/* The normed embedding of a token. */
static void embedding(const Model *m, long id, float *x) {
    load(x, m->wte, id * m->C, m->C, m->bf16);
    float f = norm_factor(x, m->C, m->eps);
    SIMD for (long i = 0; i < m->C; i++) x[i] *= f;
}

/* Token b's embedding plus a gated share of the previous token's (smear). */
static void embed(const Model *m, const Scratch *s, const Tokens *t, long b) {
    long C = m->C;
    float *x = s->x + b * C, old[C];
    embedding(m, t->ids[b], x);
    if (m->smear_gate) {
        if (b && t->rows[b - 1] == t->rows[b]) {
            bf16_t rounded[C];
            embedding(m, t->ids[b - 1], old);
            if (m->bf16) store(rounded, 0, old, C, 1), load(old, rounded, 0, C, 1);
        } else
            load(old, s->previous, t->rows[b] * C, C, m->bf16);
        float share = *m->smear_lambda * gate_of(m, m->smear_gate, 0, x, m->smear_channels);
        for (long i = 0; i < C; i++) x[i] += share * old[i];
    }
    memcpy(s->first + b * C, x, C * sizeof(float));
}

/* Store token b's embedding for the next step, if it is its row's last; after every thread has read the old one. */
static void remember(const Model *m, const Scratch *s, const Tokens *t, long b) {
    if (!m->smear_gate || (b + 1 < t->B && t->rows[b + 1] == t->rows[b])) return;
    float x[m->C];
    embedding(m, t->ids[b], x);
    store(s->previous, t->rows[b] * m->C, x, m->C, m->bf16);
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
    for (long i = 0; i < n; i++) {
        const char *value = values + i * step;
        for (long at = from * D * size; at < to * D * size; at += 64) __builtin_prefetch(value + ahead + at);
        for (long h = from * group; h < to * group; h++) {
            const vec weight = all(p[h * m->room + i]);
            for (long d = 0; d < D; d += LANES) {
                vec y = add_product(get(q + h * D, d, F32), weight, get(value, h / group * D + d, kind));
                memcpy(q + h * D + d, &y, sizeof(y));
            }
        }
    }
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
                norm_row(m, x, s->in, b);
            }
            product(m, layer->q, s->in, (Output){STORE, s->q}, B, C, HD);
            product(m, layer->k, s->in, (Output){STORE, s->k}, B, C, GD);
            product(m, layer->v, s->in, (Output){STORE, s->v}, B, C, GD);
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
            product(m, layer->proj, s->wide, (Output){ADD, s->x}, B, HD, C);
            BARRIER
            EACH_TOKEN norm_row(m, s->x + b * C, s->in, b);
            product(m, layer->fc, s->in, (Output){RELU2, s->wide}, B, C, 4 * C);
            BARRIER
            product(m, layer->out, s->wide, (Output){ADD, s->x}, B, 4 * C, C);
            BARRIER
            if (m->backout && i == m->middle)
                EACH_TOKEN memcpy(s->middle + b * C, s->x + b * C, C * sizeof(float));
        }
        EACH_TOKEN {
            float *x = s->x + b * C;
            remember(m, s, t, b);
            if (m->backout)
                for (long c = 0; c < C; c++) x[c] -= *m->backout * s->middle[b * C + c];
            norm_row(m, x, s->in, b);
        }
        const void *in = (char *)s->in + first * C * (m->kind == BF16 && PAIRWISE ? 2 : 4);
        product(m, m->head, in, (Output){STORE, logits}, B - first, C, m->V);
        BARRIER
#pragma omp for simd schedule(static)
        for (long i = 0; i < (B - first) * m->V; i++) /* cap * tanh(logit / cap) */
            logits[i] = m->softcap * (1 - 2 / (1 + fast_exp(2 / m->softcap * logits[i])));
    }
}
