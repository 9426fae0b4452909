/* What the kernels share: vectors of 16 floats, and what a step's parts are told.
 *
 * A function named _part is called by every thread of a team, and does its part of the work.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16 /* of a vector; tokens of a page */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec x) { *(vec *)to = x; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec choose(ints where, vec x, vec y) {
    return (vec)(((ints)x & where) | ((ints)y & ~where));
}

INLINE float sum(vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

/* exp(x) for x <= 0, by the polynomial of Cephes' expf: 0 below -87, NaN stays NaN. */
INLINE vec exponential(vec x) {
    ints is_zero = x < all(-87.0f);
    vec clipped = choose(is_zero, all(-87.0f), x);
    vec magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vec shifted = clipped * 1.44269504088896341f + magic;
    vec n = shifted - magic;
    vec r = clipped - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    ints exponent = ((ints)shifted - (ints)magic + 127) << 23;
    return (vec)((ints)(y * (vec)exponent) & ~is_zero);
}

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
} attention;

/* Stores the step's keys and values in their slots; none where `tokens` is 0. */
void write_part(const attention *a);
/* Attends; keys and values are in their slots. */
void attend_part(const attention *a);

/* y = x W^T + b: x [tokens, depth], y [tokens, width], both contiguous; width is a multiple of 16.
 * `weight` lies in panels of 32 outputs, each [depth, 32]; `bias` may be null. */
typedef struct {
    const float *weight, *bias;
    int64_t depth, width;
} linear;

/* What becomes of a product: stored, added to what is there, or silu(first half) * second half,
 * the halves alternating in the weights after every 16 outputs (y is half as wide). */
enum { STORE, ADD, GATE };
void linear_part(const linear *l, const float *x, float *y, int64_t tokens, int what,
                 int64_t thread, int64_t threads);

/* quantized.c: y [rows, outputs] of x [rows, inputs] by Linears that are stored as codes. */
void coded_part(const void *codes, const float *x, int64_t rows, float *scratch, float *y,
                int is_added);
