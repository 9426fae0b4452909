/* Linears over 4- and 8-bit codes on a CPU, in FP32: y = x W^T + b, W expanded where it is used.
 *
 * Each output is one sum in the order of the input channels, whatever the number of rows and
 * threads, so a result does not depend on batch mates. Called by quantized.py. K input channels, N
 * output channels; codes.h says how codes lie and what they mean.
 */
#include "codes.h"

#define CHUNK 128   /* input channels that are expanded at once: 16 KiB for two tiles */
#define GROUPS 8    /* groups whose scales are expanded at once */
/* Up to DIRECT rows weights go from their codes into the sums of WIDTH tiles; of more rows MAX_ROWS
 * at a time are multiplied with expanded weights of two tiles. Sums have to fit into registers. */
#if LANES == 16
#define DIRECT 8
#define WIDTH(ROWS) ((ROWS) <= 4 ? 4 : 2)
#define MAX_ROWS 12
#define FEW_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#define SOME_ROWS(X) FEW_ROWS(X) X(9) X(10) X(11) X(12)
#else
#define DIRECT 4
#define WIDTH(ROWS) ((ROWS) <= 2 ? 4 : 2)
#define MAX_ROWS 6
#define FEW_ROWS(X) X(1) X(2) X(3) X(4)
#define SOME_ROWS(X) FEW_ROWS(X) X(5) X(6)
#endif
#define PASS 96     /* rows for which weights are expanded once */
/* Below so many products of a weight and a row, expanding counted as four, one thread is faster. */
#define MIN_PRODUCTS 1048576

/* sums [rows, width, L] += rows of x times a group of channels, weights going from their codes
 * into the sums. x begins at the group. */
INLINE void multiply_group(const column *c, int64_t first, int64_t n, const float *x,
                           int64_t stride, const int rows, const int width, const int is_packed,
                           const float *scale, const float *shift, float *sums) {
    const float *table = c[0].of->values;
    const ints *words[4];
    vec acc[DIRECT][4];
    UNROLL for (int w = 0; w < width; w++) words[w] = words_of(c[w], first / 8, is_packed);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int w = 0; w < width; w++) acc[r][w] = load(sums + (r * width + w) * LANES);
    for (int64_t k = 0; k < n; k += 8) {
        UNROLL for (int j = 0; j < 8; j++) {
            vec weight[4];
            UNROLL for (int w = 0; w < width; w++) weight[w] =
                weight_of(words[w], j, is_packed, table, load(scale + w * GROUPS * LANES),
                          load(shift + w * GROUPS * LANES));
            UNROLL for (int r = 0; r < rows; r++) {
                vec value = all(x[r * stride + k + j]);
                UNROLL for (int w = 0; w < width; w++) acc[r][w] += value * weight[w];
            }
        }
        UNROLL for (int w = 0; w < width; w++) words[w] += is_packed ? 1 : 2;
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int w = 0; w < width; w++) store(sums + (r * width + w) * LANES, acc[r][w]);
}

/* sums [rows, width, L] of rows of x. */
INLINE void multiply_direct(const column *c, const float *x, int64_t stride, const int rows,
                            const int width, const int is_packed, float *sums) {
    float scale[4 * GROUPS * LANES] __attribute__((aligned(64)));
    float shift[4 * GROUPS * LANES] __attribute__((aligned(64)));
    const int64_t group = c[0].of->group, groups = c[0].of->num_groups;
    memset(sums, 0, sizeof(float) * rows * width * LANES);
    for (int64_t first = 0; first < groups; first += GROUPS) {
        int64_t n = groups - first < GROUPS ? groups - first : GROUPS;
        for (int w = 0; w < width; w++)
            expand_scales(c[w].of, c[w].tile, first, n, scale + w * GROUPS * LANES,
                          shift + w * GROUPS * LANES);
        for (int64_t g = 0; g < n; g++)
            multiply_group(c, (first + g) * group, group, x + (first + g) * group, stride, rows,
                           width, is_packed, scale + g * LANES, shift + g * LANES, sums);
    }
}

/* weights [n, 2, L] of two columns, from channel `first`. */
INLINE void expand_chunk(const column *c, int64_t first, int64_t n, const int is_packed,
                         float *weights) {
    float scale[CHUNK / 8 * LANES] __attribute__((aligned(64)));
    float shift[CHUNK / 8 * LANES] __attribute__((aligned(64)));
    const int64_t group = c[0].of->group;
    const float *table = c[0].of->values;
    for (int w = 0; w < 2; w++) {
        const ints *words = words_of(c[w], first / 8, is_packed);
        float *to = weights + w * LANES;
        int64_t g = first / group;
        expand_scales(c[w].of, c[w].tile, g, (first + n - 1) / group - g + 1, scale, shift);
        for (int64_t k = first, at = 0; k < first + n; at += LANES) {
            int64_t end = (++g) * group < first + n ? g * group : first + n;
            vec s = load(scale + at), t = load(shift + at);
            for (; k < end; k += 8, words += is_packed ? 1 : 2, to += 8 * 2 * LANES)
                UNROLL for (int j = 0; j < 8; j++)
                    store(to + j * 2 * LANES, weight_of(words, j, is_packed, table, s, t));
        }
    }
}

/* sums [rows, 2, L] += rows of x [n] times weights [n, 2, L]. */
INLINE void multiply_rows(const float *x, int64_t stride, const float *weights, int64_t n,
                          const int rows, float *sums) {
    vec acc[MAX_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int w = 0; w < 2; w++) acc[r][w] = load(sums + (r * 2 + w) * LANES);
    for (int64_t k = 0; k < n; k++) {
        vec first = load(weights + k * 2 * LANES), second = load(weights + (k * 2 + 1) * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            vec value = all(x[r * stride + k]);
            acc[r][0] += value * first;
            acc[r][1] += value * second;
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int w = 0; w < 2; w++) store(sums + (r * 2 + w) * LANES, acc[r][w]);
}

/* One to three Linears over one input, outputs one after another; or, where `is_gated`, two of one
 * shape and silu(first) * second. They agree in channels, groups and bits. */
typedef struct {
    linear parts[3];
    int64_t num_parts, is_gated;
    const int64_t *order; /* [K], which channel of x comes where; null for as they are */
} product;

INLINE int64_t num_tiles(const linear *l) { return (l->num_out + LANES - 1) / LANES; }

static int64_t num_units(const product *p, int width) {
    int64_t units = 0;
    for (int i = 0; i < (p->is_gated ? 1 : p->num_parts); i++) {
        int each = p->is_gated ? width / 2 : width;
        units += (num_tiles(&p->parts[i]) + each - 1) / each;
    }
    return units;
}

/* The columns of a unit, of which `valid` are to be stored from output channel `at` on; the rest
 * repeats the last. */
typedef struct {
    column columns[4];
    int valid;
    int64_t at;
} unit;

static unit find_unit(const product *p, int64_t index, int width) {
    unit u = {.at = 0};
    int part = 0, step = p->is_gated ? 2 : 1, each = width / step;
    int64_t units;
    while (index >= (units = (num_tiles(&p->parts[part]) + each - 1) / each)) {
        u.at += p->parts[part++].num_out;
        index -= units;
    }
    int64_t tiles = num_tiles(&p->parts[part]), first = index * each;
    u.at += first * LANES;
    u.valid = tiles - first < each ? tiles - first : each;
    for (int w = 0; w < width; w++) {
        int64_t tile = first + w / step < tiles ? first + w / step : tiles - 1;
        u.columns[w] = (column){&p->parts[part + w % step], tile};
    }
    return u;
}

/* silu(x) = x / (1 + exp(-x)), by exp of what is not positive: 0 far below, NaN stays NaN. */
INLINE vec silu(vec x) {
    ints is_negative = x < (vec){0};
    vec e = exponential((vec)((ints)x | (ints)all(-0.0f))); /* of -|x| */
    return x * choose(is_negative, e, all(1.0f)) / (1.0f + e);
}

INLINE vec biased(column c, vec sum) {
    return c.of->bias ? sum + load(c.of->bias + c.tile * LANES) : sum;
}

/* y [rows, num_out] from sums [rows, width, L] of a unit, or that much more where `is_added`. */
static void finish(const product *p, const unit *u, const float *sums, int64_t rows, int width,
                   int64_t num_out, float *y, int is_added) {
    for (int64_t r = 0; r < rows; r++)
        for (int i = 0; i < u->valid; i++) {
            const float *from = sums + r * width * LANES;
            column c = u->columns[p->is_gated ? 2 * i : i];
            vec result;
            if (p->is_gated)
                result = silu(biased(c, load(from + 2 * i * LANES))) *
                         biased(u->columns[2 * i + 1], load(from + (2 * i + 1) * LANES));
            else
                result = biased(c, load(from + i * LANES));
            float *to = y + r * num_out + u->at + i * LANES;
            int64_t left = c.of->num_out - c.tile * LANES;
            if (left >= LANES)
                store(to, is_added ? load(to) + result : result);
            else
                for (int64_t o = 0; o < left; o++) to[o] = is_added ? to[o] + result[o] : result[o];
        }
}

static __attribute__((noinline)) void multiply_few(const column *c, const float *x, int64_t stride,
                                                   int rows, int is_packed, float *sums) {
    switch (rows * 2 + is_packed) {
#define CASE(R) \
    case 2 * R: multiply_direct(c, x, stride, R, WIDTH(R), 0, sums); break; \
    case 2 * R + 1: multiply_direct(c, x, stride, R, WIDTH(R), 1, sums); break;
        FEW_ROWS(CASE)
#undef CASE
    }
}

static __attribute__((noinline)) void expand(const column *c, int64_t first, int64_t n,
                                             float *weights) {
    if (c[0].of->values)
        expand_chunk(c, first, n, 1, weights);
    else
        expand_chunk(c, first, n, 0, weights);
}

static void multiply_block(const float *x, const float *weights, int64_t n, int rows, float *sums) {
    switch (rows) {
#define CASE(R) \
    case R: multiply_rows(x, CHUNK, weights, n, R, sums); break;
        SOME_ROWS(CASE)
#undef CASE
    }
}

/* What a call works on; every thread of a team takes its part of it. */
typedef struct {
    const product *p;
    const float *x;
    float *scratch, *y;
    int64_t rows, num_in, num_out;
    int is_added; /* whether y grows by the product */
} job;

static void few_rows(const job *j) {
    const int is_packed = j->p->parts[0].values != 0;
    if (j->p->order) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < j->rows * j->num_in; i++)
            j->scratch[i] = j->x[i / j->num_in * j->num_in + j->p->order[i % j->num_in]];
    }
    const float *x = j->p->order ? j->scratch : j->x;
    const int width = WIDTH(j->rows);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_units(j->p, width); i++) {
        float sums[DIRECT * 4 * LANES] __attribute__((aligned(64)));
        unit u = find_unit(j->p, i, width);
        multiply_few(u.columns, x, j->num_in, j->rows, is_packed, sums);
        finish(j->p, &u, sums, j->rows, width, j->num_out, j->y, j->is_added);
    }
}

static void many_rows(const job *j) {
    const int64_t num_in = j->num_in, chunks = (num_in + CHUNK - 1) / CHUNK;
    /* [chunks, rows, CHUNK]: in x itself rows may lie 4 KiB apart, which few caches hold. */
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks * j->rows; i++) {
        int64_t first = i / j->rows * CHUNK, n = num_in - first < CHUNK ? num_in - first : CHUNK;
        const float *from = j->x + i % j->rows * num_in;
        float *to = j->scratch + i * CHUNK;
        if (j->p->order)
            for (int64_t k = 0; k < n; k++) to[k] = from[j->p->order[first + k]];
        else
            memcpy(to, from + first, sizeof(float) * n);
    }
    const int64_t passes = (j->rows + PASS - 1) / PASS, units = num_units(j->p, 2);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < passes * units; i++) {
        float sums[PASS * 2 * LANES] __attribute__((aligned(64)));
        float weights[CHUNK * 2 * LANES] __attribute__((aligned(64)));
        unit u = find_unit(j->p, i % units, 2);
        int64_t start = i / units * PASS;
        int64_t rows = j->rows - start < PASS ? j->rows - start : PASS;
        int64_t blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
        memset(sums, 0, sizeof(float) * rows * 2 * LANES);
        for (int64_t c = 0; c < chunks; c++) {
            int64_t first = c * CHUNK, n = num_in - first < CHUNK ? num_in - first : CHUNK;
            expand(u.columns, first, n, weights);
            const float *x = j->scratch + (c * j->rows + start) * CHUNK;
            for (int64_t b = 0; b < blocks; b++) {
                int64_t from = b * rows / blocks, to = (b + 1) * rows / blocks;
                multiply_block(x + from * CHUNK, weights, n, to - from, sums + from * 2 * LANES);
            }
        }
        finish(j->p, &u, sums, rows, 2, j->num_out, j->y + start * j->num_out,
               j->is_added);
    }
}

/* The part of a thread in y [rows, num_out], which it sets or, where `is_added`, adds to. Every
 * thread of a team calls this and goes on when all are done; x may be its own copy. `scratch` is the
 * team's, of rows * (K rounded up to 128) floats. */
void coded_part(const void *codes, const float *x, int64_t rows, float *scratch, float *y,
                int is_added) {
    const product *p = codes;
    int64_t num_out = 0;
    for (int i = 0; i < (p->is_gated ? 1 : p->num_parts); i++) num_out += p->parts[i].num_out;
    job j = {p, x, scratch, y, rows, p->parts[0].num_in, num_out, is_added};
    if (rows <= DIRECT)
        few_rows(&j);
    else
        many_rows(&j);
}

/* Up to so many rows x is read where it lies, unless it has an order. */
const int64_t direct_rows = DIRECT;
const int64_t lanes = LANES;

/* y [rows, num_out] from x [rows, K], both contiguous. `scratch` as above, where it is needed. */
void multiply_codes(const product *p, const float *x, int64_t rows, float *scratch, float *y,
                    int64_t threads) {
    int64_t products = p->parts[0].num_in * p->parts[0].num_out * p->num_parts * (rows + 4);
    if (products < MIN_PRODUCTS) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    coded_part(p, x, rows, scratch, y, 0);
}
