/* LLM.int8 on a CPU with AVX-512 and VNNI: bitsandbytes' numbers, bit for bit.
 *
 * Rows of x are rounded to FP16, those channels that hold an outlier are left out, and the rest is
 * rounded to int8 by each row's largest. Products are exact integers, so only the roundings around
 * them need bitsandbytes' order; no multiplication may be fused with an addition.
 *
 * T rows, K input channels, N output channels in tiles of 16. Codes of weights are
 * [tiles, K4, 16, 4] with K4 = K / 4 rounded up. Called by int8.py.
 */
#include "vectors.h"

#define MAX_ROWS 8 /* rows of which the sums of two tiles fit into registers */
/* Below so many products of a weight and a row, one thread is faster. */
#define MIN_PRODUCTS 1048576
#define SCALE 6.200124e-05f            /* 1 / 127^2 as bitsandbytes writes it */
#define INVERSE 7.874015718698502e-3f /* 1 / 127 */

/* One Linear. int8.py has the same fields. */
typedef struct {
    const int8_t *codes;
    const int32_t *sums; /* [tiles * 16], 128 times the sum of an output's codes */
    const float *scales; /* [tiles * 16] */
    const float *bias;   /* [tiles * 16] or null */
    int64_t num_in, num_out;
} linear;

/* One to three Linears over one input. y is [T, all outputs], or where `is_split` one matrix after
 * another. */
typedef struct {
    linear parts[3];
    int64_t num_parts, is_split;
    float threshold;
} product;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>

typedef struct {
    const product *p;
    const float *x;
    uint8_t *codes;  /* [T, stride], code + 128 */
    float *largest;  /* [T] */
    uint8_t *is_out; /* [K], whether a channel holds an outlier */
    float *y;
    int64_t rows, num_in, num_out, stride;
    int *is_odd; /* whether something is not finite */
} job;

INLINE __mmask16 lanes_from(int64_t k, int64_t num_in) {
    return num_in - k < LANES ? (1u << (num_in - k)) - 1 : 0xffff;
}

/* Sixteen channels as FP16 rounds them. */
INLINE __m512 halves(const float *from, __mmask16 lanes) {
    __m512 x = _mm512_maskz_loadu_ps(lanes, from);
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* The largest that is no outlier, and which channels hold outliers. */
static void find_largest(const job *j, int64_t row) {
    const __m512 threshold = _mm512_set1_ps(j->p->threshold);
    __m512 most = _mm512_setzero_ps();
    for (int64_t k = 0; k < j->num_in; k += LANES) {
        __mmask16 lanes = lanes_from(k, j->num_in);
        __m512 x = _mm512_abs_ps(halves(j->x + row * j->num_in + k, lanes));
        __mmask16 out = _mm512_cmp_ps_mask(x, threshold, _CMP_NLT_UQ); /* NaN, too */
        most = _mm512_mask_max_ps(most, ~out, most, x);
        if (!out) continue;
        if (_mm512_mask_cmp_ps_mask(out, x, _mm512_set1_ps(65504.0f), _CMP_NLE_UQ))
            __atomic_store_n(j->is_odd, 1, __ATOMIC_RELAXED);
        for (int i = 0; i < LANES; i++)
            if (out >> i & 1) __atomic_store_n(j->is_out + k + i, 1, __ATOMIC_RELAXED);
    }
    j->largest[row] = _mm512_reduce_max_ps(most);
}

static void quantize(const job *j, int64_t row) {
    /* Two roundings: torch divides by a tensor so. */
    const __m512 inverse = _mm512_set1_ps(1.0f / j->largest[row] * 127.0f);
    uint8_t *to = j->codes + row * j->stride;
    for (int64_t k = 0; k < j->num_in; k += LANES) {
        __mmask16 lanes = lanes_from(k, j->num_in);
        __m512 x = _mm512_mul_ps(halves(j->x + row * j->num_in + k, lanes), inverse);
        __m512i code = _mm512_cvtps_epi32(x); /* to the nearest, ties to even */
        __m128i out = _mm_maskz_loadu_epi8(lanes, j->is_out + k);
        code = _mm512_mask_set1_epi32(code, _mm_test_epi8_mask(out, out), 0);
        __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(code), _mm_set1_epi8(-128));
        _mm_storeu_si128((__m128i *)(to + k), bytes);
    }
}

INLINE __m512 rounded(__m512 x) {
    __asm__("" : "+v"(x)); /* what follows cannot be fused with what came before */
    return x;
}

/* `to` [rows, up to 16 * width] of `rows` rows from `row` on and `width` neighbouring tiles. */
INLINE void multiply_block(const linear *l, int64_t tile, const job *j, int64_t row,
                           const int rows, const int width, float *to, int64_t to_stride) {
    const int64_t fours = (l->num_in + 3) / 4;
    const int8_t *codes = l->codes + tile * fours * 64;
    const uint8_t *x = j->codes + row * j->stride;
    __m512i acc[MAX_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int w = 0; w < width; w++) acc[r][w] = _mm512_setzero_si512();
    for (int64_t k = 0; k < fours; k++) {
        __m512i weight[2];
        UNROLL for (int w = 0; w < width; w++)
            weight[w] = _mm512_loadu_si512(codes + (w * fours + k) * 64);
        UNROLL for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * j->stride + 4 * k, 4);
            __m512i value = _mm512_set1_epi32(four);
            UNROLL for (int w = 0; w < width; w++)
                acc[r][w] = _mm512_dpbusd_epi32(acc[r][w], value, weight[w]);
        }
    }
    UNROLL for (int w = 0; w < width; w++) {
        int64_t at = (tile + w) * LANES, left = l->num_out - at;
        __mmask16 lanes = left < LANES ? (1u << left) - 1 : 0xffff;
        __m512i sums = _mm512_loadu_si512(l->sums + at);
        __m512 scales = _mm512_loadu_ps(l->scales + at);
        UNROLL for (int r = 0; r < rows; r++) {
            __m512 scale = _mm512_mul_ps(_mm512_set1_ps(j->largest[row + r]), scales);
            __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][w], sums)), scale);
            y = rounded(_mm512_mul_ps(y, _mm512_set1_ps(SCALE)));
            if (l->bias) y = _mm512_add_ps(y, _mm512_loadu_ps(l->bias + at));
            _mm512_mask_storeu_ps(to + r * to_stride + w * LANES, lanes, y);
        }
    }
}

static __attribute__((noinline)) void multiply_rows(const linear *l, int64_t tile, const job *j,
                                                    int64_t row, int rows, int width, float *to,
                                                    int64_t to_stride) {
#define CASE(R) \
    case R: \
        if (width == 2) multiply_block(l, tile, j, row, R, 2, to, to_stride); \
        else multiply_block(l, tile, j, row, R, 1, to, to_stride); \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        CASE(7) CASE(8)
    }
#undef CASE
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

/* y [T, N], without what outliers add, from x [T, K]. `codes` holds T * (K + 128) bytes, `largest`
 * T floats, `is_out` K bytes. Returns how many of K channels hold outliers, whose numbers it writes
 * to `columns` [K]; or -1 where something is not finite in FP16, and then y is of no use. */
int64_t multiply_int8(const product *p, const float *x, int64_t rows, uint8_t *codes, float *largest,
                      uint8_t *is_out, int64_t *columns, float *y, int64_t threads) {
    int is_odd = 0;
    int64_t num_in = p->parts[0].num_in, num_out = 0, found = 0;
    for (int i = 0; i < p->num_parts; i++) num_out += p->parts[i].num_out;
    /* An odd number of cache lines: rows 4 KiB apart would share a few places of the cache. */
    int64_t stride = ((num_in + 63) / 64 | 1) * 64;
    job j = {p, x, codes, largest, is_out, y, rows, num_in, num_out, stride, &is_odd};
    memset(is_out, 0, num_in);
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
    const int64_t num_in = p->parts[0].num_in, fours = (num_in + 3) / 4;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i++) picked[r * n + i] = x[r * num_in + columns[i]];
    for (int part = 0; part < p->num_parts; part++) {
        const linear *l = p->parts + part;
        for (int64_t at = 0; at < l->num_out; at += LANES) {
            const int8_t *tile = l->codes + at * fours * 4;
            const __m512 scales = _mm512_loadu_ps(l->scales + at);
            int64_t left = l->num_out - at < LANES ? l->num_out - at : LANES;
            for (int64_t i = 0; i < n; i++) {
                float found[LANES];
                __m512i four = _mm512_loadu_si512(tile + columns[i] / 4 * 64);
                four = _mm512_sll_epi32(four, _mm_cvtsi32_si128(24 - columns[i] % 4 * 8));
                __m512 w = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(four, 24)), scales);
                _mm512_storeu_ps(found, _mm512_mul_ps(w, _mm512_set1_ps(INVERSE)));
                for (int64_t o = 0; o < left; o++) weights[o * n + i] = found[o];
            }
            weights += left * n;
        }
        weights = (float *)(((uintptr_t)weights + 63) / 64 * 64);
    }
}

int64_t has_vnni(void) { return 1; }
#else
int64_t has_vnni(void) { return 0; }
#endif
