/* Rows of packed matrices as numbers, in one pass: what quant/formats.py and quant/integers.py do in plain PyTorch.

   Two codes a byte become two planes, the low nibbles' columns and then the high ones'. Results are the plain ones' to
   the last bit. Loops are left to the compiler, which makes a version for each kind of processor. */

#include "rows.h"

static inline float power(int exponent) {
    uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* NaN codes become 480, as in the plain twin. */
static inline float e4m3(uint8_t code) {
    int exponent = code >> 3 & 15, normal = exponent > 0;
    float size = (float)((code & 7) + 8 * normal) * power(exponent + !normal - 10);
    return code & 0x80 ? -size : size;
}

static inline float e2m1(int code) {
    int exponent = code >> 1 & 3, normal = exponent > 0;
    float size = (float)((code & 1) + 2 * normal) * power(exponent + !normal - 2);
    return code & 8 ? -size : size;
}

EACH_PROCESSOR static void int4_row(const uint8_t *codes, const float *scale, void *out, int wide, int64_t at,
                                    int64_t bytes, int64_t size) {
    float each[PIECE], low[PIECE], high[PIECE];
    for (int64_t first = 0; first < bytes; first += PIECE) {
        int count = bytes - first < PIECE ? (int)(bytes - first) : PIECE;
        for (int part = 0; part < count; part += 16) /* a group is at least as long */
            for (int i = 0; i < 16; i++) each[part + i] = scale[(first + part) / size];
        for (int i = 0; i < count; i++) {
            low[i] = (float)((codes[first + i] & 15) - 8) * each[i];
            high[i] = (float)((codes[first + i] >> 4) - 8) * each[i];
        }
        store(out, wide, at + first, low, count);
        store(out, wide, at + bytes + first, high, count);
    }
}

EACH_PROCESSOR static void nvfp4_row(const uint8_t *codes, const uint8_t *scale, float factor, int divide, void *out,
                                     int wide, int64_t at, int64_t bytes) {
    float own[PIECE / 8], each[PIECE], low[PIECE], high[PIECE];
    for (int64_t first = 0; first < bytes; first += PIECE) {
        int count = bytes - first < PIECE ? (int)(bytes - first) : PIECE;
        for (int i = 0; i < count / 8; i++) own[i] = e4m3(scale[first / 8 + i]);
        for (int i = 0; i < count / 8; i++) own[i] = divide ? own[i] / factor : own[i] * factor;
        for (int part = 0; part < count; part += 8)
            for (int i = 0; i < 8; i++) each[part + i] = own[part / 8];
        for (int i = 0; i < count; i++) {
            low[i] = e2m1(codes[first + i] & 15) * each[i];
            high[i] = e2m1(codes[first + i] >> 4) * each[i];
        }
        store(out, wide, at + first, low, count);
        store(out, wide, at + bytes + first, high, count);
    }
}

EACH_PROCESSOR static void fp8_row(const uint8_t *codes, float scale, void *out, int wide, int64_t at,
                                   int64_t columns) {
    float values[PIECE];
    for (int64_t first = 0; first < columns; first += PIECE) {
        int count = columns - first < PIECE ? (int)(columns - first) : PIECE;
        for (int i = 0; i < count; i++) values[i] = e4m3(codes[first + i]) * scale;
        store(out, wide, at + first, values, count);
    }
}

/* A code is at most 15, and so is a multiple: two products lie in 16 bits without touching each other. */
EACH_PROCESSOR void w4a8_row(const uint8_t *codes, const uint8_t *multiple, int8_t *out, int64_t bytes,
                             int64_t groups) {
    uint8_t low[PIECE], high[PIECE], eights[PIECE];
    uint16_t times[PIECE / 2], pairs[PIECE / 2], products[PIECE / 2];
    for (int64_t begin = 0; begin < groups; begin += PIECE / 8) {
        int count = 8 * (int)(groups - begin < PIECE / 8 ? groups - begin : PIECE / 8);
        for (int at = 0; at < count / 8; at++) {
            for (int i = 0; i < 4; i++) times[4 * at + i] = multiple[begin + at];
            for (int i = 0; i < 8; i++) eights[8 * at + i] = (uint8_t)(8 * multiple[begin + at]);
        }
        for (int64_t first = 8 * begin; first < bytes; first += 8 * groups) {
            memcpy(pairs, codes + first, (size_t)count);
            for (int i = 0; i < count / 2; i++) products[i] = (uint16_t)((pairs[i] & 0x0f0f) * times[i]);
            memcpy(low, products, (size_t)count);
            for (int i = 0; i < count / 2; i++) products[i] = (uint16_t)((pairs[i] >> 4 & 0x0f0f) * times[i]);
            memcpy(high, products, (size_t)count);
            for (int i = 0; i < count; i++) out[first + i] = (int8_t)(low[i] - eights[i]);
            for (int i = 0; i < count; i++) out[bytes + first + i] = (int8_t)(high[i] - eights[i]);
        }
    }
}

/* The largest number of which all are 1 to 15; 0 if there is none. Adding 1.5 * 2^23 rounds to whole numbers. */
EACH_PROCESSOR static float row_unit(const float *scale, int64_t groups) {
    float top = scale[0];
    for (int64_t i = 1; i < groups; i++) top = scale[i] > top ? scale[i] : top;
    for (int count = 1; count <= 15; count++) {
        float unit = top / (float)count;
        int other = 0;
        for (int64_t i = 0; i < groups; i++) {
            float whole = scale[i] / unit + 12582912.0f - 12582912.0f;
            other |= whole * unit != scale[i];
        }
        if (!other) return unit;
    }
    return 0;
}

static void words_row(const uint8_t *codes, uint8_t *out, int64_t bytes, int64_t groups) {
    int64_t each = bytes / 8 / groups;
    for (int64_t word = 0; word < bytes / 8; word++) {
        const uint8_t *from = codes + 8 * word;
        uint8_t *to = out + 8 * (word % each * groups + word / each);
        for (int i = 0; i < 4; i++) {
            to[2 * i] = (uint8_t)((from[i] & 15) | from[i + 4] << 4);
            to[2 * i + 1] = (uint8_t)(from[i] >> 4 | (from[i + 4] & 0xf0));
        }
    }
}

/* scale float32 [rows, groups] to units [rows]. */
void row_units(const float *scale, float *units, int64_t rows, int64_t groups) {
#pragma omp parallel for if (rows > FEW)
    for (int64_t row = 0; row < rows; row++) units[row] = row_unit(scale + row * groups, groups);
}

/* codes [rows, bytes] with columns side by side in the order of w4a8: those of a byte 8 apart, words group by group. */
void words(const uint8_t *codes, uint8_t *out, int64_t rows, int64_t bytes, int64_t groups) {
#pragma omp parallel for if (rows > FEW)
    for (int64_t row = 0; row < rows; row++) words_row(codes + row * bytes, out + row * bytes, bytes, groups);
}

/* codes [rows, bytes], scale float32 [rows, groups], to bfloat16 or, if wide, float32 [rows, 2, bytes]. */
void int4(const uint8_t *codes, const float *scale, void *out, int wide, int64_t rows, int64_t bytes, int64_t groups) {
#pragma omp parallel for if (rows > FEW)
    for (int64_t row = 0; row < rows; row++)
        int4_row(codes + row * bytes, scale + row * groups, out, wide, 2 * row * bytes, bytes, bytes / groups);
}

/* As int4, with e2m1 codes, an e4m3 scale for each 8 bytes, and a factor [rows] that scales are divided by or times. */
void nvfp4(const uint8_t *codes, const uint8_t *scale, const float *factor, int64_t divide, void *out, int wide,
           int64_t rows, int64_t bytes) {
#pragma omp parallel for if (rows > FEW)
    for (int64_t row = 0; row < rows; row++)
        nvfp4_row(codes + row * bytes, scale + row * bytes / 8, factor[row], divide, out, wide, 2 * row * bytes, bytes);
}

/* e4m3 codes [rows, columns], scale float32 [rows]. */
void fp8(const uint8_t *codes, const float *scale, void *out, int wide, int64_t rows, int64_t columns) {
#pragma omp parallel for if (rows > FEW)
    for (int64_t row = 0; row < rows; row++)
        fp8_row(codes + row * columns, scale[row], out, wide, row * columns, columns);
}

/* Words of eight codes, those of all groups side by side, times the groups' multiples, to int8 [rows, 2, bytes]. */
void w4a8(const uint8_t *codes, const uint8_t *multiple, int8_t *out, int64_t rows, int64_t bytes, int64_t groups) {
#pragma omp parallel for if (rows > FEW)
    for (int64_t row = 0; row < rows; row++)
        w4a8_row(codes + row * bytes, multiple + row * groups, out + 2 * row * bytes, bytes, groups);
}
