/* What a canvas believes of the vocabulary, in as few passes over its scores as there can be: the twins are
   decoding/vocabulary.py, where a position's scores lie in a row, and decoding/guided.py, where a token's do.

   A score s has the binary logarithm out / (2^(in s) + 1) as its weight, which is its capped logit over temperature. */

#include <math.h>

#include "rows.h"

enum {
    LANES = 32,  /* numbers that are treated alike */
    BLOCK = 512, /* weights of a row whose sum is kept */
};

static const float NEVER = -1e30f;

/* Logarithms of LANES scores from `at` on; of those beyond `count` NEVER. */
static inline void logarithms(const void *scores, int wide, int64_t at, int64_t count, float in, float out, float *z) {
    float s[LANES] = {0};
    if (count >= LANES)
        load(scores, wide, at, s, LANES);
    else
        load(scores, wide, at, s, (int)count);
    for (int i = 0; i < LANES; i++) z[i] = out / (power_of_two(s[i] * in) + 1);
    if (count < LANES)
        for (int i = (int)count; i < LANES; i++) z[i] = NEVER;
}

static inline float sum(const float *lanes) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += lanes[i];
    return total;
}

EACH_PROCESSOR static void read_row(char *scores, int wide, int64_t size, float in, float out, float uniform,
                                    int64_t *best, int64_t *proposal, float *entropy, float *total) {
    float z[LANES], lanes[LANES], moment[LANES] = {0}, top = NEVER, sums[size / BLOCK + 1];
    for (int i = 0; i < LANES; i++) lanes[i] = NEVER;
    for (int64_t at = 0; at < size; at += LANES) {
        logarithms(scores, wide, at, size - at, in, out, z);
        for (int i = 0; i < LANES; i++) lanes[i] = z[i] > lanes[i] ? z[i] : lanes[i];
    }
    for (int i = 0; i < LANES; i++) top = lanes[i] > top ? lanes[i] : top;
    *best = -1, *total = 0;
    for (int64_t first = 0, block = 0; first < size; first += BLOCK, block++) {
        float weights[LANES] = {0};
        for (int64_t at = first; at < size && at < first + BLOCK; at += LANES) {
            float w[LANES];
            int found = 0;
            logarithms(scores, wide, at, size - at, in, out, z);
            for (int i = 0; i < LANES; i++) {
                w[i] = power_of_two(z[i] - top);
                weights[i] += w[i];
                moment[i] += w[i] * (z[i] - top);
                found |= z[i] == top;
            }
            for (int i = 0; found && *best < 0 && i < LANES && at + i < size; i++)
                if (z[i] == top) *best = at + i;
            store(scores, wide, at, w, size - at < LANES ? (int)(size - at) : LANES);
        }
        sums[block] = sum(weights);
        *total += sums[block];
    }
    if (*best < 0) *best = 0; /* no score is a number */
    *entropy = logf(*total) - 0.69314718f * sum(moment) / *total;
    /* Stored weights may be rounded, but by so little that the same token is found but for the rarest draws. */
    float target = uniform * *total, before = 0;
    int64_t block = 0, last = (size - 1) / BLOCK;
    while (block < last && before + sums[block] <= target) before += sums[block++];
    while (block > 0 && sums[block] == 0) block--;
    *proposal = -1;
    for (int64_t v = block * BLOCK; v < size && v < (block + 1) * BLOCK; v++) {
        float w;
        load(scores, wide, v, &w, 1);
        before += w;
        if (w > 0) *proposal = v;
        if (before > target && w > 0) break;
    }
    if (*proposal < 0) *proposal = *best;
}

/* scores [rows, size], in whose place the weights are left, over the greatest of a row; all others [rows]. */
void read_rows(char *scores, int wide, int64_t rows, int64_t size, const float *in, const float *out,
               const float *uniform, int64_t *best, int64_t *proposal, float *entropy, float *total) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++)
        read_row(scores + row * size * (wide ? 4 : 2), wide, size, *in, out[row], uniform[row], best + row,
                 proposal + row, entropy + row, total + row);
}

/* From here on a token's scores lie in a row: scores [size, columns], and LANES columns are looked at together. What is
   told of classes [kinds] is float32 [chunks, kinds, LANES]. */

EACH_PROCESSOR static void weigh_chunk(const void *scores, int wide, const int32_t *classes, float in, float out,
                                       int64_t size, int64_t columns, int64_t first, int64_t kinds, float *peaks,
                                       float *sums) {
    float z[LANES], top[LANES];
    for (int64_t i = 0; i < kinds * LANES; i++) peaks[i] = NEVER, sums[i] = 0;
    for (int64_t v = 0; v < size; v++) {
        float *peak = peaks + classes[v] * LANES;
        logarithms(scores, wide, v * columns + first, columns - first, in, out, z);
        for (int i = 0; i < LANES; i++) peak[i] = z[i] > peak[i] ? z[i] : peak[i];
    }
    for (int i = 0; i < LANES; i++) top[i] = NEVER;
    for (int64_t kind = 1; kind < kinds; kind++)
        for (int i = 0; i < LANES; i++) top[i] = peaks[kind * LANES + i] > top[i] ? peaks[kind * LANES + i] : top[i];
    for (int64_t v = 0; v < size; v++) {
        float *total = sums + classes[v] * LANES;
        logarithms(scores, wide, v * columns + first, columns - first, in, out, z);
        /* The cap leaves logits some 200 bits apart, which float32 holds around its middle. */
        for (int i = 0; i < LANES; i++) total[i] += power_of_two(z[i] - top[i] + 90);
    }
}

/* The greatest logarithm of each class and the sum of its weights, over 2^-90 of the greatest of all. */
void weigh_classes(const void *scores, int wide, const int32_t *classes, const float *in, const float *out, int64_t size,
                   int64_t columns, int64_t kinds, float *peaks, float *sums) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t chunk = 0; chunk < (columns + LANES - 1) / LANES; chunk++)
        weigh_chunk(scores, wide, classes, *in, *out, size, columns, chunk * LANES, kinds,
                    peaks + chunk * kinds * LANES, sums + chunk * kinds * LANES);
}

EACH_PROCESSOR static void believe_chunk(const void *scores, int wide, const int32_t *classes, float in, float out,
                                         int64_t size, int64_t columns, int64_t first, int64_t kinds,
                                         const float *peaks, const float *bonus, const int32_t *chosen,
                                         int32_t *best, float *entropy, char *free, float *total) {
    float z[LANES], top[LANES], greatest[LANES], found[LANES];
    float mass[LANES] = {0}, moment[LANES] = {0}, free_mass[LANES] = {0};
    int32_t wanted[LANES], at[LANES] = {0};
    memcpy(wanted, chosen, sizeof wanted);
    for (int i = 0; i < LANES; i++) top[i] = greatest[i] = found[i] = 2 * NEVER;
    for (int64_t kind = 0; kind < kinds * LANES; kind += LANES)
        for (int i = 0; i < LANES; i++) {
            float with = peaks[kind + i] + bonus[kind + i];
            greatest[i] = peaks[kind + i] > greatest[i] ? peaks[kind + i] : greatest[i];
            top[i] = with > top[i] ? with : top[i];
        }
    for (int64_t begin = 0; begin < size; begin += BLOCK) {
        float masses[LANES] = {0}, moments[LANES] = {0}, frees[LANES] = {0};
        for (int64_t v = begin; v < size && v < begin + BLOCK; v++) {
            int32_t kind = classes[v];
            const float *gain = bonus + kind * LANES;
            float w[LANES];
            logarithms(scores, wide, v * columns + first, columns - first, in, out, z);
            for (int i = 0; i < LANES; i++) {
                float over = z[i] + gain[i] - top[i], weight = power_of_two(over);
                masses[i] += weight;
                moments[i] += weight * over;
            }
            for (int i = 0; i < LANES; i++) {
                w[i] = power_of_two(z[i] - greatest[i]);
                frees[i] += w[i];
            }
            for (int i = 0; i < LANES; i++) {
                float own = wanted[i] == kind ? z[i] : 2 * NEVER;
                at[i] = own > found[i] ? (int32_t)v : at[i];
                found[i] = own > found[i] ? own : found[i];
            }
            if (free) store(free, wide, v * columns + first, w, columns - first < LANES ? (int)(columns - first) : LANES);
        }
        for (int i = 0; i < LANES; i++) mass[i] += masses[i], moment[i] += moments[i], free_mass[i] += frees[i];
    }
    for (int i = 0; i < LANES; i++) entropy[i] = logf(mass[i]) - 0.69314718f * moment[i] / mass[i];
    memcpy(total, free_mass, sizeof free_mass);
    memcpy(best, at, sizeof at);
}

/* With what weigh_classes found and a bonus for each class: the likeliest token of the chosen class, the entropy of all
   with the bonus, and, if free is given, [size, columns], the weights without it, over the greatest, and their total.
   What is told of columns [chunks * LANES]. */
void believe(const void *scores, int wide, const int32_t *classes, const float *in, const float *out, int64_t size,
             int64_t columns, int64_t kinds, const float *peaks, const float *bonus, const int32_t *chosen, int32_t *best,
             float *entropy, char *free, float *total) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t chunk = 0; chunk < (columns + LANES - 1) / LANES; chunk++) {
        int64_t at = chunk * LANES, part = chunk * kinds * LANES;
        believe_chunk(scores, wide, classes, *in, *out, size, columns, at, kinds, peaks + part, bonus + part,
                      chosen + at, best + at, entropy + at, free, total + at);
    }
}

EACH_PROCESSOR static void draw_chunk(const void *scores, int wide, const int32_t *classes, float in, float out,
                                      int64_t size, int64_t columns, int64_t first, const float *peaks,
                                      const int32_t *drawn, const float *left, int32_t *tokens) {
    float z[LANES], w[LANES], most[LANES], total[LANES] = {0}, running[LANES] = {0};
    int32_t wanted[LANES], at[LANES];
    memcpy(wanted, drawn, sizeof wanted);
    for (int i = 0; i < LANES; i++) most[i] = peaks[wanted[i] * LANES + i], at[i] = -1;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t v = 0; v < size; v++) {
            int32_t kind = classes[v], any = 0;
            for (int i = 0; i < LANES; i++) any |= wanted[i] == kind;
            if (!any || !kind) continue;
            logarithms(scores, wide, v * columns + first, columns - first, in, out, z);
            for (int i = 0; i < LANES; i++) w[i] = wanted[i] == kind ? power_of_two(z[i] - most[i]) : 0;
            /* The last token with a weight, if rounding leaves the draw at or above the sum of all. */
            if (pass)
                for (int i = 0; i < LANES; i++) at[i] = w[i] > 0 && running[i] <= total[i] ? (int32_t)v : at[i];
            for (int i = 0; i < LANES; i++) running[i] += w[i];
        }
        if (!pass)
            for (int i = 0; i < LANES; i++) total[i] = left[i] * running[i], running[i] = 0;
    }
    memcpy(tokens, at, sizeof at);
}

/* A token of the drawn class of each column, at the share `left` of the class's weights; class 0 draws nothing. */
void draw(const void *scores, int wide, const int32_t *classes, const float *in, const float *out, int64_t size,
          int64_t columns, int64_t kinds, const float *peaks, const int32_t *drawn, const float *left, int32_t *tokens) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t chunk = 0; chunk < (columns + LANES - 1) / LANES; chunk++)
        draw_chunk(scores, wide, classes, *in, *out, size, columns, chunk * LANES, peaks + chunk * kinds * LANES,
                   drawn + chunk * LANES, left + chunk * LANES, tokens + chunk * LANES);
}
