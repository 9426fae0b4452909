/* How 4- and 8-bit codes become weights, and the vectors they lie in. Part of quantized.c.
 *
 * A weight is value * scale + shift, computed as its format defines it: for NF4 the rounded product
 * of a value of the table and the block's scale, for GPTQ (code - zero) * scale, which FP32 holds
 * exactly where scales are FP16.
 *
 * K input channels, N output channels, in tiles of 16, which are the lanes of one vector. Codes are
 * words of eight 4-bit codes [tiles, K / 8, 16] or of four 8-bit codes [tiles, K / 4, 16], lowest
 * bits first; scales and zeros are [tiles, groups, 16].
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec x) { *(vec *)to = x; }
INLINE vec all(float x) { return x - (vec){0}; }

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
    const float *bias;    /* [tiles * 16] or null */
    int64_t num_in, num_out, group, num_groups;
    int32_t scale_kind, zero_offset, outer_shift;
    float nested_offset;
} linear;

INLINE ints widen(const uint8_t *from) {
#ifdef __AVX512F__
    return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#else
    ints result;
    for (int i = 0; i < LANES; i++) result[i] = from[i];
    return result;
#endif
}

INLINE vec gather(const float *from, ints at) {
#ifdef __AVX512F__
    return (vec)_mm512_i32gather_ps((__m512i)at, from, 4);
#else
    vec result;
    for (int i = 0; i < LANES; i++) result[i] = from[at[i]];
    return result;
#endif
}

INLINE vec from_half(const _Float16 *from) {
#ifdef __AVX512F__
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#else
    vec result;
    for (int i = 0; i < LANES; i++) result[i] = from[i];
    return result;
#endif
}

/* scale and shift [n, 16] of n groups of a tile, from group `first`. */
static __attribute__((noinline)) void expand_scales(const linear *l, int64_t tile, int64_t first,
                                                    int64_t n, float *scale, float *shift) {
    const int32_t groups = l->num_groups;
    const int64_t at = (tile * groups + first) * LANES;
    if (l->scale_kind == FLOAT) {
        memcpy(scale, (const float *)l->scales + at, sizeof(float) * n * LANES);
    } else if (l->scale_kind == HALF) {
        for (int64_t i = 0; i < n * LANES; i += LANES)
            store(scale + i, from_half((const _Float16 *)l->scales + at + i));
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

/* The lowest four bits of each lane look up a value. */
INLINE vec look_up(vec table, ints codes) {
#ifdef __AVX512F__
    return __builtin_shuffle(table, codes);
#else
    typedef float half __attribute__((vector_size(32), aligned(4)));
    typedef int32_t half_ints __attribute__((vector_size(32), aligned(4)));
    vec result;
    for (int i = 0; i < 2; i++) {
        half_ints at = ((half_ints *)&codes)[i];
        half low = __builtin_shuffle(((half *)&table)[0], at);
        half high = __builtin_shuffle(((half *)&table)[1], at);
        half_ints is_high = (at << 28) >> 31;
        ((half *)&result)[i] = (half)(((half_ints)high & is_high) | ((half_ints)low & ~is_high));
    }
    return result;
#endif
}

/* A tile of a Linear: 16 outputs. */
typedef struct {
    const linear *of;
    int64_t tile;
} column;

/* The words of channels 8 * `eight` and on: one of 4-bit codes, two of 8-bit codes. */
INLINE const ints *words_of(column c, int64_t eight, const int is_packed) {
    return (const ints *)c.of->codes +
           (c.tile * (c.of->num_in / 8) + eight) * (is_packed ? 1 : 2);
}

/* The 16 weights of the j-th of eight channels. */
INLINE vec weight_of(const ints *words, const int j, const int is_packed, vec table, vec scale,
                     vec shift) {
    if (is_packed) return look_up(table, words[0] >> (4 * j)) * scale + shift;
    ints codes = (words[j / 4] >> (8 * (j % 4))) & 255;
    return __builtin_convertvector(codes, vec) * scale + shift;
}
