/* All layers of a Llama-like decoder over the tokens of a step, by one team of threads.
 *
 * Norms are computed by each thread for itself: that takes less time than waiting for a share of
 * them. Linears are plain or codes. Of the last layer, what follows attention is computed for the rows alone that are read.
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
} decoder;

/* cos and sin have D / 2 angles for each token, `angles` apart. Room to work in: qkv is
 * [T, N + 2 K, D], mixed [T, N, D], middle [T, intermediate size], normed [threads, T, C], with T the
 * larger of tokens and num_rows. */
typedef struct {
    float *hidden;
    const float *cos, *sin;
    int64_t angles, tokens;
    const int64_t *rows;
    int64_t num_rows;
    float *const *keys, *const *values;
    const int64_t *slots;
    const int32_t *pages;
    const block *blocks;
    int64_t num_blocks;
    float *qkv, *mixed, *middle, *normed;
    float *scratch; /* for codes: [T, largest number of inputs, in multiples of 128] */
    float *read; /* [num_rows, C]: the hidden states of `rows`, the result */
} step;

/* What a step's nanoseconds are counted as, by the first thread. */
enum { LINEARS, NORMS, ROTATION, ATTENTION, PARTS };

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

/* Rotate query and key: channels i and i + D / 2 of each head. */
static void rotate_rows(const decoder *d, const step *s) {
    const int64_t half = d->dim / 2, stride = (d->num_heads + 2 * d->kv_heads) * d->dim;
    /* Shared out as the rows of write_part are, which need not wait therefore. */
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < s->tokens; t++) {
        const float *c = s->cos + t * s->angles, *n = s->sin + t * s->angles;
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
        int64_t now = now_ns(threads);          \
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
}

/* The hidden states after all layers of the step's `rows`, in s->read. `ns` may be null: where the
 * time went, by part. */
void decode(const decoder *d, const step *s, int64_t threads, int64_t *ns) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    decode_part(d, s, omp_get_thread_num(), omp_get_num_threads(), ns);
}
