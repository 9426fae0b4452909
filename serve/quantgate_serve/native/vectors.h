/* Vectors of LANES floats: what this CPU holds. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__) && defined(__F16C__)
#define LANES 8
#else
#define LANES 4
#endif

#define LINE 16 /* floats that memory gives at once */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

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
