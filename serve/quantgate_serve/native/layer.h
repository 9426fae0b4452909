/* What the kernels over FP32 weights share: what a step's parts are told.
 *
 * A function named _part is called by every thread of a team, and does its part of the work.
 */
#include <stdint.h>

#define PAGE 16     /* tokens of a page */
#define MAX_ROWS 32 /* query rows that share what is read of a tile; layer.py knows it, too */

/* Tokens `token` to `token + count` of the step, `first` being the position of the first one of
 * them. The pages of their sequence begin at `pages` in the list of all. count * G <= MAX_ROWS. */
typedef struct {
    int32_t token, count, first, pages;
} block;

/* What a call of attend works on; every thread of a team takes its part of it. */
typedef struct {
    const float *query, *key, *value;
    int64_t stride;
    float *output;
    int64_t tokens, num_heads, kv_heads, dim;
    float *keys, *values;
    const int64_t *slots;
    const int32_t *pages;
    const block *blocks;
    int64_t num_blocks;
    float scale;
    int threads;
    const uint8_t *is_read; /* null, or which tokens' results are of use */
} attention;

/* Stores the step's keys and values in their slots; none where `tokens` is 0. */
void write_part(const attention *a);
/* Attends; keys and values are in their slots. */
void attend_part(const attention *a);

/* y = x W^T + b: x [tokens, depth], y [tokens, width], both contiguous; width is a multiple of L, the
 * lanes of linear.c. `weight` lies in panels of 2 L outputs, each [depth, 2 L]; `bias` may be null. */
typedef struct {
    const float *weight, *bias;
    int64_t depth, width;
} linear;

/* Pages that a thread asks for while it multiplies, because attention reads them next: those of the
 * decodes among the blocks, from the last one on, each `threads`th of them. `block` and `page` say
 * which is next. */
typedef struct {
    const float *keys, *values;
    int64_t page_stride;
    const int32_t *pages;
    const block *blocks;
    int64_t block, page, threads;
} ahead;

/* What becomes of a product: stored, added to what is there, or silu(first half) * second half,
 * the halves alternating in the weights after every L outputs (y is half as wide). */
enum { STORE, ADD, GATE };
/* `claimed` is the team's: 0 before the first of its threads comes here, and not to be used for another
 * product before all have left. `pages` may be null. */
void linear_part(const linear *l, const float *x, float *y, int64_t tokens, int what,
                 int64_t threads, int64_t *claimed, ahead *pages);

/* quantized.c: y [rows, outputs] of x [rows, inputs] by Linears that are stored as codes. */
void coded_part(const void *codes, const float *x, int64_t rows, float *scratch, float *y,
                int is_added);
