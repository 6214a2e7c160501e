/* Draws the next token of each row from logits: temperature, top_k and min_p of SamplingParams (inference/sampling.py)
   without top_p, which needs a sort. It gets only settings whose fields are listed in C_FIELDS there. */

#include "kernels.h"

enum { BLOCK = 64 };

static long count_from(const float *p, long n, float edge) {
    int count = 0;
#pragma omp simd reduction(+ : count)
    for (long i = 0; i < n; i++) count += p[i] >= edge;
    return count;
}

/* A threshold that k elements of p (n) reach, or a few more if several equal it; p in [0, 1], k < n. Positive floats
   sort like their bits, so a bisection over the bits finds it: at most 30 counts, and no branch on a single element. */
static float edge_of_largest(const float *p, long n, long k) {
    union { uint32_t bits; float number; } low = {0}, high = {.number = 1}, middle;
    for (high.bits++; high.bits - low.bits > 1;) { /* k or more reach low, fewer reach high */
        middle.bits = low.bits + (high.bits - low.bits) / 2;
        long count = count_from(p, n, middle.number);
        if (count == k) return middle.number;
        if (count > k) low = middle;
        else high = middle;
    }
    return low.number;
}

/* Moves the k largest of p (n), k < n, to its front, in their order, and their indices to ids (k). Of elements equal to
   the threshold the first are kept. */
static void keep_largest(float *p, int *ids, long n, long k, float *maxima) {
    const long blocks = (n + BLOCK - 1) / BLOCK;
    for (long block = 0; block < blocks; block++) {
        const long end = (block + 1) * BLOCK < n ? (block + 1) * BLOCK : n;
        float most = 0;
#pragma omp simd reduction(max : most)
        for (long i = block * BLOCK; i < end; i++) most = p[i] > most ? p[i] : most;
        maxima[block] = most;
    }
    float edge = k < blocks ? edge_of_largest(maxima, blocks, k) : 0; /* k blocks reach it: the k largest do */
    long few = 0, above = 0;
    for (long block = 0; block < blocks; block++) {
        if (maxima[block] < edge) continue;
        const long end = (block + 1) * BLOCK < n ? (block + 1) * BLOCK : n;
        for (long i = block * BLOCK; i < end; i++)
            if (p[i] >= edge) p[few] = p[i], ids[few++] = i;
    }
    if (few > k) edge = edge_of_largest(p, few, k);
    for (long i = 0; i < few; i++) above += p[i] > edge;
    long equal = k - above, kept = 0;
    for (long i = 0; i < few; i++)
        if (p[i] > edge || (p[i] == edge && equal-- > 0)) p[kept] = p[i], ids[kept++] = ids[i];
}

/* Inverse CDF: the index at which the running sum of p (n) passes the fraction `uniform` of the total. */
static long at_share(const float *p, long n, double uniform, double *block_sums) {
    double total = 0;
    for (long block = 0; block < n; block += BLOCK) {
        const long end = block + BLOCK < n ? block + BLOCK : n;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = block; i < end; i++) sum += p[i];
        total += block_sums[block / BLOCK] = sum;
    }
    double target = uniform * total * (1 - 1e-12);
    long block = 0, last = 0;
    while (block + BLOCK < n && block_sums[block / BLOCK] <= target) target -= block_sums[block / BLOCK], block += BLOCK;
    for (long i = block; i < n; i++) {
        if (p[i] == 0) continue;
        last = i; /* if rounding leaves the target unreached, the last possible index */
        if (p[i] > target) break;
        target -= p[i];
    }
    return last;
}

typedef struct { double *block_sums; float *p, *maxima; int *ids; } Work; /* blocks, V, blocks, V */

/* The next token for logits x (V); -1 if these are not finite. */
static long draw_row(const float *x, long V, float temperature, long k, float log_min_p, double uniform, Work w) {
    float most = -INFINITY;
    int bad = 0;
#pragma omp simd reduction(max : most) reduction(| : bad)
    for (long i = 0; i < V; i++) {
        most = x[i] > most ? x[i] : most;
        bad |= !(x[i] < INFINITY); /* or a NaN */
    }
    if (bad || most == -INFINITY) return -1;
    if (k == 1) {
        long best = 0;
        while (x[best] != most) best++;
        return best;
    }
    const float least = log_min_p > -87 ? log_min_p : -87;
    SIMD for (long i = 0; i < V; i++) {
        float power = (x[i] - most) / temperature;
        w.p[i] = power < least ? 0 : fast_exp(power);
    }
    if (k >= V) return at_share(w.p, V, uniform, w.block_sums);
    keep_largest(w.p, w.ids, V, k, w.maxima);
    return w.ids[at_share(w.p, k, uniform, w.block_sums)];
}

/* logits (B, V) -> tokens (B); top_k from 1 (the most likely token) to V (all); uniform (B) in [0, 1). */
void draw_rows(const float *logits, const float *temperatures, const long *top_k, const float *log_min_p,
               const double *uniform, long *tokens, long B, long V) {
    const long blocks = (V + BLOCK - 1) / BLOCK;
#pragma omp parallel if (B > 1)
    {
        double *memory = malloc(blocks * (sizeof(double) + sizeof(float)) + V * (sizeof(float) + sizeof(int)));
        float *p = (float *)(memory + blocks);
        Work work = {memory, p, p + V, (int *)(p + V + blocks)};
#pragma omp for schedule(static)
        for (long b = 0; b < B; b++)
            tokens[b] = memory ? draw_row(logits + b * V, V, temperatures[b], top_k[b], log_min_p[b], uniform[b], work)
                               : -1;
        free(memory);
    }
}
