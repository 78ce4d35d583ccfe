/* RMS norm and the gate of an MLP, forwards and backwards, rotary positions, the softmax of attention, and the sum of a
   token's experts, each in one pass over its rows; the twins are in model/. Numbers are computed in float32 and rounded
   once. */

#include <math.h>

#include "rows.h"

enum {
    LANES = 32,
    CHUNK = 64, /* rows whose share of a weight's gradient is added up first, however many threads there are */
    SMALL = 1 << 14 /* numbers that are not worth a second thread */
};

EACH_PROCESSOR static void norm_row(const void *x, int wide, int64_t at, const float *weight, float eps, void *y,
                                    float *scale, int64_t size) {
    float values[PIECE], squares[LANES] = {0}, total = 0;
    for (int64_t first = 0; first < size; first += PIECE) {
        int count = size - first < PIECE ? (int)(size - first) : PIECE, whole = count / LANES * LANES;
        load(x, wide, at + first, values, count);
        for (int i = 0; i < whole; i += LANES)
            for (int j = 0; j < LANES; j++) squares[j] += values[i + j] * values[i + j];
        for (int i = whole; i < count; i++) total += values[i] * values[i];
    }
    for (int j = 0; j < LANES; j++) total += squares[j];
    *scale = 1 / sqrtf(total / (float)size + eps);
    for (int64_t first = 0; first < size; first += PIECE) {
        int count = size - first < PIECE ? (int)(size - first) : PIECE;
        load(x, wide, at + first, values, count);
        for (int i = 0; i < count; i++) values[i] *= *scale;
        if (weight)
            for (int i = 0; i < count; i++) values[i] *= weight[first + i];
        store(y, wide, at + first, values, count);
    }
}

/* x [rows, size], weight float32 [size] or none, to y and, for the way back, scale [rows]. */
void rms_norm(const void *x, int wide, const float *weight, const float *eps, void *y, float *scale, int64_t rows,
              int64_t size) {
#pragma omp parallel for if (rows * size > SMALL)
    for (int64_t row = 0; row < rows; row++) norm_row(x, wide, row * size, weight, *eps, y, scale + row, size);
}

EACH_PROCESSOR static void norm_row_back(const void *x, const void *grad, int wide, int64_t at, const float *weight,
                                         float scale, void *to_x, float *to_weight, int64_t size) {
    float values[PIECE], slopes[PIECE], products[LANES] = {0}, total = 0;
    for (int64_t first = 0; first < size; first += PIECE) {
        int count = size - first < PIECE ? (int)(size - first) : PIECE, whole = count / LANES * LANES;
        load(x, wide, at + first, values, count);
        load(grad, wide, at + first, slopes, count);
        for (int i = 0; i < count; i++) values[i] *= scale;
        if (weight) {
            for (int i = 0; i < count; i++) to_weight[first + i] += slopes[i] * values[i];
            for (int i = 0; i < count; i++) slopes[i] *= weight[first + i];
        }
        for (int i = 0; i < whole; i += LANES)
            for (int j = 0; j < LANES; j++) products[j] += values[i + j] * slopes[i + j];
        for (int i = whole; i < count; i++) total += values[i] * slopes[i];
    }
    for (int j = 0; j < LANES; j++) total += products[j];
    total /= (float)size;
    for (int64_t first = 0; first < size; first += PIECE) {
        int count = size - first < PIECE ? (int)(size - first) : PIECE;
        load(x, wide, at + first, values, count);
        load(grad, wide, at + first, slopes, count);
        if (weight)
            for (int i = 0; i < count; i++) slopes[i] *= weight[first + i];
        for (int i = 0; i < count; i++) values[i] = (slopes[i] - values[i] * scale * total) * scale;
        store(to_x, wide, at + first, values, count);
    }
}

/* Gradients of x [rows, size] and, in shares [chunks, size] that begin as zeros, of the weight. */
void rms_norm_back(const void *x, const void *grad, int wide, const float *weight, const float *scale, void *to_x,
                   float *to_weight, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > SMALL)
    for (int64_t chunk = 0; chunk < (rows + CHUNK - 1) / CHUNK; chunk++)
        for (int64_t row = chunk * CHUNK; row < rows && row < (chunk + 1) * CHUNK; row++)
            norm_row_back(x, grad, wide, row * size, weight, scale[row], to_x,
                          weight ? to_weight + chunk * size : NULL, size);
}

/* e^-2u, u = sqrt(2 / pi) (x + 0.044715 x^3): gelu, with its tanh, lets the share 1 / (1 + e^-2u) of x through. */
static inline float falling(float x) {
    return power_of_two(-2.8853901f * 0.79788456f * (x + 0.044715f * x * x * x));
}

EACH_PROCESSOR static void gate_row(const char *gate, const char *up, int wide, void *y, int64_t at, int64_t size) {
    float gates[PIECE], ups[PIECE];
    for (int64_t first = 0; first < size; first += PIECE) {
        int count = size - first < PIECE ? (int)(size - first) : PIECE;
        load(gate, wide, first, gates, count);
        load(up, wide, first, ups, count);
        for (int i = 0; i < count; i++) gates[i] *= ups[i] / (1 + falling(gates[i]));
        store(y, wide, at + first, gates, count);
    }
}

/* y [rows, size] = gelu(gate) * up, whose rows begin so many numbers apart. */
void gated(const char *gate, const char *up, int wide, int64_t gate_stride, int64_t up_stride, void *y, int64_t rows,
           int64_t size) {
    int64_t bytes = wide ? 4 : 2;
#pragma omp parallel for if (rows * size > SMALL)
    for (int64_t row = 0; row < rows; row++)
        gate_row(gate + row * gate_stride * bytes, up + row * up_stride * bytes, wide, y, row * size, size);
}

EACH_PROCESSOR static void gate_row_back(const char *gate, const char *up, const void *grad, int wide, void *to_gate,
                                         void *to_up, int64_t at, int64_t size) {
    float gates[PIECE], ups[PIECE], slopes[PIECE], outer[PIECE];
    for (int64_t first = 0; first < size; first += PIECE) {
        int count = size - first < PIECE ? (int)(size - first) : PIECE;
        load(gate, wide, first, gates, count);
        load(up, wide, first, ups, count);
        load(grad, wide, at + first, slopes, count);
        for (int i = 0; i < count; i++) {
            float x = gates[i], rest = falling(x), share = 1 / (1 + rest);
            /* d(x s)/dx = s + x s (1 - s) 2 du/dx */
            float slope = share + x * share * (rest * share) * 1.5957691f * (1 + 0.134145f * x * x);
            outer[i] = slopes[i] * ups[i] * slope;
            ups[i] = slopes[i] * x * share;
        }
        store(to_gate, wide, at + first, outer, count);
        store(to_up, wide, at + first, ups, count);
    }
}

void gated_back(const char *gate, const char *up, const void *grad, int wide, int64_t gate_stride, int64_t up_stride,
                void *to_gate, void *to_up, int64_t rows, int64_t size) {
    int64_t bytes = wide ? 4 : 2;
#pragma omp parallel for if (rows * size > SMALL)
    for (int64_t row = 0; row < rows; row++)
        gate_row_back(gate + row * gate_stride * bytes, up + row * up_stride * bytes, grad, wide, to_gate, to_up,
                      row * size, size);
}

EACH_PROCESSOR static void rotate_row(const void *x, const void *cos, const void *sin, int wide, void *y, int64_t at,
                                      int64_t turn, int64_t half) {
    float first[PIECE], second[PIECE], c[PIECE], s[PIECE], out[PIECE];
    for (int64_t begin = 0; begin < half; begin += PIECE) {
        int count = half - begin < PIECE ? (int)(half - begin) : PIECE;
        load(x, wide, at + begin, first, count);
        load(x, wide, at + half + begin, second, count);
        load(cos, wide, turn + begin, c, count);
        load(sin, wide, turn + begin, s, count);
        for (int i = 0; i < count; i++) out[i] = first[i] * c[i] - second[i] * s[i];
        store(y, wide, at + begin, out, count);
        for (int i = 0; i < count; i++) out[i] = second[i] * c[i] + first[i] * s[i];
        store(y, wide, at + half + begin, out, count);
    }
}

/* Pairs (i, i + half) of x [tokens, heads, 2 * half] turned by the angles whose cos and sin are [tokens, half]. */
void rotate(const void *x, const void *cos, const void *sin, int wide, void *y, int64_t tokens, int64_t heads,
            int64_t half) {
#pragma omp parallel for if (tokens * heads * half > SMALL)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++)
            rotate_row(x, cos, sin, wide, y, (token * heads + head) * 2 * half, token * half, half);
}

EACH_PROCESSOR static void sum_row(const void *y, const float *weights, const int64_t *places, int wide, void *out,
                                   int64_t at, int64_t k, int64_t size) {
    float total[PIECE], own[PIECE];
    for (int64_t first = 0; first < size; first += PIECE) {
        int count = size - first < PIECE ? (int)(size - first) : PIECE;
        for (int i = 0; i < count; i++) total[i] = 0;
        for (int64_t expert = 0; expert < k; expert++) {
            load(y, wide, places[expert] * size + first, own, count);
            for (int i = 0; i < count; i++) total[i] += weights[expert] * own[i];
        }
        store(out, wide, at + first, total, count);
    }
}

/* Of y [tokens * k, size] the rows at places [tokens, k] times weights float32 [tokens, k], to out [tokens, size]. */
void weighted_sums(const void *y, const float *weights, const int64_t *places, int wide, void *out, int64_t tokens,
                   int64_t k, int64_t size) {
#pragma omp parallel for if (tokens * k * size > SMALL)
    for (int64_t token = 0; token < tokens; token++)
        sum_row(y, weights + token * k, places + token * k, wide, out, token * size, k, size);
}

EACH_PROCESSOR static void softmax_row(float *x, int64_t size) {
    float tops[LANES], sums[LANES] = {0}, top = -INFINITY, total = 0;
    int64_t whole = size / LANES * LANES;
    for (int j = 0; j < LANES; j++) tops[j] = -INFINITY;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int j = 0; j < LANES; j++) tops[j] = x[i + j] > tops[j] ? x[i + j] : tops[j];
    for (int j = 0; j < LANES; j++) top = tops[j] > top ? tops[j] : top;
    for (int64_t i = whole; i < size; i++) top = x[i] > top ? x[i] : top;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int j = 0; j < LANES; j++) {
            x[i + j] = power_of_two((x[i + j] - top) * 1.44269504f);
            sums[j] += x[i + j];
        }
    for (int j = 0; j < LANES; j++) total += sums[j];
    for (int64_t i = whole; i < size; i++) total += x[i] = power_of_two((x[i] - top) * 1.44269504f);
    total = 1 / total;
    for (int64_t i = 0; i < size; i++) x[i] *= total;
}

/* In place, over the rows of x float32 [rows, size]; what would be no normal number is 0. */
void softmax(float *x, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > SMALL)
    for (int64_t row = 0; row < rows; row++) softmax_row(x + row * size, size);
}
