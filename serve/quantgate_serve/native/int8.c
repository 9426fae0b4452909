/* LLM.int8 on a CPU with AVX-512 and VNNI, or with AVX2: bitsandbytes' numbers, bit for bit.
 *
 * Rows of x are rounded to FP16, those channels that hold an outlier are left out, and the rest is
 * rounded to int8 by each row's largest. Products are exact integers, so only the roundings around
 * them need bitsandbytes' order; no multiplication may be fused with an addition.
 *
 * T rows, K input channels in groups of G, N output channels in tiles of L, which are the lanes of
 * one vector. Codes of weights are [tiles, groups, L, G]. Called by int8.py.
 */
#include "vectors.h"

#if LANES == 16 && defined(__AVX512VNNI__)
#define GROUP 4    /* VNNI multiplies four bytes of a weight and of x in each lane, */
#define OFFSET 128 /* those of x unsigned: code + 128 */
#define MAX_ROWS 8 /* rows of which the sums of two tiles fit into registers */
typedef uint8_t code;
#elif LANES == 8
#define GROUP 2 /* AVX2 multiplies two integers of 16 bits */
#define OFFSET 0
#define MAX_ROWS 6
typedef int16_t code;
#else
#define GROUP 0
#define OFFSET 0
#endif

/* For int8.py. There are no kernels where the group is 0. */
const int64_t int8_lanes = LANES, int8_group = GROUP, int8_offset = OFFSET;

#if GROUP
#include <immintrin.h>

/* Below so many products of a weight and a row, one thread is faster. */
#define MIN_PRODUCTS 1048576
#define SCALE 6.200124e-05f            /* 1 / 127^2 as bitsandbytes writes it */
#define INVERSE 7.874015718698502e-3f /* 1 / 127 */

/* One Linear. int8.py has the same fields. */
typedef struct {
    const int8_t *codes;
    const int32_t *sums; /* [tiles * L], OFFSET times the sum of an output's codes */
    const float *scales; /* [tiles * L] */
    const float *bias;   /* [tiles * L] or null */
    int64_t num_in, num_out;
} linear;

/* One to three Linears over one input. y is [T, all outputs], or where `is_split` one matrix after
 * another. */
typedef struct {
    linear parts[3];
    int64_t num_parts, is_split;
    float threshold;
} product;

typedef struct {
    const product *p;
    const float *x;
    code *codes;     /* [T, stride], plus OFFSET */
    float *largest;  /* [T] */
    uint8_t *is_out; /* [K], whether a channel holds an outlier */
    float *y;
    int64_t rows, num_in, num_out, stride;
    int *is_odd; /* whether something is not finite */
} job;

typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1)));
typedef code row_codes __attribute__((vector_size(LANES * sizeof(code)), aligned(1)));

/* `halves` rounds to FP16, `nearest` to integers, ties to even. `load_group` gives the codes of a
 * group of a tile, 32 bits for each output: what `add_products` multiplies with x's group. */
#if LANES == 16
INLINE vec halves(vec x) {
    return (vec)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE ints nearest(vec x) { return (ints)_mm512_cvtps_epi32((__m512)x); }
INLINE vec larger(vec x, vec y) { return (vec)_mm512_max_ps((__m512)x, (__m512)y); }
INLINE int any(ints where) { return _mm512_test_epi32_mask((__m512i)where, (__m512i)where) != 0; }
INLINE ints load_group(const int8_t *from) { return (ints)_mm512_loadu_si512(from); }
INLINE ints add_products(ints sums, ints weight, ints x) {
    return (ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, (__m512i)weight);
}
#else
INLINE vec halves(vec x) {
    return (vec)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE ints nearest(vec x) { return (ints)_mm256_cvtps_epi32((__m256)x); }
INLINE vec larger(vec x, vec y) { return (vec)_mm256_max_ps((__m256)x, (__m256)y); }
INLINE int any(ints where) { return !_mm256_testz_si256((__m256i)where, (__m256i)where); }
INLINE ints load_group(const int8_t *from) {
    return (ints)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
}
INLINE ints add_products(ints sums, ints weight, ints x) {
    return sums + (ints)_mm256_madd_epi16((__m256i)weight, (__m256i)x);
}
#endif

/* L channels of a row as FP16 rounds them, zeros behind the last. */
INLINE vec channels(const job *j, int64_t row, int64_t k) {
    const float *from = j->x + row * j->num_in + k;
    if (k + LANES <= j->num_in) return halves(load(from));
    vec x = {0};
    memcpy(&x, from, sizeof(float) * (j->num_in - k));
    return halves(x);
}

/* The largest that is no outlier, and which channels hold outliers. */
static void find_largest(const job *j, int64_t row) {
    const vec threshold = all(j->p->threshold);
    vec most = {0};
    for (int64_t k = 0; k < j->num_in; k += LANES) {
        vec x = (vec)((ints)channels(j, row, k) & 0x7fffffff);
        ints in = x < threshold; /* NaN is out, too */
        most = larger(most, (vec)((ints)x & in));
        if (!any(~in)) continue;
        if (any(~(x <= 65504.0f))) __atomic_store_n(j->is_odd, 1, __ATOMIC_RELAXED);
        for (int i = 0; i < LANES; i++)
            if (!in[i]) __atomic_store_n(j->is_out + k + i, 1, __ATOMIC_RELAXED);
    }
    float largest = 0;
    for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    j->largest[row] = largest;
}

static void quantize(const job *j, int64_t row) {
    /* Two roundings: torch divides by a tensor so. */
    const float inverse = 1.0f / j->largest[row] * 127.0f;
    code *to = j->codes + row * j->stride;
    for (int64_t k = 0; k < j->num_in; k += LANES) {
        ints found = nearest(channels(j, row, k) * inverse);
        ints out = __builtin_convertvector(*(const bytes *)(j->is_out + k), ints);
        found = (found & (out == 0)) + OFFSET;
        *(row_codes *)(to + k) = __builtin_convertvector(found, row_codes);
    }
}

INLINE vec rounded(vec x) {
    __asm__("" : "+v"(x)); /* what follows cannot be fused with what came before */
    return x;
}

/* `to` [rows, L * width] of `rows` rows from `row` on and `width` neighbouring tiles. */
INLINE void multiply_block(const linear *l, int64_t tile, const job *j, int64_t row,
                           const int rows, const int width, float *to, int64_t to_stride) {
    const int64_t groups = (l->num_in + GROUP - 1) / GROUP;
    const int8_t *codes = l->codes + tile * groups * LANES * GROUP;
    const code *x = j->codes + row * j->stride;
    ints acc[MAX_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int w = 0; w < width; w++) acc[r][w] = (ints){0};
    for (int64_t k = 0; k < groups; k++) {
        ints weight[2];
        UNROLL for (int w = 0; w < width; w++)
            weight[w] = load_group(codes + (w * groups + k) * LANES * GROUP);
        UNROLL for (int r = 0; r < rows; r++) {
            int32_t group;
            memcpy(&group, x + r * j->stride + k * GROUP, sizeof group);
            ints value = group - (ints){0};
            UNROLL for (int w = 0; w < width; w++)
                acc[r][w] = add_products(acc[r][w], weight[w], value);
        }
    }
    UNROLL for (int w = 0; w < width; w++) {
        int64_t at = (tile + w) * LANES;
        ints sums = *(const ints *)(l->sums + at);
        vec scales = load(l->scales + at);
        UNROLL for (int r = 0; r < rows; r++) {
            vec y = __builtin_convertvector(acc[r][w] - sums, vec);
            y = rounded(y * (j->largest[row + r] * scales) * SCALE);
            if (l->bias) y += load(l->bias + at);
            store(to + r * to_stride + w * LANES, y);
        }
    }
}

static __attribute__((noinline)) void multiply_rows(const linear *l, int64_t tile, const job *j,
                                                    int64_t row, int rows, int width, float *to,
                                                    int64_t to_stride) {
    /* The last tile may have more lanes than there are outputs. */
    float whole[MAX_ROWS * 2 * LANES];
    const int64_t left = l->num_out - tile * LANES;
    const int is_whole = left >= width * LANES;
    float *at = is_whole ? to : whole;
    const int64_t stride = is_whole ? to_stride : 2 * LANES;
#define CASE(R) \
    case R: \
        if (width == 2) multiply_block(l, tile, j, row, R, 2, at, stride); \
        else multiply_block(l, tile, j, row, R, 1, at, stride); \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if MAX_ROWS == 8
        CASE(7) CASE(8)
#endif
    }
#undef CASE
    for (int r = 0; r < rows && !is_whole; r++)
        memcpy(to + r * to_stride, whole + r * stride, sizeof(float) * left);
}

INLINE int64_t num_tiles(const linear *l) { return (l->num_out + LANES - 1) / LANES; }

static void run(const job *j) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < j->rows; r++) find_largest(j, r);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < j->rows; r++) quantize(j, r);
    int64_t units = 0;
    for (int i = 0; i < j->p->num_parts; i++) units += (num_tiles(&j->p->parts[i]) + 1) / 2;
#pragma omp for schedule(dynamic, 1)
    for (int64_t u = 0; u < units; u++) {
        const linear *l = j->p->parts;
        int64_t tile = 2 * u, column = 0;
        for (; tile >= num_tiles(l); l++) {
            tile -= (num_tiles(l) + 1) / 2 * 2;
            column += l->num_out;
        }
        int64_t blocks = (j->rows + MAX_ROWS - 1) / MAX_ROWS;
        int width = num_tiles(l) - tile > 1 ? 2 : 1;
        int64_t to_stride = j->p->is_split ? l->num_out : j->num_out;
        float *y = j->y + (j->p->is_split ? column * j->rows : column) + tile * LANES;
        for (int64_t b = 0; b < blocks; b++) {
            int64_t from = b * j->rows / blocks, end = (b + 1) * j->rows / blocks;
            multiply_rows(l, tile, j, from, end - from, width, y + from * to_stride, to_stride);
        }
    }
}

/* y [T, N], without what outliers add, from x [T, K]. `codes` holds K of them and 128 bytes for each
 * row, `largest` T floats, `is_out` K bytes and L. Returns how many of K channels hold outliers,
 * whose numbers it writes to `columns` [K]; or -1 where something is not finite in FP16, and then y
 * is of no use. */
int64_t multiply_int8(const product *p, const float *x, int64_t rows, code *codes, float *largest,
                      uint8_t *is_out, int64_t *columns, float *y, int64_t threads) {
    int is_odd = 0;
    int64_t num_in = p->parts[0].num_in, num_out = 0, found = 0;
    for (int i = 0; i < p->num_parts; i++) num_out += p->parts[i].num_out;
    /* An odd number of cache lines: rows 4 KiB apart would share a few places of the cache. */
    int64_t stride = ((num_in * sizeof(code) + 63) / 64 | 1) * 64 / sizeof(code);
    job j = {p, x, codes, largest, is_out, y, rows, num_in, num_out, stride, &is_odd};
    memset(is_out, 0, num_in + LANES);
    if (num_in * num_out * rows < MIN_PRODUCTS) threads = 1;
    if (threads == 1) {
        run(&j);
    } else {
#pragma omp parallel num_threads(threads)
        run(&j);
    }
    for (int64_t k = 0; k < num_in; k++)
        if (is_out[k]) columns[found++] = k;
    return is_odd ? -1 : found;
}

/* What outliers are multiplied with: picked [T, n] of x [T, K], and of each part FP32 weights
 * [outputs, n], each part beginning at a cache line, as `weights` does. */
void pick_outliers(const product *p, const float *x, int64_t rows, const int64_t *columns, int64_t n,
                   float *picked, float *weights) {
    const int64_t num_in = p->parts[0].num_in, groups = (num_in + GROUP - 1) / GROUP;
    const int bits = 32 / GROUP;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i++) picked[r * n + i] = x[r * num_in + columns[i]];
    for (int part = 0; part < p->num_parts; part++) {
        const linear *l = p->parts + part;
        for (int64_t at = 0; at < l->num_out; at += LANES) {
            const int8_t *tile = l->codes + at * groups * GROUP;
            const vec scales = load(l->scales + at);
            int64_t left = l->num_out - at < LANES ? l->num_out - at : LANES;
            for (int64_t i = 0; i < n; i++) {
                ints group = load_group(tile + columns[i] / GROUP * LANES * GROUP);
                group = group << (32 - bits * (int)(columns[i] % GROUP + 1)) >> (32 - bits);
                vec found = __builtin_convertvector(group, vec) * scales * INVERSE;
                for (int64_t o = 0; o < left; o++) weights[o * n + i] = found[o];
            }
            weights += left * n;
        }
        weights = (float *)(((uintptr_t)weights + 63) / 64 * 64);
    }
}
#endif
