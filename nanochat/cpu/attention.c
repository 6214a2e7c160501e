/* Attention of training over blocks of queries, forward and backward, on CPUs with AMX.

   flash_attention.py has the plain form: six batched products and two softmaxes a block, each over all heads. Here one
   head is worked on at a time, so that its scores stay in the cache, and in float32; nothing is copied but into the
   order in which AMX wants its second factors. The probabilities are kept for the backward pass, as there.

   Shapes: N heads of all rows, T positions, D channels of a head. Everything is bfloat16 and contiguous. T, D, the
   window and the size of a block are multiples of 32. */

#include "kernels.h"

#ifndef __AMX_BF16__

long tiles_usable(void) { return 0; }

#else
#include <sys/syscall.h>
#include <unistd.h>

long tiles_usable(void) { /* Linux grants the registers on request */
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

static void shape_tiles(void) { /* 16 rows of 64 bytes: 16 floats, or 32 bfloat16 */
    struct { uint8_t palette, start[15]; uint16_t row_bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = 64, shape.rows[i] = 16;
    __asm__ volatile("" : : "r"(&shape) : "memory"); /* gcc's next line claims to read its first bytes only */
    _tile_loadconfig(&shape);
}

/* The second factor (K, M) of a product lies in columns of 16: for each, row after row in pairs, [K/2][16][2]. */

static void pack(const bf16_t *x, long stride, bf16_t *to, long K, long M) { /* from x (K, M) */
    for (long m = 0; m < M; m += 16)
        for (long k = 0; k < K; k += 2) {
            bf16_t *pairs = to + m * K + 16 * k;
            const bf16_t *even = x + k * stride + m, *odd = even + stride;
            SIMD for (long i = 0; i < 16; i++) { pairs[2 * i] = even[i]; pairs[2 * i + 1] = odd[i]; }
        }
}

static void pack_transposed(const bf16_t *x, bf16_t *to, long K, long M) { /* from x (M, K): pairs stay together */
    for (long m = 0; m < M; m++)
        for (long k = 0; k < K; k += 2) memcpy(to + m / 16 * 16 * K + 16 * k + m % 16 * 2, x + m * K + k, 4);
}

/* 32 x 32 numbers: by way of pairs of rows, which the compiler makes vectors of */
static void transpose(const bf16_t *x, long x_stride, bf16_t *to, long to_stride) {
    uint32_t pairs[16][32];
    for (long p = 0; p < 16; p++) {
        const bf16_t *even = x + 2 * p * x_stride, *odd = even + x_stride;
        SIMD for (long c = 0; c < 32; c++) pairs[p][c] = even[c] | (uint32_t)odd[c] << 16;
    }
    for (long c = 0; c < 32; c++) {
        uint32_t column[16];
        SIMD for (long p = 0; p < 16; p++) column[p] = pairs[p][c];
        memcpy(to + c * to_stride, column, sizeof(column));
    }
}

/* Any other matrix: its rows are `row` numbers apart, and so are the beginnings of 32 columns and the next 32 `next`. */
typedef struct { const bf16_t *at; long row, next; } Factor;
typedef struct { float *at; long row, next; } Sums;

/* out (N, M) = a (N, K) b, or out += a b; the columns of 16 of b are `column` numbers apart */
static void product(Factor a, const bf16_t *b, long column, Sums out, long N, long M, long K, int add) {
    for (long m = 0; m < M; m += 32)
        for (long n = 0; n < N; n += 32) {
            float *to = out.at + n * out.row + m / 32 * out.next, *below = to + 16 * out.row;
            const bf16_t *left = a.at + n * a.row, *right = b + m / 16 * column;
            const long bytes = 4 * out.row;
            if (add) {
                _tile_loadd(0, to, bytes); _tile_loadd(1, to + 16, bytes);
                _tile_loadd(2, below, bytes); _tile_loadd(3, below + 16, bytes);
            } else { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); }
            for (long k = 0; k < K; k += 32, left += a.next) {
                _tile_loadd(4, left, 2 * a.row); _tile_loadd(5, left + 16 * a.row, 2 * a.row);
                _tile_loadd(6, right + 16 * k, 64); _tile_loadd(7, right + column + 16 * k, 64);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, to, bytes); _tile_stored(1, to + 16, bytes);
            _tile_stored(2, below, bytes); _tile_stored(3, below + 16, bytes);
        }
}

/* A head's blocks: queries start .. end - 1 and the keys first .. end - 1 that they see among them. */
#define EACH_BLOCK                                                                                               \
    for (long start = 0, end, first, Q, K; end = start + size < T ? start + size : T,                            \
              first = start > window ? start - window : 0, Q = end - start, K = end - first, start < T; start = end)

static void *space(long numbers, long bytes) { return aligned_alloc(64, (numbers * bytes + 63) / 64 * 64); }

/* y (N, T, D) of q, k, v (N, T, D), and the probabilities of all blocks, `kept` numbers a head */
void attention_forward(const bf16_t *q, const bf16_t *k, const bf16_t *v, bf16_t *y, bf16_t *probabilities, long kept,
                       long N, long T, long D, long size, long window, float scale) {
#pragma omp parallel
    {
        bf16_t *keys = space(T * D, 2), *values = space(T * D, 2);
        float *scores = space(size * T, 4), *out = space(size * D, 4);
        shape_tiles();
#pragma omp for
        for (long n = 0; n < N; n++) {
            const long at = n * T * D;
            bf16_t *p = probabilities + n * kept;
            pack_transposed(k + at, keys, D, T);
            pack(v + at, D, values, T, D);
            EACH_BLOCK {
                product((Factor){q + at + start * D, D, 32}, keys + first * D, 16 * D, (Sums){scores, K, 32}, Q, K, D, 0);
                for (long i = 0; i < Q; i++) {
                    const long here = start + i, from = here > window + first ? here - window - first : 0;
                    softmax_row(scores + i * K, from, here - first + 1, K, scale);
                    store(p, i * K, scores + i * K, K, 1);
                }
                product((Factor){p, K, 32}, values + 16 * first, 16 * T, (Sums){out, D, 32}, Q, D, K, 0);
                store(y, at + start * D, out, Q * D, 1);
                p += Q * K;
            }
        }
        _tile_release();
        free(keys), free(values), free(scores), free(out);
    }
}

/* The gradients of q, k, v from that of y, g (N, T, D). Those of k and v add up transposed, so that only q and g are
   transposed, and not the probabilities and scores, of which there are more; both lie in panels of 32 positions,
   (T / 32, D, 32), as rows a power of two apart would share few places in the cache. */
void attention_backward(const bf16_t *g, const bf16_t *q, const bf16_t *k, const bf16_t *v, const bf16_t *probabilities,
                        long kept, bf16_t *dq, bf16_t *dk, bf16_t *dv, long N, long T, long D, long size, long window,
                        float scale) {
#pragma omp parallel
    {
        bf16_t *keys = space(T * D, 2), *values = space(T * D, 2), *qt = space(T * D, 2), *gt = space(T * D, 2);
        bf16_t *ds = space(size * T, 2), *packed = space(size * T, 2);
        float *scores = space(size * T, 4), *out = space(size * D, 4), *row = space(T, 4);
        float *dkt = space(T * D, 4), *dvt = space(T * D, 4);
        shape_tiles();
#pragma omp for
        for (long n = 0; n < N; n++) {
            const long at = n * T * D;
            const bf16_t *p = probabilities + n * kept;
            pack(k + at, D, keys, T, D);
            pack_transposed(v + at, values, D, T);
            for (long t = 0; t < T; t += 32)
                for (long d = 0; d < D; d += 32) {
                    transpose(q + at + t * D + d, D, qt + t * D + 32 * d, 32);
                    transpose(g + at + t * D + d, D, gt + t * D + 32 * d, 32);
                }
            memset(dkt, 0, 4 * T * D);
            memset(dvt, 0, 4 * T * D);
            EACH_BLOCK {
                product((Factor){g + at + start * D, D, 32}, values + first * D, 16 * D, (Sums){scores, K, 32}, Q, K, D, 0);
                for (long i = 0; i < Q; i++) {
                    load(row, p, i * K, K, 1);
                    softmax_row_backward(scores + i * K, row, K, scale);
                    store(ds, i * K, scores + i * K, K, 1);
                }
                product((Factor){ds, K, 32}, keys + 16 * first, 16 * T, (Sums){out, D, 32}, Q, D, K, 0);
                store(dq, at + start * D, out, Q * D, 1);
                pack(ds, K, packed, Q, K);
                product((Factor){qt + start * D, 32, 32 * D}, packed, 16 * Q, (Sums){dkt + first * D, 32, 32 * D}, D, K, Q, 1);
                pack(p, K, packed, Q, K);
                product((Factor){gt + start * D, 32, 32 * D}, packed, 16 * Q, (Sums){dvt + first * D, 32, 32 * D}, D, K, Q, 1);
                p += Q * K;
            }
            store(qt, 0, dkt, T * D, 1);
            store(gt, 0, dvt, T * D, 1);
            for (long t = 0; t < T; t += 32)
                for (long d = 0; d < D; d += 32) {
                    transpose(qt + t * D + 32 * d, 32, dk + at + t * D + d, D);
                    transpose(gt + t * D + 32 * d, 32, dv + at + t * D + d, D);
                }
        }
        _tile_release();
        free(keys), free(values), free(qt), free(gt), free(ds), free(packed);
        free(scores), free(out), free(row), free(dkt), free(dvt);
    }
}
#endif
