/* What is computed of a token's row alone: its norm, and the rotation of its heads. */
#include "vectors.h"

/* x += delta, where that is not null; to = x / rms(x) * weight. All of `width`; to may be x. */
INLINE void norm_row(float *x, const float *delta, const float *weight, float *to, int64_t width,
                     float eps) {
    vec squares = (vec){0};
    for (int64_t c = 0; c < width; c += LANES) {
        vec h = load(x + c);
        if (delta) {
            h += load(delta + c);
            store(x + c, h);
        }
        squares += h * h;
    }
    float scale = 1.0f / sqrtf(sum(squares) / width + eps);
    for (int64_t c = 0; c < width; c += LANES) store(to + c, load(x + c) * scale * load(weight + c));
}

/* Rotates `heads` heads of `dim` channels, one behind the other: channels i and i + dim / 2 by the
 * angle whose cosine and sine are cos[i] and sin[i]. */
INLINE void rotate_heads(float *head, int64_t heads, int64_t dim, const float *cos,
                         const float *sin) {
    const int64_t half = dim / 2;
    for (int64_t h = 0; h < heads; h++, head += dim)
        for (int64_t i = 0; i < half; i++) {
            float a = head[i], b = head[i + half];
            head[i] = a * cos[i] - b * sin[i];
            head[i + half] = b * cos[i] + a * sin[i];
        }
}
