/* Matrix products of rows that are sorted by expert, in the tile registers that some x86 processors have (AMX).

   A tile of the weights is read as it lies in memory: 16 outputs of 64 bytes of columns. What the unit wants in another
   order is its second factor, and that is made of x, which is small: the words of 16 tokens, transposed. So the result
   comes out transposed too, 16 outputs by 16 tokens, and is turned back on its way to y. No copy of the weights is made,
   and each is read from memory once. */

#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11 && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define AMX __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512bf16")))

enum { SIDE = 16, STEP = 64, PAIR = 2 * SIDE }; /* rows of a tile, its bytes a row, outputs that a thread takes */

/* Whether the processor has them, and the system lets this process use them. */
int has_tiles(void) {
    unsigned a, b, c, d, first;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 1) + (d >> 24 & 1) + (d >> 25 & 1) < 3) return 0;
    if (!__get_cpuid_count(7, 1, &first, &b, &c, &d) || !(first >> 5 & 1)) return 0; /* avx512_bf16 */
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

/* Sixteen rows of sixteen words, transposed. */
AMX static inline void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

/* Words [words] of up to 16 rows of x, `stride` bytes apart, as [words, 16]; the rows that are missing are zeros. */
AMX static void pack(const char *x, int64_t stride, int count, __m512i *out, int64_t words) {
    for (int64_t word = 0; word < words; word += SIDE) {
        __m512i r[SIDE];
        for (int i = 0; i < SIDE; i++)
            r[i] = i < count ? _mm512_loadu_si512(x + i * stride + 4 * word) : _mm512_setzero_si512();
        transpose(r);
        for (int i = 0; i < SIDE; i++) _mm512_storeu_si512(out + word + i, r[i]);
    }
}

/* Of a tile of sums [16 outputs, 16 tokens] the first `count` tokens, into rows of y. */
AMX static inline void unpack(const void *sums, int whole, const float *own, const float *unit, char *y, int wide,
                              int64_t stride, int count) {
    __m512i r[SIDE];
    for (int i = 0; i < SIDE; i++) r[i] = _mm512_load_si512((const char *)sums + STEP * i);
    transpose(r);
    for (int i = 0; i < count; i++) {
        __m512 values = whole ? _mm512_cvtepi32_ps(r[i]) : _mm512_castsi512_ps(r[i]);
        if (whole) values = _mm512_mul_ps(_mm512_mul_ps(values, _mm512_set1_ps(own[i])), _mm512_loadu_ps(unit));
        if (wide)
            _mm512_storeu_ps(y + i * stride, values);
        else
            _mm256_storeu_si256((__m256i *)(y + i * stride), (__m256i)_mm512_cvtneps_pbh(values));
    }
}

#define MULTIPLY(total, w, x) \
    if (whole) \
        _tile_dpbssd(total, w, x); \
    else \
        _tile_dpbf16ps(total, w, x)

/* Sums of 32 rows of w, `stride` bytes apart, for two tiles of tokens, packed one behind the other. Meanwhile the rows
   from `next` to `end` are fetched, which another call will need. */
AMX static inline void multiply(const char *w, int64_t stride, const char *next, const char *end, const char *x,
                                int64_t bytes, int whole, char *sums) {
    const char *first = w, *second = w + SIDE * stride, *other = x + SIDE * bytes;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t at = 0; at < bytes; at += STEP) {
        _tile_loadd(4, first + at, stride);
        _tile_loadd(5, second + at, stride);
        _tile_loadd(6, x + SIDE * at, STEP);
        _tile_loadd(7, other + SIDE * at, STEP);
        MULTIPLY(0, 4, 6);
        MULTIPLY(1, 4, 7);
        MULTIPLY(2, 5, 6);
        MULTIPLY(3, 5, 7);
        for (const char *row = next; row < end; row += stride) _mm_prefetch(row + at, _MM_HINT_T1);
    }
    _tile_stored(0, sums, STEP);
    _tile_stored(1, sums + SIDE * STEP, STEP);
    _tile_stored(2, sums + 2 * SIDE * STEP, STEP);
    _tile_stored(3, sums + 3 * SIDE * STEP, STEP);
}

enum { PLAIN, W4A8, INT4, NVFP4, NVFP4_DIVIDED, FP8, INT8 }; /* how rows of weights are stored */

/* Rows of codes as bfloat16, to the last bit what decode.c makes of them. Few bits have few values: those of a group are
   computed once, times its scale, and looked up. */

AMX static void int4(const uint8_t *codes, const float *scale, uint16_t *out, int64_t bytes, int64_t groups) {
    const __m512 values = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    for (int64_t at = 0; at < bytes; at += SIDE) {
        __m256i table = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(scale[at * groups / bytes])));
        __m256i pair = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(codes + at)));
        __m256i low = _mm256_and_si256(pair, _mm256_set1_epi16(15)), high = _mm256_srli_epi16(pair, 4);
        _mm256_storeu_si256((__m256i *)(out + at), _mm256_permutexvar_epi16(low, table));
        _mm256_storeu_si256((__m256i *)(out + bytes + at), _mm256_permutexvar_epi16(high, table));
    }
}

static float wide_e4m3[256]; /* its values; NaN codes are 480 */

__attribute__((constructor)) static void fill(void) {
    for (int code = 0; code < 256; code++) {
        int exponent = code >> 3 & 15, normal = exponent > 0;
        float size = (float)((code & 7) + 8 * normal) * (float)(1 << (exponent + !normal)) / 1024;
        wide_e4m3[code] = code & 0x80 ? -size : size;
    }
}

/* Sixteen bytes are two groups: the second one's values lie behind the first one's. */
AMX static void nvfp4(const uint8_t *codes, const uint8_t *scale, float factor, int divide, uint16_t *out,
                      int64_t bytes) {
    const __m512 values = _mm512_set_ps(-6, -4, -3, -2, -1.5f, -1, -0.5f, -0.0f, 6, 4, 3, 2, 1.5f, 1, 0.5f, 0);
    const __m256i behind = _mm256_set_epi64x(0x0010001000100010, 0x0010001000100010, 0, 0);
    for (int64_t at = 0; at < bytes; at += SIDE) {
        float first = wide_e4m3[scale[at / 8]], second = wide_e4m3[scale[at / 8 + 1]];
        first = divide ? first / factor : first * factor, second = divide ? second / factor : second * factor;
        __m256i front = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(first)));
        __m256i back = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(second)));
        __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(front), back, 1);
        __m256i pair = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(codes + at)));
        __m256i low = _mm256_or_si256(_mm256_and_si256(pair, _mm256_set1_epi16(15)), behind);
        __m256i high = _mm256_or_si256(_mm256_srli_epi16(pair, 4), behind);
        __m512i found = _mm512_permutexvar_epi16(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), table);
        _mm256_storeu_si256((__m256i *)(out + at), _mm512_castsi512_si256(found));
        _mm256_storeu_si256((__m256i *)(out + bytes + at), _mm512_extracti64x4_epi64(found, 1));
    }
}

/* The 128 magnitudes of a row times its scale, and the sign. */
AMX static void fp8(const uint8_t *codes, float scale, uint16_t *out, int64_t columns) {
    __m512i table[4];
    for (int i = 0; i < 4; i++) {
        __m256i half[2];
        for (int j = 0; j < 2; j++)
            half[j] = (__m256i)_mm512_cvtneps_pbh(
                _mm512_mul_ps(_mm512_loadu_ps(wide_e4m3 + 32 * i + 16 * j), _mm512_set1_ps(scale)));
        table[i] = _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
    }
    for (int64_t at = 0; at < columns; at += PAIR) {
        __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + at)));
        __m512i few = _mm512_permutex2var_epi16(table[0], code, table[1]);
        __m512i many = _mm512_permutex2var_epi16(table[2], code, table[3]);
        __m512i found = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, _mm512_set1_epi16(64)), few, many);
        __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(128)), 8);
        _mm512_storeu_si512(out + at, _mm512_xor_si512(found, sign));
    }
}

AMX static void int8(const int8_t *codes, float scale, uint16_t *out, int64_t columns) {
    for (int64_t at = 0; at < columns; at += SIDE) {
        __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + at))));
        _mm256_storeu_si256((__m256i *)(out + at),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(scale))));
    }
}

/* A row of weights as numbers that tiles can be read from, int8 for w4a8 and bfloat16 for the others. */
static void decode(int64_t format, const uint8_t *codes, const void *scale, int wide, const float *factor, int64_t row,
                   int64_t groups, int64_t columns, void *out) {
    float own[groups ? groups : 1];
    const uint8_t *narrow = (const uint8_t *)scale + row * groups;
    if (format == W4A8) {
        w4a8_row(codes, narrow, out, columns / 2, groups);
    } else if (format == NVFP4 || format == NVFP4_DIVIDED) {
        nvfp4(codes, narrow, factor[row], format == NVFP4_DIVIDED, out, columns / 2);
    } else {
        load(scale, wide, row * groups, own, (int)groups);
        if (format == INT4)
            int4(codes, own, out, columns / 2, groups);
        else if (format == INT8)
            int8((const int8_t *)codes, own[0], out, columns);
        else
            fp8(codes, own[0], out, columns);
    }
}

/* y [n, outs] of x [n, columns], expert e's rows from offsets[e] to offsets[e + 1], and w [experts, outs, columns] in a
   format with scales [experts, outs, groups], float32 if wide_scale, and factors [experts, outs], as it has them.

   Products are of bfloat16 numbers, or, if whole, of int8 ones: of x with a scale a row, own [n], and of w with units
   [experts, outs]. y is bfloat16 or, if wide, float32. outs are a multiple of 32, columns of 64 bytes. panel: room for
   all rows of x and 32 more of each expert. */
AMX void grouped_tiles(const char *x, const float *own, const int64_t *offsets, const char *w, const void *scale,
                       int wide_scale, const float *factor, const float *units, char *panel, char *y, int wide,
                       int64_t format, int64_t experts, int64_t outs, int64_t columns, int64_t groups) {
    int whole = own != 0, packed = format != PLAIN;
    int64_t bytes = columns * (whole ? 1 : 2), blocks = outs / PAIR;
    int64_t stored = !packed ? bytes : format >= FP8 ? columns : columns / 2;
    int64_t size = wide ? 4 : 2, most = 0;
    int64_t tiles[experts + 1];
    for (int64_t e = 0; e < experts; e++) {
        tiles[e] = most;
        most += (offsets[e + 1] - offsets[e] + PAIR - 1) / PAIR * 2;
    }
    tiles[experts] = most;
#pragma omp parallel
    {
        struct {
            uint8_t palette, row, reserved[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        } config = {.palette = 1};
        char before[64], sums[4 * SIDE * STEP] __attribute__((aligned(64)));
        for (int i = 0; i < 8; i++) config.bytes[i] = STEP, config.rows[i] = SIDE;
        /* Whoever else uses tiles in this thread may remember what it set. */
        _tile_storeconfig(before);
        _tile_loadconfig(&config);
#pragma omp for schedule(static)
        for (int64_t e = 0; e < experts; e++)
            for (int64_t tile = tiles[e]; tile < tiles[e + 1]; tile++) {
                int64_t row = offsets[e] + SIDE * (tile - tiles[e]), left = offsets[e + 1] - row;
                int count = left < 0 ? 0 : left > SIDE ? SIDE : (int)left;
                pack(x + row * bytes, bytes, count, (__m512i *)(panel + tile * SIDE * bytes), bytes / 4);
            }
#pragma omp for schedule(dynamic, 4)
        for (int64_t block = 0; block < experts * blocks; block++) {
            int64_t e = block / blocks, out = block % blocks * PAIR, last = experts * blocks - 1;
            char decoded[packed ? PAIR * bytes : 1] __attribute__((aligned(64)));
            const char *rows = w + (e * outs + out) * stored;
            int64_t stride = stored;
            if (tiles[e] == tiles[e + 1]) continue;
            /* The next block's rows, some with each pair of tiles. */
            int64_t pairs = (tiles[e + 1] - tiles[e]) / 2, each = (PAIR + pairs - 1) / pairs, fetched = 0;
            int64_t ahead = block < last && !packed ? PAIR : 0;
            if (packed) {
                for (int64_t i = 0; i < PAIR; i++)
                    decode(format, (const uint8_t *)rows + i * stored, scale, wide_scale, factor, e * outs + out + i,
                           groups, columns, decoded + i * bytes);
                rows = decoded, stride = bytes;
            }
            for (int64_t tile = tiles[e]; tile < tiles[e + 1]; tile += 2) {
                const char *tokens = panel + tile * SIDE * bytes, *next = rows + (PAIR + fetched) * stride;
                fetched = fetched + each < ahead ? fetched + each : ahead;
                const char *end = rows + (PAIR + fetched) * stride;
                if (whole)
                    multiply(rows, stride, next, end, tokens, bytes, 1, sums);
                else
                    multiply(rows, stride, next, end, tokens, bytes, 0, sums);
                for (int part = 0; part < 4; part++) {
                    int64_t row = offsets[e] + SIDE * (tile - tiles[e] + part % 2), left = offsets[e + 1] - row;
                    int64_t o = out + part / 2 * SIDE;
                    if (left > 0)
                        unpack(sums + part * SIDE * STEP, whole, own ? own + row : 0,
                               units ? units + e * outs + o : 0, y + (row * outs + o) * size, wide, outs * size,
                               left > SIDE ? SIDE : (int)left);
                }
            }
        }
        _tile_loadconfig(before);
    }
}

#else

int has_tiles(void) { return 0; }

#endif
