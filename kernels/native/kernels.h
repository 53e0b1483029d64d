/* The compiled kernels, by variant and name, and the choice of variant. */
#ifndef LEANGEN_KERNELS_H
#define LEANGEN_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* Numba's calling convention: where to return to, where an exception goes, then the arguments.
 * The kernels return nothing and raise nothing, but write a zero through both. */
#define CALL_KERNEL(function, ...) \
  do { \
    void *nothing_ = NULL, *exception_ = NULL; \
    (function)(&nothing_, &exception_, __VA_ARGS__); \
  } while (0)

typedef int (*linear_fn)(void *, void **, int64_t x, int64_t w, int64_t blocks, int64_t y,
                         int64_t y_stride, int64_t tokens, int64_t n, int64_t first, int64_t last,
                         int64_t held);
typedef int (*row_fn)(void *, void **, int64_t x, int64_t row, int64_t stride, int64_t k,
                      int64_t center);
typedef int (*rms_norm_fn)(void *, void **, int64_t x, int64_t gain, int64_t y, int64_t k,
                           double epsilon);
typedef int (*layer_norm_fn)(void *, void **, int64_t x, int64_t gain, int64_t shift, int64_t y,
                             int64_t k, double epsilon);
typedef int (*activate_fn)(void *, void **, int64_t y, int64_t n);
typedef int (*elementwise_fn)(void *, void **, int64_t x, int64_t y, int64_t n);
typedef int (*rotate_fn)(void *, void **, int64_t x, int64_t y, int64_t cosines, int64_t sines,
                         int64_t half, double factor);
typedef int (*attend_fn)(void *, void **, int64_t q, int64_t keys, int64_t values, int64_t scores,
                         int64_t state, int64_t width, int64_t row, int64_t group, int64_t past,
                         int64_t new, int64_t window, int64_t begin);
typedef int (*merge_fn)(void *, void **, int64_t state, int64_t more, int64_t width,
                        int64_t queries);
typedef int (*finish_fn)(void *, void **, int64_t state, int64_t y, int64_t width, int64_t queries,
                         int64_t t);
typedef int (*moments_fn)(void *, void **, int64_t x, int64_t n, int64_t out, double epsilon);
typedef int (*normalize_fn)(void *, void **, int64_t x, int64_t x_stride, int64_t y,
                           int64_t y_stride, int64_t low, int64_t high, int64_t n,
                           int64_t channels, int64_t gains, double slope);
typedef int (*pack_patches_fn)(void *, void **, int64_t image, int64_t low, int64_t high,
                               int64_t offsets, int64_t fours, int64_t taps, int64_t count,
                               int64_t out, int64_t out_stride, int64_t scales);
typedef int (*conv_fn)(void *, void **, int64_t patches, int64_t scales, int64_t codes,
                       int64_t numbers, int64_t fours, int64_t block, int64_t y, int64_t y_stride,
                       int64_t pixels, int64_t outputs, int64_t bias, int64_t residual);
typedef int (*round_keys_fn)(void *, void **, int64_t x, int64_t x_stride, int64_t width,
                             int64_t keys, int64_t codes, int64_t numbers, double factor);
typedef int (*round_values_fn)(void *, void **, int64_t x, int64_t x_stride, int64_t width,
                               int64_t keys, int64_t codes, int64_t numbers, int64_t room);
typedef int (*scores_fn)(void *, void **, int64_t queries, int64_t scales, int64_t codes,
                         int64_t numbers, int64_t fours, int64_t keys, int64_t y, int64_t peak);
typedef int (*shares_fn)(void *, void **, int64_t scores, int64_t peak, int64_t scales,
                         int64_t fours, int64_t out);

/* Name of the variant in use, and why; NULL with the reason when there is none. Decided once. */
EXPORT const char *leangen_kernels_variant(const char **reason);

/* Put a name behind those in a list, as far as there is room. */
void append_name(char *list, size_t size, const char *name);

/* A kernel of any variant, NULL when unknown or when this CPU cannot run it. */
EXPORT void *leangen_kernels_find(const char *variant, const char *name);

#endif
