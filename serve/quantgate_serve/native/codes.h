/* How 4- and 8-bit codes become weights. Part of quantized.c.
 *
 * A weight is value * scale + shift, computed as its format defines it: for NF4 the rounded product
 * of a value of the table and the block's scale, for GPTQ (code - zero) * scale, which FP32 holds
 * exactly where scales are FP16.
 *
 * K input channels, N output channels, in tiles of L, which are the lanes of one vector. Codes are
 * words of eight 4-bit codes [tiles, K / 8, L] or of four 8-bit codes [tiles, K / 4, L], lowest bits
 * first; scales and zeros are [tiles, groups, L].
 */
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "vectors.h"

/* The outputs of a tile are the lanes of a vector of this CPU. */
#if LANES == 16
#define LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#elif LANES == 8
#define LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7
#else
#define LANE_NUMBERS 0, 1, 2, 3
#endif

/* What a scale is stored as. */
enum { FLOAT, HALF, NESTED };

/* One Linear. quantized.py has the same fields. */
typedef struct {
    const void *codes;
    const void *scales;
    const uint8_t *zeros; /* stored zero points; null where weights have none */
    const float *values;  /* [16], what a 4-bit code stands for; null for 8-bit codes */
    const float *nested;  /* [256], what the byte of a nested scale stands for */
    const float *outer;   /* the scales of nested scales: one for 2^outer_shift of them */
    const float *bias;    /* [tiles * L] or null */
    int64_t num_in, num_out, group, num_groups;
    int32_t scale_kind, zero_offset, outer_shift;
    float nested_offset;
} linear;

INLINE ints widen(const uint8_t *from) {
#if LANES == 16
    return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif LANES == 8
    return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    ints result;
    for (int i = 0; i < LANES; i++) result[i] = from[i];
    return result;
#endif
}

INLINE vec gather(const float *from, ints at) {
#if LANES == 16
    return (vec)_mm512_i32gather_ps((__m512i)at, from, 4);
#elif LANES == 8
    return (vec)_mm256_i32gather_ps(from, (__m256i)at, 4);
#else
    vec result;
    for (int i = 0; i < LANES; i++) result[i] = from[at[i]];
    return result;
#endif
}

INLINE vec from_half(const uint16_t *from) {
#if LANES == 16
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif LANES == 8
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    vec result;
    for (int i = 0; i < LANES; i++) {
        uint32_t size = from[i] & 0x7fff, bits = (size << 13) + (112u << 23);
        if (size >= 0x7c00) bits += 112u << 23; /* infinity, or no number */
        float x;
        memcpy(&x, &bits, 4);
        if (size < 0x400) x = size * 0x1p-24f; /* too small for an exponent of its own */
        result[i] = from[i] & 0x8000 ? -x : x;
    }
    return result;
#endif
}

/* scale and shift [n, L] of n groups of a tile, from group `first`. */
static __attribute__((noinline)) void expand_scales(const linear *l, int64_t tile, int64_t first,
                                                    int64_t n, float *scale, float *shift) {
    const int32_t groups = l->num_groups;
    const int64_t at = (tile * groups + first) * LANES;
    if (l->scale_kind == FLOAT) {
        memcpy(scale, (const float *)l->scales + at, sizeof(float) * n * LANES);
    } else if (l->scale_kind == HALF) {
        for (int64_t i = 0; i < n * LANES; i += LANES)
            store(scale + i, from_half((const uint16_t *)l->scales + at + i));
    } else {
        ints block = (ints){LANE_NUMBERS} * groups + (int32_t)(tile * LANES * groups + first);
        for (int64_t i = 0; i < n * LANES; i += LANES, block += 1) {
            vec outer = gather(l->outer, block >> l->outer_shift);
            store(scale + i, gather(l->nested, widen((const uint8_t *)l->scales + at + i)) * outer);
        }
        /* Two roundings, as in bitsandbytes: no compiler may make one of them. */
        __asm__ volatile("" ::: "memory");
        for (int64_t i = 0; i < n * LANES; i += LANES)
            store(scale + i, load(scale + i) + l->nested_offset);
    }
    for (int64_t i = 0; i < n * LANES; i += LANES) {
        vec zero = (vec){0};
        if (l->zeros)
            zero = __builtin_convertvector(widen(l->zeros + at + i) + l->zero_offset, vec);
        store(shift + i, -load(scale + i) * zero);
    }
}

/* The lowest four bits of each lane look up one of 16 values. */
INLINE vec look_up(const float *values, ints codes) {
#if LANES == 16
    return (vec)_mm512_permutexvar_ps((__m512i)codes, (__m512)load(values));
#elif LANES == 8 /* by three bits in each half of the values, then by the fourth */
    __m256i at = (__m256i)codes;
    __m256 low = _mm256_permutevar8x32_ps((__m256)load(values), at);
    __m256 high = _mm256_permutevar8x32_ps((__m256)load(values + 8), at);
    return (vec)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
#else
    vec result;
    for (int i = 0; i < LANES; i++) result[i] = values[codes[i] & 15];
    return result;
#endif
}

/* A tile of a Linear. */
typedef struct {
    const linear *of;
    int64_t tile;
} column;

/* The words of channels 8 * `eight` and on: one of 4-bit codes, two of 8-bit codes. */
INLINE const ints *words_of(column c, int64_t eight, const int is_packed) {
    return (const ints *)c.of->codes +
           (c.tile * (c.of->num_in / 8) + eight) * (is_packed ? 1 : 2);
}

/* The weights of the j-th of eight channels. */
INLINE vec weight_of(const ints *words, const int j, const int is_packed, const float *table,
                     vec scale, vec shift) {
    if (is_packed) return look_up(table, words[0] >> (4 * j)) * scale + shift;
    ints codes = (words[j / 4] >> (8 * (j % 4))) & 255;
    return __builtin_convertvector(codes, vec) * scale + shift;
}
