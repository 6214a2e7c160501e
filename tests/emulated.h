/* AVX-512, its products of pairs and AMX tiles in plain C, as far as decode.c and vectors.h use them, so that
   what is compiled for CPUs that have them can be tried on CPUs that do not: -include this with -march=x86-64.

   Orders of summation and roundings are those of Intel's manual (Software Developer's Manual, volume 2). Subnormal
   numbers, which these instructions take as zero, are left alone. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1

#define HERE static inline __attribute__((unused))

typedef float __m512 __attribute__((vector_size(64)));
typedef int32_t __m512i __attribute__((vector_size(64)));
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef uint16_t __m256i __attribute__((vector_size(32)));
typedef int8_t __m128i __attribute__((vector_size(16)));

HERE __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 sum) {
    for (int i = 0; i < 16; i++) sum[i] = fmaf(a[i], b[i], sum[i]);
    return sum;
}
HERE __m512 _mm512_cvtepi32_ps(__m512i a) { return __builtin_convertvector(a, __m512); }
HERE __m512i _mm512_cvtepi8_epi32(__m128i a) { return __builtin_convertvector(a, __m512i); }
HERE __m512i _mm512_cvtepu16_epi32(__m256i a) { return __builtin_convertvector(a, __m512i); }
HERE __m512i _mm512_set1_epi32(int a) { return a - (__m512i){0}; }

HERE float upper_half(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}
HERE __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    for (int i = 0; i < 16; i++) {
        sum[i] = fmaf(upper_half(a[2 * i + 1]), upper_half(b[2 * i + 1]), sum[i]);
        sum[i] = fmaf(upper_half(a[2 * i]), upper_half(b[2 * i]), sum[i]);
    }
    return sum;
}
HERE __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
    for (int i = 0; i < 16; i++)
        sum[i] += (int16_t)a[i] * (int16_t)b[i] + (a[i] >> 16) * (b[i] >> 16);
    return sum;
}

/* Each thread's eight tiles, of `tile_rows` rows of `tile_row_bytes`: what lies beyond these reads as zero. */
static __thread uint8_t registers[8][16][64], tile_rows[8];
static __thread uint16_t tile_row_bytes[8];

HERE void _tile_loadconfig(const void *config) {
    memcpy(tile_row_bytes, (const char *)config + 16, sizeof(tile_row_bytes));
    memcpy(tile_rows, (const char *)config + 48, sizeof(tile_rows));
    memset(registers, 0, sizeof(registers));
}
HERE void _tile_release(void) { memset(tile_rows, 0, sizeof(tile_rows)); }
HERE void _tile_zero(int t) { memset(registers[t], 0, sizeof(registers[t])); }
HERE void _tile_loadd(int t, const void *from, long stride) {
    _tile_zero(t);
    for (int row = 0; row < tile_rows[t]; row++)
        memcpy(registers[t][row], (const char *)from + row * stride, tile_row_bytes[t]);
}
HERE void _tile_stored(int t, void *to, long stride) {
    for (int row = 0; row < tile_rows[t]; row++)
        memcpy((char *)to + row * stride, registers[t][row], tile_row_bytes[t]);
}
HERE void _tile_dpbf16ps(int sums, int a, int b) {
    for (int row = 0; row < tile_rows[sums]; row++) {
        float even[16] = {0}, odd[16] = {0}, sum[16];
        for (int k = 0; k < tile_row_bytes[a] / 4; k++) {
            uint16_t pair[2], weights[32];
            memcpy(pair, registers[a][row] + 4 * k, sizeof(pair));
            memcpy(weights, registers[b][k], sizeof(weights));
            for (int n = 0; n < tile_row_bytes[sums] / 4; n++) {
                even[n] = fmaf(upper_half(pair[0]), upper_half(weights[2 * n]), even[n]);
                odd[n] = fmaf(upper_half(pair[1]), upper_half(weights[2 * n + 1]), odd[n]);
            }
        }
        memcpy(sum, registers[sums][row], sizeof(sum));
        for (int n = 0; n < tile_row_bytes[sums] / 4; n++) sum[n] += even[n] + odd[n];
        memcpy(registers[sums][row], sum, sizeof(sum));
    }
}
HERE void _tile_dpbssd(int sums, int a, int b) {
    for (int row = 0; row < tile_rows[sums]; row++) {
        int32_t sum[16];
        memcpy(sum, registers[sums][row], sizeof(sum));
        for (int k = 0; k < tile_row_bytes[a]; k++)
            for (int n = 0; n < tile_row_bytes[sums] / 4; n++)
                sum[n] += (int8_t)registers[a][row][k] * (int8_t)registers[b][k / 4][4 * n + k % 4];
        memcpy(registers[sums][row], sum, sizeof(sum));
    }
}

/* Linux grants the tiles. */
#define syscall(number, request, what) ((void)(number), (void)(request), (void)(what), 0L)
