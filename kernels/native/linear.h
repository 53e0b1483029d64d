/* What a run of `Linear` is made of: alone, and as a step of a `Chain`. */
#ifndef LEANGEN_LINEAR_H
#define LEANGEN_LINEAR_H

#include "kernels.h"
#include "op.h"

enum { X, WEIGHTS, GAIN, BIAS, RESIDUAL, SHIFT, LINEAR_INPUTS };
enum { LINEAR_TILES = 4, LINEAR_PHASES = 2 };

typedef struct {
  int64_t k, n, outputs, center, held, gated, argmax, group_bytes;
  int64_t blocks, groups, row_block_bytes, row_bytes;
  double epsilon;
  row_fn pack_row;
  rms_norm_fn rms_norm; /* one of these */
  layer_norm_fn layer_norm;
  elementwise_fn add, gate;
  activate_fn activate;          /* NULL: none */
  linear_fn tiles[LINEAR_TILES]; /* of 1, 2, 4, 8 tokens; NULL where there is none */
} Linear;

typedef struct {
  int64_t index;
  float value;
} Largest;

typedef struct {
  const Linear *op;
  const char *x, *weights, *gain, *shift, *bias, *residual;
  char *y, *rows, *work;
  Largest *largest; /* [row_parts, tokens] */
  int64_t tokens, padded, tile, pack_parts, row_parts, token_parts, step, chunk;
  int64_t work_bytes, rows_bytes, largest_at;
  int64_t bytes; /* of memory that it needs while it runs */
  linear_fn kernel;
} LinearJob;

/* Read the attributes. */
Status linear_init(Linear *op, Options from, int argmax);
/* Check the inputs, and plan their run; those that are not made yet have shapes alone. */
Status linear_plan(const Linear *op, const Tensor *in, LinearJob *job);
/* The phases of the run, at most LINEAR_PHASES; how many. */
size_t linear_phases(LinearJob *job, const Tensor *in, void *y, char *memory, Phase *phases);
/* The shape of y, from what is known before the graph runs. */
Status linear_infer(const CustomOp *self, void *context);

#endif
