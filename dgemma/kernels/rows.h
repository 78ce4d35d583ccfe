/* What the other files share: rows of numbers in bfloat16 or, if wide, float32. */

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_PROCESSOR
#endif

enum {
    PIECE = 1024, /* columns at a time, in the nearest cache */
    FEW = 16      /* rows that are not worth a second thread */
};

static inline uint16_t bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline void store(void *out, int wide, int64_t at, const float *values, int count) {
    if (wide)
        memcpy((float *)out + at, values, 4 * (size_t)count);
    else
        for (int i = 0; i < count; i++) ((uint16_t *)out)[at + i] = bfloat16(values[i]);
}

static inline void load(const void *x, int wide, int64_t at, float *values, int count) {
    if (wide)
        memcpy(values, (const float *)x + at, 4 * (size_t)count);
    else
        for (int i = 0; i < count; i++) {
            uint32_t bits = (uint32_t)((const uint16_t *)x)[at + i] << 16;
            memcpy(values + i, &bits, 4);
        }
}

/* Words of eight codes, those of all groups side by side, times the groups' multiples, to int8 [2, bytes]. */
void w4a8_row(const uint8_t *codes, const uint8_t *multiple, int8_t *out, int64_t bytes, int64_t groups);
