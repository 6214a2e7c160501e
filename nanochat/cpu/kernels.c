/* The elementwise steps of training on a CPU, each in one pass over memory.

   The matrix products stay with PyTorch. What is left between them reads and writes far more bytes than it
   computes, and as separate tensor operations every one of them goes over the data again. fused.py calls the
   functions below where they apply; their plain PyTorch forms are in gpt.py, flash_attention.py and loss_head.py.

   Tensors are contiguous, float32 (bf16 = 0) or bfloat16 (bf16 = 1); arithmetic is float32. Every function works
   row by row: a row is brought into the cache as floats, worked on, and stored. */

#include "kernels.h"

/* ---- RMSNorm ------------------------------------------------------------------------------------------------- */

/* y = x * r with r = 1 / sqrt(mean(x^2) + eps) per row of n; r is saved for the backward pass. */
void norm_forward(const void *x, void *y, float *r, long rows, long n, float eps, int bf16) {
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        float v[n], sum = 0;
        load(v, x, row * n, n, bf16);
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < n; i++) sum += v[i] * v[i];
        float scale = r[row] = 1.0f / sqrtf(sum / n + eps);
        SIMD for (long i = 0; i < n; i++) v[i] *= scale;
        store(y, row * n, v, n, bf16);
    }
}

/* gx = r * (gy - y * mean(gy * y)) */
void norm_backward(const void *gy, const void *y, const float *r, void *gx, long rows, long n, int bf16) {
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        float g[n], v[n], dot = 0, scale = r[row];
        load(g, gy, row * n, n, bf16);
        load(v, y, row * n, n, bf16);
#pragma omp simd reduction(+ : dot)
        for (long i = 0; i < n; i++) dot += g[i] * v[i];
        dot /= n;
        SIMD for (long i = 0; i < n; i++) g[i] = scale * (g[i] - v[i] * dot);
        store(gx, row * n, g, n, bf16);
    }
}

/* ---- two tensors mixed by scalars ---------------------------------------------------------------------------- */

/* z = a * x + b * y, each of size n */
void mix_forward(const void *x, const void *y, void *z, float a, float b, long n, int bf16) {
    const long step = 4096;
#pragma omp parallel for
    for (long at = 0; at < n; at += step) {
        float u[step], v[step];
        long m = at + step < n ? step : n - at;
        load(u, x, at, m, bf16);
        load(v, y, at, m, bf16);
        SIMD for (long i = 0; i < m; i++) u[i] = a * u[i] + b * v[i];
        store(z, at, u, m, bf16);
    }
}

/* gx = a * g, gy = b * g; dots[0] = sum(g * x), dots[1] = sum(g * y) */
void mix_backward(const void *g, const void *x, const void *y, void *gx, void *gy, float a, float b, double *dots,
                  long n, int bf16) {
    const long step = 4096;
    double with_x = 0, with_y = 0;
#pragma omp parallel for reduction(+ : with_x, with_y)
    for (long at = 0; at < n; at += step) {
        float u[step], v[step], w[step], sum_x = 0, sum_y = 0;
        long m = at + step < n ? step : n - at;
        load(u, g, at, m, bf16);
        load(v, x, at, m, bf16);
        load(w, y, at, m, bf16);
#pragma omp simd reduction(+ : sum_x, sum_y)
        for (long i = 0; i < m; i++) { sum_x += u[i] * v[i]; sum_y += u[i] * w[i]; }
        SIMD for (long i = 0; i < m; i++) { v[i] = a * u[i]; w[i] = b * u[i]; }
        store(gx, at, v, m, bf16);
        store(gy, at, w, m, bf16);
        with_x += sum_x;
        with_y += sum_y;
    }
    dots[0] = with_x;
    dots[1] = with_y;
}

/* ---- ReLU squared -------------------------------------------------------------------------------------------- */

/* in place: h = max(h, 0)^2 */
void relu2_forward(void *h, long n, int bf16) {
    const long step = 4096;
#pragma omp parallel for
    for (long at = 0; at < n; at += step) {
        float v[step];
        long m = at + step < n ? step : n - at;
        load(v, h, at, m, bf16);
        SIMD for (long i = 0; i < m; i++) v[i] = v[i] > 0 ? v[i] * v[i] : v[i] != v[i] ? v[i] : 0;
        store(h, at, v, m, bf16);
    }
}

/* gh = g * 2 * max(h, 0), where a = max(h, 0)^2 was saved */
void relu2_backward(const void *g, const void *a, void *gh, long n, int bf16) {
    const long step = 4096;
#pragma omp parallel for
    for (long at = 0; at < n; at += step) {
        float u[step], v[step];
        long m = at + step < n ? step : n - at;
        load(u, g, at, m, bf16);
        load(v, a, at, m, bf16);
        SIMD for (long i = 0; i < m; i++) u[i] *= 2 * sqrtf(v[i]);
        store(gh, at, u, m, bf16);
    }
}

/* ---- queries and keys: norm, rotation, scale, and the layout of attention ---------------------------- */

/* x (B, T, H, D) -> y (B, H, T, D) = scale * rotate(norm(x)); r (B, H, T); cos, sin (T, D/2) float32 */
void rotary_forward(const void *x, const float *cosine, const float *sine, void *y, float *r, long B, long T, long H,
                    long D, float scale, float eps, int bf16) {
    long half = D / 2;
#pragma omp parallel for collapse(2)
    for (long b = 0; b < B; b++)
        for (long t = 0; t < T; t++)
            for (long h = 0; h < H; h++) {
                float v[D], u[D], sum = 0;
                load(v, x, ((b * T + t) * H + h) * D, D, bf16);
#pragma omp simd reduction(+ : sum)
                for (long i = 0; i < D; i++) sum += v[i] * v[i];
                long row = (b * H + h) * T + t;
                float f = r[row] = 1.0f / sqrtf(sum / D + eps);
                f *= scale;
                const float *restrict c = cosine + t * half, *restrict s = sine + t * half;
                SIMD for (long i = 0; i < half; i++) {
                    u[i] = f * (v[i] * c[i] + v[half + i] * s[i]);
                    u[half + i] = f * (v[half + i] * c[i] - v[i] * s[i]);
                }
                store(y, row * D, u, D, bf16);
            }
}

/* gy, y (B, H, T, D) -> gx (B, T, H, D); a rotation preserves lengths, so the norm's backward may come first */
void rotary_backward(const void *gy, const void *y, const float *r, const float *cosine, const float *sine, void *gx,
                     long B, long T, long H, long D, float scale, int bf16) {
    long half = D / 2;
#pragma omp parallel for collapse(2)
    for (long b = 0; b < B; b++)
        for (long t = 0; t < T; t++)
            for (long h = 0; h < H; h++) {
                float g[D], v[D], dot = 0;
                long row = (b * H + h) * T + t;
                load(g, gy, row * D, D, bf16);
                load(v, y, row * D, D, bf16);
#pragma omp simd reduction(+ : dot)
                for (long i = 0; i < D; i++) dot += g[i] * v[i];
                dot /= D * scale; /* y = scale * n: mean(dn * n) = mean(gy * y); times n = y / scale */
                float f = r[row];
                SIMD for (long i = 0; i < D; i++) g[i] = f * (scale * g[i] - v[i] * dot);
                const float *restrict c = cosine + t * half, *restrict s = sine + t * half;
                SIMD for (long i = 0; i < half; i++) {
                    v[i] = g[i] * c[i] - g[half + i] * s[i];
                    v[half + i] = g[half + i] * c[i] + g[i] * s[i];
                }
                store(gx, ((b * T + t) * H + h) * D, v, D, bf16);
            }
}

/* ---- AdamW --------------------------------------------------------------------------------------------------- */

/* In place, all of size n: m += new1 * (g - m); v = beta2 * v + new2 * g^2, where new1 is 1 - beta1, new2 1 - beta2;
   p = keep * p - rate * m / (sqrt(v * correction) + eps) */
void adamw(float *restrict p, const float *restrict g, float *restrict m, float *restrict v, long n, float keep,
           float rate, float new1, float beta2, float new2, float correction, float eps) {
#pragma omp parallel for simd
    for (long i = 0; i < n; i++) {
        m[i] += new1 * (g[i] - m[i]);
        v[i] = beta2 * v[i] + new2 * g[i] * g[i];
        p[i] = keep * p[i] - rate * m[i] / (sqrtf(v[i] * correction) + eps);
    }
}

/* ---- the end of Muon's step ---------------------------------------------------------------------------------- */

/* In place, of size n: p -= rate * u, and decay * p where u shrinks p too */
void cautious_step(float *restrict p, const void *u, long n, float rate, float decay, int bf16) {
    const long step = 4096;
#pragma omp parallel for
    for (long at = 0; at < n; at += step) {
        float v[step];
        long m = at + step < n ? step : n - at;
        load(v, u, at, m, bf16);
        SIMD for (long i = 0; i < m; i++) p[at + i] -= rate * v[i] + (v[i] * p[at + i] >= 0 ? decay * p[at + i] : 0);
    }
}

/* ---- attention's softmax over one block of queries ----------------------------------------------------------- */

/* scores (N, Q, K) become probabilities in place. Query i of the block sits at key position first + i and sees the
   `window` keys before it and itself; other keys get 0. */
void softmax_forward(void *scores, long N, long Q, long K, long first, long window, float scale, int bf16) {
#pragma omp parallel for
    for (long row = 0; row < N * Q; row++) {
        float v[K];
        long here = first + row % Q, from = here - window > 0 ? here - window : 0;
        load(v, scores, row * K, K, bf16);
        softmax_row(v, from, here + 1, K, scale);
        store(scores, row * K, v, K, bf16);
    }
}

/* in place: g = scale * p * (g - sum(p * g)), both (N, Q, K) */
void softmax_backward(void *g, const void *p, long N, long Q, long K, float scale, int bf16) {
#pragma omp parallel for
    for (long row = 0; row < N * Q; row++) {
        float u[K], v[K];
        load(u, g, row * K, K, bf16);
        load(v, p, row * K, K, bf16);
        softmax_row_backward(u, v, K, scale);
        store(g, row * K, u, K, bf16);
    }
}

/* ---- the head's softcapped cross-entropy --------------------------------------------------------------------- */

/* logits (N, V), before the softcap -> losses (N,). With `backward`, the logits become the gradient of
   sum(weights * losses). A capped logit lies within +-cap <= 64, so e^x cannot overflow and no maximum is needed. */
void head_rows(void *logits, const int64_t *targets, const float *weights, float *losses, long N, long V, float cap,
               int backward, int bf16) {
#pragma omp parallel
    {
        float *v = malloc(V * sizeof(float));
#pragma omp for
        for (long row = 0; row < N; row++) {
            float sum = 0, over = 2 / cap;
            load(v, logits, row * V, V, bf16);
            /* tanh(z / cap) = 1 - 2 / (e^(2z/cap) + 1) */
            float target = 1 - 2 / (fast_exp(over * v[targets[row]]) + 1);
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < V; i++) {
                float t = 1 - 2 / (fast_exp(over * v[i]) + 1), e = bounded_exp(cap * t);
                sum += e;
                v[i] = e * (1 - t * t);
            }
            losses[row] = logf(sum) - cap * target;
            if (!backward) continue;
            float w = weights[row], share = w / sum;
            SIMD for (long i = 0; i < V; i++) v[i] *= share;
            v[targets[row]] -= w * (1 - target * target);
            store(logits, row * V, v, V, bf16);
        }
        free(v);
    }
}
