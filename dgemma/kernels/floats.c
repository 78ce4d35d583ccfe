/* float32 products of rows that are sorted by expert, for processors with vectors of 512 bits.

   The weights stay as they lie in memory: eight of their rows at a time, each number of which meets up to 48 tokens. x
   is what is brought into another order, column by column, 16 tokens side by side. Results come out with the tokens
   side by side too and are turned back on their way to y. */

#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define WIDE __attribute__((target("avx512f,avx512vl,avx512dq")))

enum { LANES = 16, ROWS = 8, MOST = 3, TASK = 4 }; /* tokens a vector, rows, vectors at a time, blocks of rows a task */

int has_wide_vectors(void) { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"); }

/* Up to 16 rows of x, column by column; the rows that are missing are zeros. */
WIDE static void pack(const float *x, int64_t columns, int count, float *out) {
    for (int64_t at = 0; at < columns; at += LANES) {
        int64_t left = columns - at;
        __mmask16 real = left < LANES ? (__mmask16)((1 << left) - 1) : 0xffff;
        __m512 r[LANES], t[LANES];
        for (int i = 0; i < LANES; i++)
            r[i] = i < count ? _mm512_maskz_loadu_ps(real, x + i * columns + at) : _mm512_setzero_ps();
        for (int i = 0; i < LANES; i += 2) {
            t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
        }
        for (int i = 0; i < LANES; i += 4)
            for (int j = 0; j < 2; j++) {
                __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
                r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
        for (int i = 0; i < LANES; i += 8)
            for (int j = 0; j < 4; j++) {
                t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
                t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
            }
        for (int j = 0; j < 8; j++) {
            r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
            r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
        }
        for (int i = 0; i < LANES && i < left; i++) _mm512_storeu_ps(out + (at + i) * LANES, r[i]);
    }
}

/* Sums [8 rows, 16 tokens] into `used` numbers of each of `count` rows of y. */
WIDE static inline void unpack(const __m512 *sums, float *y, int64_t stride, int count, int used) {
    const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    __mmask8 real = (__mmask8)((1 << used) - 1);
    __m512d halves[2][4];
    for (int half = 0; half < 2; half++) {
        const __m512 *r = sums + 4 * half;
        __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1]));
        __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3])), d = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
        halves[half][0] = _mm512_unpacklo_pd(a, c);
        halves[half][1] = _mm512_unpackhi_pd(a, c);
        halves[half][2] = _mm512_unpacklo_pd(b, d);
        halves[half][3] = _mm512_unpackhi_pd(b, d);
    }
    /* A lane of four rows of token 4 * lane + i, from each half. */
    for (int i = 0; i < 4; i++)
        for (int pair = 0; pair < 2; pair++) {
            __m512 both = _mm512_castpd_ps(_mm512_permutex2var_pd(halves[0][i], pair ? high : low, halves[1][i]));
            int token = 8 * pair + i;
            if (token < count) _mm256_mask_storeu_ps(y + token * stride, real, _mm512_castps512_ps256(both));
            if (token + 4 < count) _mm256_mask_storeu_ps(y + (token + 4) * stride, real, _mm512_extractf32x8_ps(both, 1));
        }
}

/* Eight rows of w for `tiles` times 16 tokens: the compiler makes one for each number of tiles. */
WIDE static inline __attribute__((always_inline)) void multiply(const float *const *w, const float *x, int64_t columns,
                                                                int tiles, __m512 *sums) {
    __m512 total[MOST * ROWS];
    for (int i = 0; i < tiles * ROWS; i++) total[i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < columns; k++) {
        __m512 tokens[MOST];
        if (k % LANES == 0) /* the rows of the next block, which follow */
            for (int j = 0; j < ROWS; j++) _mm_prefetch((const char *)(w[j] + ROWS * columns + k), _MM_HINT_T1);
        for (int t = 0; t < tiles; t++) tokens[t] = _mm512_loadu_ps(x + (t * columns + k) * LANES);
        for (int j = 0; j < ROWS; j++) {
            __m512 weight = _mm512_set1_ps(w[j][k]);
            for (int t = 0; t < tiles; t++) total[t * ROWS + j] = _mm512_fmadd_ps(weight, tokens[t], total[t * ROWS + j]);
        }
    }
    for (int i = 0; i < tiles * ROWS; i++) sums[i] = total[i];
}

WIDE static void multiply_one(const float *const *w, const float *x, int64_t columns, __m512 *sums) {
    multiply(w, x, columns, 1, sums);
}
WIDE static void multiply_two(const float *const *w, const float *x, int64_t columns, __m512 *sums) {
    multiply(w, x, columns, 2, sums);
}
WIDE static void multiply_three(const float *const *w, const float *x, int64_t columns, __m512 *sums) {
    multiply(w, x, columns, 3, sums);
}

/* y float32 [n, outs] of x [n, columns], expert e's rows from offsets[e] to offsets[e + 1], and w [experts, outs,
   columns]. panel: room for all rows of x and 16 more of each expert. */
WIDE void grouped_floats(const float *x, const int64_t *offsets, const float *w, float *panel, float *y, int64_t experts,
                         int64_t outs, int64_t columns) {
    int64_t blocks = (outs + ROWS - 1) / ROWS, most = 0, first[experts + 1];
    for (int64_t e = 0; e < experts; e++) {
        first[e] = most;
        most += (offsets[e + 1] - offsets[e] + LANES - 1) / LANES;
    }
    first[experts] = most;
#pragma omp parallel if (most * LANES * outs * columns > 1 << 18)
    {
#pragma omp for schedule(static)
        for (int64_t e = 0; e < experts; e++)
            for (int64_t tile = first[e]; tile < first[e + 1]; tile++) {
                int64_t row = offsets[e] + LANES * (tile - first[e]), left = offsets[e + 1] - row;
                pack(x + row * columns, columns, left < LANES ? (int)left : LANES, panel + tile * LANES * columns);
            }
#pragma omp for schedule(dynamic, TASK)
        for (int64_t block = 0; block < experts * blocks; block++) {
            int64_t e = block / blocks, out = block % blocks * ROWS, tiles = first[e + 1] - first[e];
            int used = outs - out < ROWS ? (int)(outs - out) : ROWS;
            const float *rows[ROWS];
            __m512 sums[MOST * ROWS];
            for (int j = 0; j < ROWS; j++) rows[j] = w + (e * outs + out + (j < used ? j : 0)) * columns;
            for (int64_t tile = 0, calls = (tiles + MOST - 1) / MOST; tile < tiles; calls--) {
                int taken = (int)((tiles - tile + calls - 1) / calls); /* as evenly as can be */
                const float *tokens = panel + (first[e] + tile) * LANES * columns;
                (taken == 3 ? multiply_three : taken == 2 ? multiply_two : multiply_one)(rows, tokens, columns, sums);
                for (int t = 0; t < taken; t++, tile++) {
                    int64_t row = offsets[e] + LANES * tile, left = offsets[e + 1] - row;
                    unpack(sums + t * ROWS, y + row * outs + out, outs, left < LANES ? (int)left : LANES, used);
                }
            }
        }
    }
}

#else

int has_wide_vectors(void) { return 0; }

#endif
