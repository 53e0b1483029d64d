/* What a run of `Attention` is made of: alone, and as a step of a `Chain`. */
#ifndef LEANGEN_ATTENTION_H
#define LEANGEN_ATTENTION_H

#include "kernels.h"
#include "op.h"

enum { ATTENTION_INPUTS = 8, ATTENTION_PHASES = 3 };

typedef struct {
  int64_t queries, columns; /* rows at once; vectors of 16 that the width is a multiple of */
  attend_fn attend;
} AttentionTile;

typedef struct {
  int64_t heads, kv_heads, window;
  float scale;
  int type, size, scaled; /* of the cache */
  double epsilon;
  rms_norm_fn rms_norm;
  rotate_fn rotate;
  elementwise_fn narrow; /* NULL: as it is */
  merge_fn merge;
  finish_fn finish;
  AttentionTile tiles[3]; /* the one for many rows, for few rows, for any width */
} Attention;

typedef struct {
  const Attention *op;
  const AttentionTile *tile;
  const float *qkv, *cosines, *sines;
  Tensor query_gain, key_gain;
  const int32_t *last;
  char *keys, *values;
  float *y, *q, *states, *work;
  float scale;
  int split; /* along the keys too */
  int64_t batch, new, capacity, width, tiles, chunks, work_floats, state_floats;
  int64_t append_parts, parts, states_at, work_at;
  int64_t block_bytes, head_bytes; /* of 16 positions, of all positions of a head */
  int64_t bytes;                   /* of memory that it needs while it runs */
} AttentionJob;

/* Read the attributes. */
Status attention_init(Attention *op, Options from);
/* Check the inputs, and plan their run; qkv may have a shape alone. */
Status attention_plan(const Attention *op, const Tensor *in, AttentionJob *job);
/* Take outputs `first` and the next for the caches, and fill them unless they are the inputs. */
Status attention_caches(void *context, size_t first, const Tensor *in, AttentionJob *job);
/* The phases of the run, at most ATTENTION_PHASES; how many. */
size_t attention_phases(AttentionJob *job, const Tensor *in, void *y, char *memory, Phase *phases);

#endif
