/* What a run of `Attention` is made of: alone, and as a step of a `Chain`. */
#ifndef LEANGEN_ATTENTION_H
#define LEANGEN_ATTENTION_H

#include "kernels.h"
#include "op.h"

enum { QKV, KEY, VALUE, LENGTHS, COSINES, SINES, QUERY_GAIN, KEY_GAIN, ATTENTION_INPUTS };
enum { ATTENTION_OUTPUTS = 3, ATTENTION_PHASES = 3 };

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

int attention_input_type(const CustomOp *, size_t);
int attention_input_needed(const CustomOp *, size_t);
int attention_output_type(const CustomOp *, size_t);
/* The shapes of the caches, from what is known before the graph runs. */
Status attention_infer(const CustomOp *self, void *context);

/* Fields of an operator with these inputs and outputs. */
#define OP_ATTENDING \
  .input_type = attention_input_type, .input_characteristic = attention_input_needed, \
  .output_type = attention_output_type, .infer_shape = attention_infer

#endif
