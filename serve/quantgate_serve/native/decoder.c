/* A Llama-like decoder over the tokens of a step, from ids to logits, by one team of threads.
 *
 * One team for all of it: between two teams the other threads fall asleep, and waking them takes as
 * long as a norm. Norms are computed by each thread for itself: that takes less time than waiting
 * for a share of them. Linears are plain or codes. Of the last layer, what follows attention is
 * computed for the rows alone that are read.
 */
#include "layer.h"

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

/* `ids` are the tokens' rows of `embedding`, of which there are num_embeddings, `turns` those of cos
 * and sin, which have D / 2 angles each. Room to work in: hidden is [T, C], qkv [T, N + 2 K, D],
 * mixed [T, N, D], middle [T, intermediate size], normed [threads, T, C], with T the larger of
 * tokens and num_rows. */
typedef struct {
    const float *embedding;
    int64_t num_embeddings;
    const int64_t *ids;
    const float *cos, *sin;
    const int64_t *turns;
    int64_t tokens;
    const int64_t *rows;
    int64_t num_rows;
    float *const *keys, *const *values;
    const int64_t *slots;
    const int32_t *pages;
    const block *blocks;
    int64_t num_blocks;
    float *hidden, *qkv, *mixed, *middle, *normed;
    float *scratch; /* for codes: [T, largest number of inputs, in multiples of 128] */
    float *read;    /* [num_rows, C]: the hidden states of `rows`; the result, where no logits are */
    float *logits;  /* [num_rows, vocabulary]: the result, or null */
} step;

/* What a step's nanoseconds are counted as, by the first thread. */
enum { EMBEDDING, LINEARS, NORMS, ROTATION, ATTENTION, LOGITS };

/* The CPU time of a thread that works alone, else the wall's. */
static int64_t now_ns(int64_t threads) {
    struct timespec t;
    clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
}

static void norm(const float *x, const float *weight, float *to, int64_t tokens, int64_t width,
                 float eps) {
    for (int64_t t = 0; t < tokens; t++, x += width, to += width) {
        vec squares = (vec){0};
        for (int64_t c = 0; c < width; c += LANES) squares += load(x + c) * load(x + c);
        float scale = 1.0f / sqrtf(sum(squares) / width + eps);
        for (int64_t c = 0; c < width; c += LANES)
            store(to + c, load(x + c) * scale * load(weight + c));
    }
}

static void embed(const decoder *d, const step *s) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < s->tokens; t++)
        memcpy(s->hidden + t * d->hidden, s->embedding + s->ids[t] * d->hidden,
               sizeof(float) * d->hidden);
}

/* Rotate query and key: channels i and i + D / 2 of each head. */
static void rotate_rows(const decoder *d, const step *s) {
    const int64_t half = d->dim / 2, stride = (d->num_heads + 2 * d->kv_heads) * d->dim;
    /* Shared out as the rows of write_part are, which need not wait therefore. */
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < s->tokens; t++) {
        const float *c = s->cos + s->turns[t] * half, *n = s->sin + s->turns[t] * half;
        for (int64_t h = 0; h < d->num_heads + d->kv_heads; h++) {
            float *head = s->qkv + t * stride + h * d->dim;
            for (int64_t i = 0; i < half; i++) {
                float a = head[i], b = head[i + half];
                head[i] = a * c[i] - b * n[i];
                head[i + half] = b * c[i] + a * n[i];
            }
        }
    }
}

static void decode_part(const decoder *d, const step *s, int64_t thread, int64_t threads,
                        int64_t *ns) {
    const int64_t C = d->hidden, D = d->dim, mixed_width = d->num_heads * D;
    const int64_t stride = (d->num_heads + 2 * d->kv_heads) * D;
    float *normed = s->normed + thread * s->tokens * C;
    float *hidden = s->hidden, *mixed = s->mixed;
    int64_t tokens = s->tokens, then = ns ? now_ns(threads) : 0;
#define COUNT(part)                      \
    if (ns && thread == 0) {             \
        int64_t now = now_ns(threads);   \
        ns[part] += now - then;          \
        then = now;                      \
    }
#define PRODUCT(index, part, x, y, what)                                         \
    if (l->codes[index]) {                                                       \
        coded_part(l->codes[index], x, tokens, s->scratch, y, what == ADD);      \
    } else {                                                                     \
        linear_part(&l->part, x, y, tokens, what, thread, threads);              \
        _Pragma("omp barrier")                                                   \
    }
    embed(d, s);
    COUNT(EMBEDDING)
    for (int64_t i = 0; i < d->num_layers; i++) {
        const layer *l = d->layers + i;
        norm(hidden, l->input_norm, normed, tokens, C, d->eps);
        COUNT(NORMS)
        PRODUCT(QKV, qkv, normed, s->qkv, STORE)
        COUNT(LINEARS)
        rotate_rows(d, s);
        attention a = {s->qkv, s->qkv + mixed_width, s->qkv + mixed_width + d->kv_heads * D,
                       stride, s->mixed, s->tokens, d->num_heads, d->kv_heads, D,
                       s->keys[i], s->values[i], s->slots, s->pages, s->blocks, s->num_blocks,
                       d->scale, threads};
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
        PRODUCT(OUTPUT, output, mixed, hidden, ADD)
        COUNT(LINEARS)
        norm(hidden, l->post_norm, normed, tokens, C, d->eps);
        COUNT(NORMS)
        PRODUCT(GATE_UP, gate_up, normed, s->middle, GATE)
        PRODUCT(DOWN, down, s->middle, hidden, ADD)
        COUNT(LINEARS)
    }
    if (s->logits) {
        norm(hidden, d->last_norm, normed, tokens, C, d->eps);
        linear_part(&d->head, normed, s->logits, tokens, STORE, thread, threads);
    } else {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            norm(hidden + t * C, d->last_norm, hidden + t * C, 1, C, d->eps);
    }
    COUNT(LOGITS)
}

/* Logits of the step's `rows`, or their hidden states after the last norm in s->read. `ns` may be
 * null: where the time went, by part. Gives how many tokens were computed: none where an id has no
 * embedding. */
int64_t decode(const decoder *d, const step *s, int64_t threads, int64_t *ns) {
    for (int64_t t = 0; t < s->tokens; t++)
        if (s->ids[t] < 0 || s->ids[t] >= s->num_embeddings) return 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    decode_part(d, s, omp_get_thread_num(), omp_get_num_threads(), ns);
    return s->tokens;
}
