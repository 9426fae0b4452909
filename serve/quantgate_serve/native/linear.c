/* FP32 products with packed weights. A sum runs over the inputs in order, whatever the other rows
 * are, so a result does not depend on batch mates or on threads.
 *
 * Weights lie in panels of two vectors of outputs; a tile of rows keeps its sums in registers over
 * all inputs. With AVX-512 few rows take one panel (14 rows x 2 vectors), many two (7 x 4): 28 of the
 * 32 registers either way; else all take one (6 x 2). While a panel is used, the next one is fetched:
 * by one of its tiles, while the others, whose products leave memory idle, may fetch pages; or, where
 * one tile has too little time for it, a share by each tile, which may fetch a page besides.
 *
 * Threads claim panels as they go, ever fewer at a time: on a shared machine none is as fast as the
 * others for long.
 */
#include "layer.h"
#include "vectors.h"

#define PANEL (2 * LANES)
#if LANES == 16
#define ROWS 14
#define GROUP 98 /* rows that stay in the second cache beside a pair of panels */
#define FEW 28   /* rows up to which one panel at a time is faster (measured on a Zen 4) */
#define UNIT 2   /* panels that are claimed together */
#define SPREADS 0 /* whether each tile fetches a share of the next panel */
#else
#define ROWS 6
#define GROUP 72
#define FEW GROUP
#define UNIT 1
#define SPREADS 1 /* measured on a Zen 3 */
#endif

/* Where a tile's sums go: `width` outputs of y's rows, from `column` on. */
typedef struct {
    const float *bias;
    float *y;
    int64_t stride, width, column;
    int what;
} target;

INLINE void finish(target to, vec *sums, int row, int vectors) {
    for (int w = 0; w < vectors && to.column + w * LANES < to.width; w++) {
        int64_t at = to.column + w * LANES;
        if (to.bias) sums[w] += load(to.bias + at);
        if (to.what == GATE) {
            if (w % 2 == 0) continue;
            /* silu: exp of what is not positive cannot overflow. */
            vec x = sums[w - 1];
            ints negative = x < all(0);
            vec e = exponential(choose(negative, x, -x));
            vec share = choose(negative, e, all(1)) / (e + 1.0f);
            store(to.y + row * to.stride + (at - LANES) / 2, x * share * sums[w]);
            continue;
        }
        float *y = to.y + row * to.stride + at;
        store(y, to.what == ADD ? load(y) + sums[w] : sums[w]);
    }
}

/* What a tile asks for: its share of the next panels, in 65536ths, and lines of two pieces of memory
 * in turn. */
typedef struct {
    const float *panel;
    int64_t share;
    const float *pieces[2];
    int64_t lines;
} fetched;

INLINE void tile(const float *x, int64_t depth, const float *panel, fetched next, target to,
                 const int rows, const int panels) {
    vec sums[ROWS][4];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int w = 0; w < 2 * panels; w++) sums[r][w] = (vec){0};
    for (int64_t k = 0; k < depth; k++) {
        vec weight[4];
#pragma GCC unroll 4
        for (int w = 0; w < 2 * panels; w++)
            weight[w] = load(panel + (w / 2 * depth + k) * PANEL + w % 2 * LANES);
        if (next.panel)
#pragma GCC unroll 4
            for (int i = 0; i < panels * PANEL; i += LINE)
                __builtin_prefetch(next.panel + (k * next.share >> 16) * panels * PANEL + i, 0, 2);
        if ((SPREADS || !next.panel) && k < next.lines)
            __builtin_prefetch(next.pieces[k % 2] + k / 2 * LINE, 0, 2);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            vec input = all(x[r * depth + k]);
#pragma GCC unroll 4
            for (int w = 0; w < 2 * panels; w++) sums[r][w] += input * weight[w];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) finish(to, sums[r], r, 2 * panels);
}

/* A tile of `rows` rows; each number of them is code of its own. */
static void some_rows(int rows, int panels, const float *x, int64_t depth, const float *panel,
                      fetched next, target to) {
#define CASE(n, p) case 100 * p + n: tile(x, depth, panel, next, to, n, p); break;
    switch (100 * panels + rows) {
        CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(5, 1) CASE(6, 1)
#if ROWS == 14
        CASE(7, 1) CASE(8, 1) CASE(9, 1) CASE(10, 1) CASE(11, 1) CASE(12, 1) CASE(13, 1)
        CASE(14, 1)
        CASE(1, 2) CASE(2, 2) CASE(3, 2) CASE(4, 2) CASE(5, 2) CASE(6, 2) CASE(7, 2)
#endif
    }
}

/* Lets a tile fetch the keys and values of the next page, if there is one. */
static void fetch_page(ahead *a, fetched *next) {
    for (; a && a->block >= 0; a->block -= a->threads, a->page = 0) {
        const block *b = a->blocks + a->block;
        if (b->count > 1 || a->page * PAGE >= b->first) continue;
        int64_t at = a->pages[b->pages + a->page++] * a->page_stride;
        next->pieces[0] = a->keys + at;
        next->pieces[1] = a->values + at;
        next->lines = 2 * a->page_stride / LINE;
        return;
    }
}

/* What the i-th of some tiles asks for, `after` being the next panels or null. */
static fetched next_of(const float *after, int64_t size, int64_t i, int64_t tiles, ahead *pages) {
    fetched next = {0};
    if (after && SPREADS) {
        next.panel = after + i * size / tiles / LINE * LINE;
        next.share = 65536 / tiles + 1;
    } else if (after && i == tiles / 2) {
        next.panel = after;
        next.share = 65536;
    }
    if (SPREADS || i != tiles / 2) fetch_page(pages, &next);
    return next;
}

/* Panels `first` to `end` over a group of rows. */
typedef struct {
    int64_t first, end, group;
} share;

/* The next share of so many panels for each of `groups`; an empty one when all are taken. */
static share claim(int64_t *claimed, int64_t panels, int64_t groups, int64_t threads) {
    const int64_t units = (panels + UNIT - 1) / UNIT, total = units * groups;
    int64_t first = __atomic_load_n(claimed, __ATOMIC_RELAXED), count;
    do {
        if (first >= total) return (share){0};
        const int64_t left_of_group = units - first % units;
        count = (total - first) / (4 * threads);
        count = count < 1 ? 1 : count < left_of_group ? count : left_of_group;
    } while (!__atomic_compare_exchange_n(claimed, &first, first + count, 1, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    const int64_t unit = first % units, end = UNIT * (unit + count);
    return (share){UNIT * unit, end < panels ? end : panels, first / units};
}

/* A share over its `count` rows from `row` on; `after` is the first panel of the next one, or null. */
static void some_panels(const linear *l, const float *x, float *y, int64_t row, int64_t count,
                        share mine, const float *after, int what, ahead *pages) {
    const int64_t stride = what == GATE ? l->width / 2 : l->width;
    const int together = count > FEW ? 2 : 1, most = ROWS / together;
    const int64_t tiles = (count + most - 1) / most;
    for (int64_t p = mine.first; p < mine.end; p += together) {
        int panels = p + 1 < mine.end ? together : 1;
        const float *panel = l->weight + p * PANEL * l->depth;
        const float *next = p + panels < mine.end ? panel + panels * PANEL * l->depth : after;
        for (int64_t i = 0; i < tiles; i++) {
            int64_t from = row + count * i / tiles, to = row + count * (i + 1) / tiles;
            target at = {l->bias, y + from * stride, stride, l->width, p * PANEL, what};
            fetched wanted = next_of(next, panels * PANEL * l->depth, i, tiles, pages);
            some_rows(to - from, panels, x + from * l->depth, l->depth, panel, wanted, at);
        }
    }
}

void linear_part(const linear *l, const float *x, float *y, int64_t tokens, int what,
                 int64_t threads, int64_t *claimed, ahead *pages) {
    const int64_t panels = (l->width + PANEL - 1) / PANEL;
    /* Where there are more threads than panels, they share the rows, too. */
    const int64_t parts = (threads + panels - 1) / panels;
    int64_t groups = (tokens + GROUP - 1) / GROUP;
    groups = groups < parts && parts <= tokens ? parts : groups;
    share mine = claim(claimed, panels, groups, threads);
    while (mine.end) {
        share next = claim(claimed, panels, groups, threads);
        const float *after = next.end ? l->weight + next.first * PANEL * l->depth : 0;
        int64_t row = tokens * mine.group / groups, end = tokens * (mine.group + 1) / groups;
        some_panels(l, x, y, row, end - row, mine, after, what, pages);
        mine = next;
    }
}

/* y = x W^T + b by a team of `threads`. */
void multiply(const float *x, const float *weight, const float *bias, float *y, int64_t tokens,
              int64_t depth, int64_t width, int64_t threads) {
    linear l = {weight, bias, depth, width};
    int64_t claimed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    linear_part(&l, x, y, tokens, STORE, threads, &claimed, 0);
}
