/* Draws the next token of each row from logits, as sampling.py says, for rows without top_p (which needs a sort). */

#include "kernels.h"

enum { BLOCK = 64 };

static long count_from(const float *p, long n, float edge) {
    int count = 0;
#pragma omp simd reduction(+ : count)
    for (long i = 0; i < n; i++) count += p[i] >= edge;
    return count;
}

/* A number that k of p (n) reach, or a few more if several equal it; p from 0 to 1, k < n. Positive floats are ordered as
   their bits are, so it is found by halving these: at most 30 counts, and no branch that depends on one number. */
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

/* The token at share `uniform` of the cumulative probabilities; -1 if the logits are not finite. `work`: V/64 + 1 doubles, V floats */
static long draw_row(const float *x, long V, float temperature, long k, double uniform, double *work) {
    double *block_sums = work, total = 0;
    float most = -INFINITY, *p = (float *)(work + V / BLOCK + 1);
    int bad = 0;
#pragma omp simd reduction(max : most) reduction(| : bad)
    for (long i = 0; i < V; i++) {
        most = x[i] > most ? x[i] : most;
        bad |= !(x[i] < INFINITY); /* or a NaN */
    }
    if (bad || most == -INFINITY) return -1;
    if (temperature == 0 || k == 1) {
        long best = 0;
        while (x[best] != most) best++;
        return best;
    }
    SIMD for (long i = 0; i < V; i++) {
        float power = (x[i] - most) / temperature;
        p[i] = power < -87 ? 0 : fast_exp(power);
    }
    if (k < V) {
        const float edge = edge_of_largest(p, V, k);
        long kept = count_from(p, V, edge);
        SIMD for (long i = 0; i < V; i++) p[i] = p[i] >= edge ? p[i] : 0;
        for (long i = V - 1; kept > k; i--) /* of equals at the edge the first ones stay */
            if (p[i] == edge) p[i] = 0, kept--;
    }
    for (long block = 0; block < V; block += BLOCK) {
        const long end = block + BLOCK < V ? block + BLOCK : V;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = block; i < end; i++) sum += p[i];
        total += block_sums[block / BLOCK] = sum;
    }
    double target = uniform * total * (1 - 1e-12);
    long block = 0, last = 0;
    while (block + BLOCK < V && block_sums[block / BLOCK] <= target) target -= block_sums[block / BLOCK], block += BLOCK;
    for (long i = block; i < V; i++) {
        if (p[i] == 0) continue;
        last = i; /* should rounding leave something of the target, the last possible one */
        if (p[i] > target) break;
        target -= p[i];
    }
    return last;
}

/* logits (B, V) -> tokens (B). The uniform number of a row that takes the likeliest token is not used. */
void draw_rows(const float *logits, const float *temperatures, const long *top_k, const double *uniform, long *tokens,
               long B, long V) {
#pragma omp parallel if (B > 1)
    {
        double *work = malloc((V / BLOCK + 1) * sizeof(double) + V * sizeof(float));
#pragma omp for schedule(static)
        for (long b = 0; b < B; b++)
            tokens[b] = work ? draw_row(logits + b * V, V, temperatures[b], top_k[b], uniform[b], work) : -1;
        free(work);
    }
}
