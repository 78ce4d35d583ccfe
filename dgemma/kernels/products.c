/* Products of experts whose weights are int8 numbers times a unit a row, for rows of x that are such too.

   Four rows of weights are brought to int8 in the nearest cache and meet all of their expert's tokens, four at a time,
   by the instruction that adds four products of 8-bit numbers in 32 bits. Sums are exact: the plain twin's. */

#include <float.h>
#include <math.h>

#include "rows.h"

enum { LANES = 32 };

/* The largest of a row becomes 127. Adding 1.5 * 2^23 rounds to whole numbers, ties to even. */
EACH_PROCESSOR static void quantise_row(const void *x, int wide, int8_t *codes, float *scale, int64_t columns) {
    const float whole = 12582912.0f;
    float most = 0, each, values[PIECE], tops[LANES] = {0};
    int32_t none[LANES] = {0};
    for (int64_t first = 0; first < columns; first += PIECE) {
        int count = columns - first < PIECE ? (int)(columns - first) : PIECE, filled = (count + LANES - 1) / LANES * LANES;
        load(x, wide, first, values, count);
        memset(values + count, 0, 4 * (size_t)(filled - count));
        for (int i = 0; i < filled; i += LANES)
            for (int j = 0; j < LANES; j++) {
                float size = values[i + j] < 0 ? -values[i + j] : values[i + j];
                tops[j] = size > tops[j] ? size : tops[j];
                none[j] |= size != size;
            }
    }
    for (int j = 0; j < LANES; j++) most = none[j] ? NAN : tops[j] > most ? tops[j] : most;
    most = most / 127;
    *scale = most < FLT_MIN ? FLT_MIN : most;
    each = 1 / *scale; /* dividing takes five times as long as multiplying */
    for (int64_t first = 0; first < columns; first += PIECE) {
        int count = columns - first < PIECE ? (int)(columns - first) : PIECE;
        load(x, wide, first, values, count);
        for (int i = 0; i < count; i++) values[i] *= each; /* and rounded, before something is added */
        for (int i = 0; i < count; i++) codes[first + i] = (int8_t)(int32_t)(values[i] + whole - whole);
    }
}

/* x bfloat16 or, if wide, float32 [rows, columns], to codes of the same shape and scale [rows]. */
void quantise(const void *x, int wide, int8_t *codes, float *scale, int64_t rows, int64_t columns) {
#pragma omp parallel for if (rows > FEW)
    for (int64_t row = 0; row < rows; row++)
        quantise_row((const char *)x + row * columns * (wide ? 4 : 2), wide, codes + row * columns, scale + row,
                     columns);
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

enum { SIDE = 4, WIDTH = 64 };

int dot_products(void) { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw"); }

/* Written out, since the compiler would copy the total before each addition. */
VNNI static inline __m512i dot(__m512i total, __m512i x, __m512i w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(x), "v"(w));
    return total;
}

/* The sums of sixteen vectors, in their order. */
VNNI static inline __m512i summed(const __m512i *v) {
    __m512i quads[4];
    for (int i = 0; i < 4; i++) {
        __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[4 * i], v[4 * i + 1]),
                                     _mm512_unpackhi_epi32(v[4 * i], v[4 * i + 1]));
        __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[4 * i + 2], v[4 * i + 3]),
                                     _mm512_unpackhi_epi32(v[4 * i + 2], v[4 * i + 3]));
        quads[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    __m512i low = _mm512_add_epi32(_mm512_shuffle_i32x4(quads[0], quads[1], 0x44),
                                   _mm512_shuffle_i32x4(quads[0], quads[1], 0xee));
    __m512i high = _mm512_add_epi32(_mm512_shuffle_i32x4(quads[2], quads[3], 0x44),
                                    _mm512_shuffle_i32x4(quads[2], quads[3], 0xee));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
}

/* sums[i][j] of row i of x, stored 128 higher, and row j of w; the last vector of columns is masked. */
VNNI static inline void multiply(const uint8_t *const *x, const int8_t *const *w, int64_t columns, int32_t *sums) {
    __m512i total[SIDE * SIDE];
    for (int i = 0; i < SIDE * SIDE; i++) total[i] = _mm512_setzero_si512();
    int64_t at = 0;
    for (; at + WIDTH <= columns; at += WIDTH) {
        __m512i weights[SIDE];
        for (int j = 0; j < SIDE; j++) weights[j] = _mm512_loadu_si512(w[j] + at);
        for (int i = 0; i < SIDE; i++) {
            __m512i row = _mm512_loadu_si512(x[i] + at);
            for (int j = 0; j < SIDE; j++)
                total[SIDE * i + j] = dot(total[SIDE * i + j], row, weights[j]);
        }
    }
    if (at < columns) {
        __mmask64 rest = ~0ull >> (WIDTH - (columns - at));
        for (int i = 0; i < SIDE; i++)
            for (int j = 0; j < SIDE; j++)
                total[SIDE * i + j] =
                    _mm512_dpbusd_epi32(total[SIDE * i + j], _mm512_maskz_loadu_epi8(rest, x[i] + at),
                                        _mm512_maskz_loadu_epi8(rest, w[j] + at));
    }
    _mm512_storeu_si512(sums, summed(total));
}

/* Of one expert, `used` outputs for all of its `count` tokens, into rows of y that are `stride` bytes apart. */
VNNI static void expert(const uint8_t *x, const float *own, int64_t count, const int8_t *const *w, const float *unit,
                        int64_t columns, char *y, int wide, int64_t stride, int used) {
    int32_t sums[SIDE * SIDE], surplus[SIDE * SIDE];
    float units[SIDE * SIDE], scale[SIDE * SIDE], values[SIDE * SIDE];
    uint16_t narrow[SIDE * SIDE];
    for (int j = 0; j < SIDE; j++) {
        __m512i total = _mm512_setzero_si512();
        for (int64_t at = 0; at < columns; at += WIDTH) {
            __mmask64 rest = columns - at < WIDTH ? ~0ull >> (WIDTH - (columns - at)) : ~0ull;
            total = dot(total, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(rest, w[j] + at));
        }
        for (int i = 0; i < SIDE; i++) units[SIDE * i + j] = unit[j];
        for (int i = 0; i < SIDE; i++) surplus[SIDE * i + j] = 128 * _mm512_reduce_add_epi32(total);
    }
    for (int64_t first = 0; first < count; first += SIDE) {
        int rows = count - first < SIDE ? (int)(count - first) : SIDE;
        const uint8_t *each[SIDE];
        for (int i = 0; i < SIDE; i++) {
            int64_t row = first + (i < rows ? i : 0);
            each[i] = x + row * columns;
            for (int j = 0; j < SIDE; j++) scale[SIDE * i + j] = own[row];
        }
        multiply(each, w, columns, sums);
        for (int i = 0; i < SIDE * SIDE; i++) values[i] = (float)(sums[i] - surplus[i]) * scale[i] * units[i];
        for (int i = 0; i < SIDE * SIDE; i++) narrow[i] = bfloat16(values[i]);
        for (int i = 0; i < rows; i++)
            if (wide)
                memcpy(y + (first + i) * stride, values + SIDE * i, 4 * (size_t)used);
            else
                memcpy(y + (first + i) * stride, narrow + SIDE * i, 2 * (size_t)used);
    }
}

/* x int8, stored 128 higher, [n, columns] with scales own [n], sorted by expert: offsets [experts + 1].
   codes: int8 [experts, outs, columns] if there are no groups, or as w4a8 has them, with multiple [experts, outs,
   groups]. units float32 [experts, outs]. To y, bfloat16 or, if wide, float32 [n, outs]. */
void grouped_int8(const uint8_t *x, const float *own, const int64_t *offsets, const uint8_t *codes,
                  const uint8_t *multiple, const float *units, void *y, int wide, int64_t experts, int64_t outs,
                  int64_t columns, int64_t groups) {
    int64_t blocks = (outs + SIDE - 1) / SIDE, bytes = groups ? columns / 2 : columns;
    int64_t size = wide ? 4 : 2;
#pragma omp parallel for schedule(dynamic, 8)
    for (int64_t block = 0; block < experts * blocks; block++) {
        int64_t e = block / blocks, out = block % blocks * SIDE, count = offsets[e + 1] - offsets[e];
        int used = outs - out < SIDE ? (int)(outs - out) : SIDE;
        int8_t decoded[groups ? SIDE * columns : 1];
        const int8_t *w[SIDE];
        float unit[SIDE];
        if (!count) continue;
        for (int j = 0; j < SIDE; j++) {
            int64_t row = e * outs + out + (j < used ? j : 0);
            w[j] = groups ? decoded + j * columns : (const int8_t *)codes + row * bytes;
            if (groups) w4a8_row(codes + row * bytes, multiple + row * groups, decoded + j * columns, bytes, groups);
            unit[j] = units[row];
        }
        expert(x + offsets[e] * columns, own + offsets[e], count, w, unit, columns,
               (char *)y + (offsets[e] * outs + out) * size, wide, outs * size, used);
    }
}

#else

int dot_products(void) { return 0; }

#endif
