/* What lies between the Linears of a Llama-like layer on a CPU, in FP32: norms, rotation, attention.
 *
 * Attention reads keys and values where they lie in their pages. A page holds 16 tokens, which are
 * the lanes of one vector, or of some; decodes and chunks of prompts are the same to it. The order of
 * every sum depends on the token alone, so a result does not depend on batch mates or on threads.
 *
 * T tokens of the step, N query heads, K key heads, G = N / K, D head dim (a multiple of 16).
 * Keys and values of a layer are [pages, K, 16, D]. Called by layer.py.
 */
#include "layer.h"
#include "rows.h"

#define TILE 256     /* tokens whose scores are held at once */
#define MAX_DIM 256  /* layer.py knows it, too */
/* Rows that four vectors of values are added to at once: sums have to fit into registers. */
#if LANES == 16
#define MIXED_ROWS 4
#else
#define MIXED_ROWS 2
#endif
/* Below so much work one thread is faster: a team costs some microseconds, and far more where the
 * other core is busy. Channels of a norm or rotation; pairs of query and key, each of all heads. */
#define MIN_CHANNELS 32768
#define MIN_PAIRS 1024

/* Lanes of two vectors a and b, lane i of b being LANES + i: every other run of 8, 4, 2 lanes or 1
 * from a, the rest from b; and the lanes of one vector with neighbouring runs exchanged. */
#if LANES == 16
#define BLEND_8 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31
#define BLEND_4 0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31
#define BLEND_2 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31
#define BLEND_1 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31
#define SWAP_8 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7
#define SWAP_4 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11
#define SWAP_2 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13
#define SWAP_1 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#define EACH_RUN(X) X(8) X(4) X(2) X(1)
#elif LANES == 8
#define BLEND_4 0, 1, 2, 3, 12, 13, 14, 15
#define BLEND_2 0, 1, 10, 11, 4, 5, 14, 15
#define BLEND_1 0, 9, 2, 11, 4, 13, 6, 15
#define SWAP_4 4, 5, 6, 7, 0, 1, 2, 3
#define SWAP_2 2, 3, 0, 1, 6, 7, 4, 5
#define SWAP_1 1, 0, 3, 2, 5, 4, 7, 6
#define EACH_RUN(X) X(4) X(2) X(1)
#else
#define BLEND_2 0, 1, 6, 7
#define BLEND_1 0, 5, 2, 7
#define SWAP_2 2, 3, 0, 1
#define SWAP_1 1, 0, 3, 2
#define EACH_RUN(X) X(2) X(1)
#endif
#define LANES_OF __builtin_shufflevector

/* Both halves of each run of a in the place of the first one, of b in the place of the second. */
#define ADD_HALVES(n, a, b)                                                                  \
    (LANES_OF(a, b, BLEND_##n) +                                                             \
     LANES_OF(LANES_OF(b, a, BLEND_##n), LANES_OF(b, a, BLEND_##n), SWAP_##n))

/* The sums of LANES vectors, one in each lane. */
INLINE vec sums(vec *x) {
#define ADD_RUN(n) for (int i = 0; i < n; i++) x[i] = ADD_HALVES(n, x[i], x[i + n]);
    EACH_RUN(ADD_RUN)
    return x[0];
}

INLINE vec larger(vec x, vec y) { return choose(x > y, x, y); }

INLINE float largest(vec x) {
#define LARGER_RUN(n) x = larger(x, LANES_OF(x, x, SWAP_##n));
    EACH_RUN(LARGER_RUN)
    return x[0];
}

INLINE float add_lanes(vec x) {
#define ADD_SWAPPED(n) x += LANES_OF(x, x, SWAP_##n);
    EACH_RUN(ADD_SWAPPED)
    return x[0];
}

/* scores[t] = scale * q . page[t] for the 16 tokens of a page of keys. */
INLINE void score_page(const float *q, const float *page, int dim, float scale, float *scores) {
    for (int first = 0; first < PAGE; first += LANES, page += LANES * dim) {
        vec x[LANES];
        vec part = load(q);
        UNROLL for (int t = 0; t < LANES; t++) x[t] = part * load(page + t * dim);
        for (int d = LANES; d < dim; d += LANES) {
            part = load(q + d);
            UNROLL for (int t = 0; t < LANES; t++) x[t] += part * load(page + t * dim + d);
        }
        store(scores + first, sums(x) * scale);
    }
}

/* sums[r] += sum over n tokens of weights[r][t] * page[t], for `width` vectors of `rows` rows. */
INLINE void mix_tokens(const float *weights, const float *page, int n, int dim, int rows, int width,
                       vec sums[MIXED_ROWS][4], const float *next, const int fetches) {
    for (int t = 0; t < n; t++) {
        vec value[4];
        for (int w = 0; w < width; w++) value[w] = load(page + t * dim + w * LANES);
        if (fetches)
            for (int i = 0; i < width * LANES; i += LINE)
                __builtin_prefetch(next + t * dim + i, 0, 2);
        for (int r = 0; r < rows; r++)
            for (int w = 0; w < width; w++) sums[r][w] += weights[r * TILE + t] * value[w];
    }
}

/* Adds to `out` what mix_tokens sums up; as much as is read of the page is asked for of `next`, if
 * there is one. */
INLINE void mix_block(const float *weights, const float *page, const float *next, int n, int dim,
                      int rows, int width, float *out) {
    vec acc[MIXED_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < width; w++) acc[r][w] = load(out + r * dim + w * LANES);
    if (next)
        mix_tokens(weights, page, n, dim, rows, width, acc, next, 1);
    else
        mix_tokens(weights, page, n, dim, rows, width, acc, 0, 0);
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < width; w++) store(out + r * dim + w * LANES, acc[r][w]);
}

INLINE void mix_page(const float *weights, int rows, const float *page, const float *next, int n,
                     int dim, float *out) {
    int d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) {
        const float *ahead = next ? next + d : 0;
        int r = 0;
#if MIXED_ROWS == 4
        for (; r + 4 <= rows; r += 4, ahead = 0)
            mix_block(weights + r * TILE, page + d, ahead, n, dim, 4, 4, out + r * dim + d);
#endif
        for (; r + 2 <= rows; r += 2, ahead = 0)
            mix_block(weights + r * TILE, page + d, ahead, n, dim, 2, 4, out + r * dim + d);
        for (; r < rows; r++, ahead = 0)
            mix_block(weights + r * TILE, page + d, ahead, n, dim, 1, 4, out + r * dim + d);
    }
    for (; d < dim; d += LANES)
        for (int r = 0; r < rows; r++)
            mix_block(weights + r * TILE, page + d, r || !next ? 0 : next + d, n, dim, 1, 1,
                      out + r * dim + d);
}

/* The scores of a row over `pages` pages become weights; returns their sum, and the most seen. */
INLINE float soften(float *scores, int pages, float *most) {
    const int count = pages * PAGE;
    vec high = load(scores);
    for (int i = LANES; i < count; i += LANES) {
        vec x = load(scores + i);
        high = larger(x, high);
    }
    float now = largest(high);
    *most = now > *most ? now : *most;
    vec total = (vec){0};
    for (int i = 0; i < count; i += LANES) {
        vec weight = exponential(load(scores + i) - *most);
        store(scores + i, weight);
        total += weight;
    }
    return add_lanes(total);
}

typedef struct {
    const float *keys, *values;
    int64_t page_stride;
    int group, dim;
    float scale;
} cache_view;

/* Asks for numbers that are soon read. The next page of a sequence lies anywhere, where the CPU does
 * not look by itself. */
INLINE void fetch(const float *from, int count) {
    for (int i = 0; i < count; i += LINE) __builtin_prefetch(from + i, 0, 2);
}

/* Tokens `first` to `first + count` of one sequence, with `heads` neighbouring key heads. */
INLINE void attend_block(cache_view kv, const float *query, int64_t query_stride, float *output,
                         int64_t output_stride, int count, int first, int heads,
                         const int32_t *pages, const int dim) {
    float scores[MAX_ROWS * TILE] __attribute__((aligned(64)));
    float q[MAX_ROWS * MAX_DIM] __attribute__((aligned(64)));
    float out[MAX_ROWS * MAX_DIM] __attribute__((aligned(64)));
    float most[MAX_ROWS], total[MAX_ROWS];
    /* A row is (key head, token, query head of the group). */
    const int group = kv.group, per_head = count * group, rows = per_head * heads;
    const int length = first + count;
    for (int r = 0; r < rows; r++) {
        int k = r / per_head, i = r % per_head;
        const float *from = query + (i / group) * query_stride + (k * group + i % group) * dim;
        memcpy(q + r * dim, from, sizeof(float) * dim);
        memset(out + r * dim, 0, sizeof(float) * dim);
        most[r] = -INFINITY;
        total[r] = 0;
    }
    for (int start = 0; start < length; start += TILE) {
        int end = start + TILE < length ? start + TILE : length;
        int num_pages = (end - start + PAGE - 1) / PAGE;
        const int32_t *at = pages + start / PAGE;
        /* All heads of a page, then the next page: memory is read in long runs. Behind the last
         * page of keys comes the first one of values. */
        for (int p = 0; p < num_pages; p++) {
            const float *page = kv.keys + at[p] * kv.page_stride;
            const float *next = p + 1 < num_pages ? kv.keys + at[p + 1] * kv.page_stride
                                                  : kv.values + at[0] * kv.page_stride;
            for (int r = 0; r < rows; r++) {
                int64_t head = r / per_head * PAGE * dim;
                if (r % per_head == 0) fetch(next + head, PAGE * dim);
                score_page(q + r * dim, page + head, dim, kv.scale,
                           scores + r * TILE + p * PAGE);
            }
        }
        for (int r = 0; r < rows; r++) {
            float before = most[r];
            int seen = first + (r % per_head) / group + 1 - start;
            for (int t = seen > 0 ? seen : 0; t < num_pages * PAGE; t++)
                scores[r * TILE + t] = -INFINITY;
            float added = soften(scores + r * TILE, num_pages, &most[r]);
            if (start > 0) {
                float fade = expf(before - most[r]);
                total[r] *= fade;
                for (int d = 0; d < dim; d++) out[r * dim + d] *= fade;
            }
            total[r] += added;
        }
        for (int p = 0; p < num_pages; p++) {
            /* Slots behind the last token are not read: what lies there may be no number. */
            int n = end - start - p * PAGE < PAGE ? end - start - p * PAGE : PAGE;
            for (int k = 0; k < heads; k++) {
                const float *values = kv.values + k * PAGE * dim;
                const float *next = p + 1 < num_pages ? values + at[p + 1] * kv.page_stride : 0;
                mix_page(scores + k * per_head * TILE + p * PAGE, per_head,
                         values + at[p] * kv.page_stride, next, n, dim, out + k * per_head * dim);
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        int k = r / per_head, i = r % per_head;
        float share = 1.0f / total[r];
        float *to = output + (i / group) * output_stride + (k * group + i % group) * dim;
        for (int d = 0; d < dim; d++) to[d] = out[r * dim + d] * share;
    }
}

/* How many key heads a block reads together: as many as have room, if threads stay busy. */
static int heads_together(int count, int group, int kv_heads, int64_t num_blocks, int threads) {
    int heads = num_blocks < 2 * threads ? 1 : kv_heads;
    while (heads > 1 && (heads * count * group > MAX_ROWS || kv_heads % heads != 0)) heads--;
    return heads;
}

void write_part(const attention *a) {
    const int64_t dim = a->dim, kv_heads = a->kv_heads, stride = a->stride;
    const int64_t page_stride = kv_heads * PAGE * dim;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a->tokens; t++) {
        int64_t at = a->slots[t] / PAGE * page_stride + a->slots[t] % PAGE * dim;
        for (int64_t k = 0; k < kv_heads; k++, at += PAGE * dim) {
            memcpy(a->keys + at, a->key + t * stride + k * dim, sizeof(float) * dim);
            memcpy(a->values + at, a->value + t * stride + k * dim, sizeof(float) * dim);
        }
    }
}

void attend_part(const attention *a) {
    const int64_t dim = a->dim, kv_heads = a->kv_heads, stride = a->stride;
    const int64_t page_stride = kv_heads * PAGE * dim, output_stride = a->num_heads * dim;
    const int group = a->num_heads / kv_heads;
#pragma omp for schedule(dynamic, 1)
    /* From the last one, the longest of the decodes: so no thread waits long for the others. */
    for (int64_t i = a->num_blocks * kv_heads - 1; i >= 0; i--) {
        block b = a->blocks[i / kv_heads];
        int64_t k = i % kv_heads;
        int heads = heads_together(b.count, group, kv_heads, a->num_blocks, a->threads);
        if (k % heads != 0 || (a->is_read && !memchr(a->is_read + b.token, 1, b.count))) continue;
        cache_view kv = {a->keys + k * PAGE * dim, a->values + k * PAGE * dim, page_stride,
                         group, dim, a->scale};
        const float *from = a->query + b.token * stride + k * group * dim;
        float *to = a->output + b.token * output_stride + k * group * dim;
        const int32_t *pages = a->pages + b.pages;
        /* A constant head dim keeps the sums in registers. */
        if (dim == 64)
            attend_block(kv, from, stride, to, output_stride, b.count, b.first, heads, pages, 64);
        else if (dim == 128)
            attend_block(kv, from, stride, to, output_stride, b.count, b.first, heads, pages, 128);
        else
            attend_block(kv, from, stride, to, output_stride, b.count, b.first, heads, pages, dim);
    }
}

/* Store key and value of each token in its slot (page * 16 + offset), then attend.
 * query, key and value are [T, heads, D] with `stride` floats from token to token; output is
 * [T, N, D], contiguous. */
void attend(const float *query, const float *key, const float *value, int64_t stride,
            float *output, int64_t tokens, int64_t num_heads, int64_t kv_heads, int64_t dim,
            float *keys, float *values, const int64_t *slots, const int32_t *pages,
            const block *blocks, int64_t num_blocks, float scale, int64_t threads) {
    int64_t pairs = 0;
    for (int64_t i = 0; i < num_blocks && pairs < MIN_PAIRS; i++)
        pairs += (int64_t)blocks[i].count * (blocks[i].first + blocks[i].count);
    if (pairs < MIN_PAIRS) threads = 1;
    attention a = {query, key,  value,  stride, output, tokens, num_heads,  kv_heads, dim,
                   keys,  values, slots, pages,  blocks, num_blocks, scale, threads};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        write_part(&a);
        attend_part(&a);
    }
}

/* As rotate_heads, for channels 2i and 2i + 1. */
static void rotate_pairs(float *head, int64_t heads, int64_t dim, const float *cos,
                         const float *sin) {
    for (int64_t h = 0; h < heads; h++, head += dim)
        for (int64_t i = 0; i < dim / 2; i++) {
            float a = head[2 * i], b = head[2 * i + 1];
            head[2 * i] = a * cos[i] - b * sin[i];
            head[2 * i + 1] = b * cos[i] + a * sin[i];
        }
}

static void rotate_part(float *x, int64_t stride, const float *cos, const float *sin,
                        int64_t angles, int64_t tokens, int64_t heads, int64_t dim,
                        int64_t paired) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cos + t * angles, *s = sin + t * angles;
        if (paired)
            rotate_pairs(x + t * stride, heads, dim, c, s);
        else
            rotate_heads(x + t * stride, heads, dim, c, s);
    }
}

/* Rotate the first `heads` heads of x [T, heads or more, D] in place: channels 2i and 2i + 1 where
 * `paired`, else i and i + D / 2. cos and sin have D / 2 angles for each token, `angles` apart. */
void rotate(float *x, int64_t stride, const float *cos, const float *sin, int64_t angles,
            int64_t tokens, int64_t heads, int64_t dim, int64_t paired, int64_t threads) {
    if (threads == 1 || tokens * heads * dim <= MIN_CHANNELS) {
        rotate_part(x, stride, cos, sin, angles, tokens, heads, dim, paired);
        return;
    }
#pragma omp parallel num_threads(threads)
    rotate_part(x, stride, cos, sin, angles, tokens, heads, dim, paired);
}

static void add_norm_part(float *hidden, const float *delta, const float *weight, float *normed,
                          int64_t tokens, int64_t width, float eps) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        norm_row(hidden + t * width, delta ? delta + t * width : 0, weight, normed + t * width,
                 width, eps);
}

/* hidden += delta, where there is one; normed = hidden / rms(hidden) * weight. All [T, width]. */
void add_norm(float *hidden, const float *delta, const float *weight, float *normed,
              int64_t tokens, int64_t width, float eps, int64_t threads) {
    if (threads == 1 || tokens * width <= MIN_CHANNELS) {
        add_norm_part(hidden, delta, weight, normed, tokens, width, eps);
        return;
    }
#pragma omp parallel num_threads(threads)
    add_norm_part(hidden, delta, weight, normed, tokens, width, eps);
}
