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

/* Within 2 units in the last place; 0 below 2^-126, and no more than 2^126. */
static inline float power_of_two(float x) {
    float kept = x < -126 ? -126 : x > 126 ? 126 : x;
    float moved = kept + 12582912.0f; /* 1.5 * 2^23: rounds to a whole number, which its last bits then hold */
    float rest = kept - (moved - 12582912.0f), scale, y = 1.5252734e-5f;
    uint32_t bits;
    memcpy(&bits, &moved, 4);
    bits = (bits - 0x4b400000 + 127) << 23;
    memcpy(&scale, &bits, 4);
    y = y * rest + 1.5403531e-4f;
    y = y * rest + 1.3333558e-3f;
    y = y * rest + 9.6181291e-3f;
    y = y * rest + 5.5504109e-2f;
    y = y * rest + 2.4022651e-1f;
    y = y * rest + 6.9314718e-1f;
    y = y * rest + 1.0f;
    return x < -126 ? 0 : y * scale;
}

/* Words of eight codes, those of all groups side by side, times the groups' multiples, to int8 [2, bytes]. */
void w4a8_row(const uint8_t *codes, const uint8_t *multiple, int8_t *out, int64_t bytes, int64_t groups);
