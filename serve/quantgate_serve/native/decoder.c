/* A Llama-like decoder over the tokens of a step, from ids to logits, by one team of threads.
 *
 * One team for all of it: between two teams the other threads fall asleep, and waking them takes as
 * long as a norm. Norms are computed by each thread for itself: that takes less time than waiting
 * for a share of them. Linears are plain or codes. Of the last layer, what follows attention is
 * computed for the rows alone that are read.
 */
#include "layer.h"
#include "rows.h"

#include <omp.h>
#include <time.h>

typedef struct {
    const float *input_norm, *post_norm;
    linear qkv, output, gate_up, down;
    const void *codes[4]; /* the same as codes; null where weights are plain */
} layer;

enum { QKV, OUTPUT, GATE_UP, DOWN };

typedef struct {
    const layer *layers;
    int64_t num_layers, num_heads, kv_heads, dim, hidden;
    float eps, scale;
    const float *last_norm;
    linear head;
} decoder;

/* T tokens in chunks, one after another. A chunk is three numbers: the row of `table` with its
 * sequence's pages, the position of its first token, and how many it has. `ids` are the tokens' rows
 * of `embedding`; cos and sin have D / 2 angles in a row, for each position, or for each token. */
typedef struct {
    const float *embedding;
    int64_t num_embeddings;
    const float *cos, *sin;
    int64_t num_angles, are_by_token;
    const int64_t *ids;
    int64_t tokens;
    const int64_t *chunks;
    int64_t num_chunks;
    const int32_t *table;
    int64_t table_width;
    const int64_t *rows;
    int64_t num_rows;
    float *const *keys, *const *values;
    /* Room to work in, with T the larger of tokens and num_rows: [T, C], [T, N + 2 K, D], [T, N, D],
     * [T, intermediate size], [threads, T, C]; for codes [T, largest number of inputs, in multiples
     * of 128]; [T] each. */
    float *hidden, *qkv, *mixed, *middle, *normed, *scratch;
    int64_t *slots, *turns;
    block *blocks;
    uint8_t *is_read;
    /* The results: [num_rows, C], the hidden states of `rows` after the last norm, and, where logits
     * are not null, instead of them [num_rows, vocabulary], each row's largest, the first of equals,
     * and whether none is NaN and all of these are finite. */
    float *read, *logits;
    int64_t *best, is_finite;
} step;

/* What a step's nanoseconds are counted as, by the first thread. */
enum { EMBEDDING, LINEARS, NORMS, ROTATION, ATTENTION, LOGITS };

/* The CPU time of a thread that works alone, else the wall's. */
static int64_t now_ns(int64_t threads) {
    struct timespec t;
    clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
}

static void norm(float *x, const float *weight, float *to, int64_t tokens, int64_t width,
                 float eps) {
    for (int64_t t = 0; t < tokens; t++)
        norm_row(x + t * width, 0, weight, to + t * width, width, eps);
}

/* Slots, angles and blocks of the step's tokens; how many blocks, or the error. */
enum { NO_EMBEDDING = -1, NO_ANGLES = -2 };
static int64_t lay_out(const decoder *d, const step *s) {
    const int64_t most = MAX_ROWS * d->kv_heads / d->num_heads;
    /* Long chunks are cut, so that all threads share them. */
    const int64_t size = most < 1 ? 1 : most < PAGE ? most : PAGE;
    int64_t t = 0, count = 0;
    for (int64_t c = 0; c < s->num_chunks; c++) {
        const int64_t *chunk = s->chunks + 3 * c;
        const int64_t pages = chunk[0] * s->table_width, first = chunk[1], length = chunk[2];
        if (!s->are_by_token && first + length > s->num_angles) return NO_ANGLES;
        for (int64_t i = 0; i < length; i += size) {
            int64_t left = length - i;
            s->blocks[count++] = (block){t + i, left < size ? left : size, first + i, pages};
        }
        for (int64_t p = first; p < first + length; p++, t++) {
            s->slots[t] = (int64_t)s->table[pages + p / PAGE] * PAGE + p % PAGE;
            s->turns[t] = s->are_by_token ? t : p;
            if (s->ids[t] < 0 || s->ids[t] >= s->num_embeddings) return NO_EMBEDDING;
        }
    }
    memset(s->is_read, 0, s->tokens);
    for (int64_t r = 0; r < s->num_rows; r++) s->is_read[s->rows[r]] = 1;
    return count;
}

static void embed(const decoder *d, const step *s) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < s->tokens; t++)
        memcpy(s->hidden + t * d->hidden, s->embedding + s->ids[t] * d->hidden,
               sizeof(float) * d->hidden);
}

/* Rotate query and key. */
static void rotate_rows(const decoder *d, const step *s) {
    const int64_t half = d->dim / 2, stride = (d->num_heads + 2 * d->kv_heads) * d->dim;
    /* Shared out as the rows of write_part are, which need not wait therefore. */
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < s->tokens; t++)
        rotate_heads(s->qkv + t * stride, d->num_heads + d->kv_heads, d->dim,
                     s->cos + s->turns[t] * half, s->sin + s->turns[t] * half);
}

/* The largest of a row of logits, the first of equals. Gives whether it is finite and none is NaN. */
static int find_best(const float *row, int64_t width, int64_t *best) {
    vec high = load(row);
    ints at = {0}, is_nan = high != high;
    for (int64_t i = LANES; i < width; i += LANES) {
        vec x = load(row + i);
        ints more = x > high;
        high = choose(more, x, high);
        at = (at & ~more) | ((int32_t)i & more);
        is_nan |= x != x;
    }
    int lane = 0, nans = is_nan[0];
    for (int i = 1; i < LANES; i++) {
        nans |= is_nan[i];
        if (high[i] > high[lane] || (high[i] == high[lane] && at[i] < at[lane])) lane = i;
    }
    *best = at[lane] + lane;
    return !nans && isfinite(high[lane]);
}

/* `claims` are two counts of linear_part, which take turns: while one is in use, the other is made 0
 * again. */
enum { CLAIM = 8 /* numbers from one to the other, which lie in different lines */ };
static void decode_part(const decoder *d, step *s, int64_t num_blocks, int64_t thread,
                        int64_t threads, int64_t *claims, int64_t *ns) {
    const int64_t C = d->hidden, D = d->dim, mixed_width = d->num_heads * D;
    const int64_t stride = (d->num_heads + 2 * d->kv_heads) * D;
    const int64_t most = s->tokens > s->num_rows ? s->tokens : s->num_rows;
    float *normed = s->normed + thread * most * C;
    float *hidden = s->hidden, *mixed = s->mixed;
    int64_t tokens = s->tokens, then = ns ? now_ns(threads) : 0, turn = 0;
#define COUNT(part)                      \
    if (ns && thread == 0) {             \
        int64_t now = now_ns(threads);   \
        ns[part] += now - then;          \
        then = now;                      \
    }
#define LINEAR(part, x, y, what, pages)                                           \
    if (thread == 0) claims[CLAIM * (1 - turn)] = 0;                              \
    linear_part(part, x, y, tokens, what, threads, claims + CLAIM * turn, pages); \
    turn = 1 - turn;                                                              \
    _Pragma("omp barrier")
#define PRODUCT(index, part, x, y, what, pages)                                   \
    if (l->codes[index]) {                                                        \
        coded_part(l->codes[index], x, tokens, s->scratch, y, what == ADD);       \
    } else {                                                                      \
        LINEAR(&l->part, x, y, what, pages)                                       \
    }
    embed(d, s);
    COUNT(EMBEDDING)
    for (int64_t i = 0; i < d->num_layers; i++) {
        const layer *l = d->layers + i;
        norm(hidden, l->input_norm, normed, tokens, C, d->eps);
        COUNT(NORMS)
        ahead pages = {s->keys[i], s->values[i], d->kv_heads * PAGE * D, s->table, s->blocks,
                       num_blocks - 1 - thread, 0, threads};
        PRODUCT(QKV, qkv, normed, s->qkv, STORE, &pages)
        COUNT(LINEARS)
        rotate_rows(d, s);
        attention a = {s->qkv, s->qkv + mixed_width, s->qkv + mixed_width + d->kv_heads * D,
                       stride, s->mixed, s->tokens, d->num_heads, d->kv_heads, D,
                       s->keys[i], s->values[i], s->slots, s->table, s->blocks, num_blocks,
                       d->scale, threads, i + 1 == d->num_layers ? s->is_read : 0};
        write_part(&a);
        COUNT(ROTATION)
        attend_part(&a);
        if (i + 1 == d->num_layers) {
            /* Neighbours of a row may still be needed, so into other memory. */
#pragma omp for schedule(static)
            for (int64_t r = 0; r < s->num_rows; r++) {
                memcpy(s->read + r * C, hidden + s->rows[r] * C, sizeof(float) * C);
                memcpy(s->qkv + r * mixed_width, mixed + s->rows[r] * mixed_width,
                       sizeof(float) * mixed_width);
            }
            hidden = s->read;
            mixed = s->qkv;
            tokens = s->num_rows;
        }
        COUNT(ATTENTION)
        PRODUCT(OUTPUT, output, mixed, hidden, ADD, 0)
        COUNT(LINEARS)
        norm(hidden, l->post_norm, normed, tokens, C, d->eps);
        COUNT(NORMS)
        PRODUCT(GATE_UP, gate_up, normed, s->middle, GATE, 0)
        PRODUCT(DOWN, down, s->middle, hidden, ADD, 0)
        COUNT(LINEARS)
    }
    if (s->logits) {
        norm(hidden, d->last_norm, normed, tokens, C, d->eps);
        LINEAR(&d->head, normed, s->logits, STORE, 0)
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            if (!find_best(s->logits + t * d->head.width, d->head.width, s->best + t)) {
#pragma omp atomic write
                s->is_finite = 0;
            }
    } else {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            norm_row(hidden + t * C, 0, d->last_norm, hidden + t * C, C, d->eps);
    }
    COUNT(LOGITS)
}

/* Computes a step. `ns` may be null: where the time went, by part. Gives 0, or which of what it was
 * given was too small. */
int64_t decode(const decoder *d, step *s, int64_t threads, int64_t *ns) {
    int64_t num_blocks = lay_out(d, s);
    if (num_blocks < 0) return num_blocks;
    s->is_finite = 1;
    int64_t claims[2 * CLAIM] = {0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    decode_part(d, s, num_blocks, omp_get_thread_num(), omp_get_num_threads(), claims, ns);
    return 0;
}
