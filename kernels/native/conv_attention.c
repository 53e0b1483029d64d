/* PixelAttention: softmax(q^T k * scale) v of every pixel to every other, channels first.
 *
 *   qkv  float [batch, 3 * channels, (height,) width]: q, k, v, each [heads, channels / heads]
 *   -> y float [batch, channels, (height,) width]
 *
 * Attributes: heads, scale.
 *
 * Both products are those of a convolution with a kernel of one pixel, on its kernels: the keys are
 * the weights of the first, one scale each, and the values of the second, one scale for each
 * channel of 32 pixels; queries and softmaxes are rounded as patches are. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "op.h"

enum { LANES = 16, OUTPUTS = 4, VECTORS = 2, TILE = LANES * VECTORS, BLOCK = 32 };

typedef struct {
  int64_t heads;
  float scale;
  normalize_fn activate;
  pack_patches_fn pack;
  round_keys_fn round_keys;
  round_values_fn round_values;
  scores_fn scores;
  shares_fn shares;
  conv_fn multiply;
} PixelAttention;

typedef struct {
  const PixelAttention *op;
  const float *qkv;
  float *y, *numbers, *zeros, *gains;
  char *codes, *work;
  int32_t *offsets;
  int64_t heads, width, pixels, tiles; /* heads of the whole batch */
  int64_t key_codes, head_codes, key_numbers, head_numbers, work_bytes;
} Job;

static Status create(const CustomOp *self, const void *api, const void *info, void **kernel) {
  (void)self, (void)api;
  Options from = {info, -1};
  PixelAttention op = {.heads = attribute_int(from, "heads", 0)};
  op.scale = attribute_float(from, "scale", 0);
  if (op.heads < 1 || op.heads > 1 << 16 || !(op.scale > 0))
    return fail("PixelAttention: heads %lld, scale %g, expected at least 1 and above 0",
                (long long)op.heads, (double)op.scale);
  const char *variant = leangen_kernels_variant(NULL);
  op.activate = leangen_kernels_find(variant, "activate_linear");
  op.pack = leangen_kernels_find(variant, "pack_patches");
  op.round_keys = leangen_kernels_find(variant, "round_keys");
  op.round_values = leangen_kernels_find(variant, "round_values");
  op.scores = leangen_kernels_find(variant, "scores");
  op.shares = leangen_kernels_find(variant, "shares");
  op.multiply = leangen_kernels_find(variant, "conv_2");
  *kernel = malloc(sizeof op);
  if (!*kernel) return fail("PixelAttention: out of memory");
  memcpy(*kernel, &op, sizeof op);
  return NULL;
}

/* Channel 0 of q of a head; k and v of it are a third of the channels further on each. */
static const float *head_of(const Job *job, int64_t head) {
  int64_t b = head / job->op->heads, channels = job->op->heads * job->width;
  return job->qkv + (b * 3 * channels + head % job->op->heads * job->width) * job->pixels;
}

/* The keys of a head, in even parts, or its values as weights. */
static void round_head(void *given, int64_t part, int64_t thread) {
  const Job *job = given;
  int64_t head = part / 2, third = job->op->heads * job->width * job->pixels;
  int64_t codes = (int64_t)(job->codes + head * job->head_codes);
  int64_t numbers = (int64_t)(job->numbers + head * job->head_numbers);
  const float *keys = head_of(job, head) + third;
  if (part % 2 == 0)
    CALL_KERNEL(job->op->round_keys, (int64_t)keys, 4 * job->pixels, job->width, job->pixels,
                codes, numbers, (double)job->op->scale);
  else
    CALL_KERNEL(job->op->round_values, (int64_t)(keys + third), 4 * job->pixels, job->width,
                job->pixels, codes + job->key_codes, numbers + 4 * job->key_numbers,
                (int64_t)(job->work + thread * job->work_bytes));
}

/* A tile of queries. */
static void attend(void *given, int64_t i, int64_t thread) {
  const Job *job = given;
  const PixelAttention *op = job->op;
  int64_t width = job->width, pixels = job->pixels;
  int64_t key_fours = up_to(width, 4) / 4, value_fours = up_to(pixels, 4) / 4;
  float *low = (float *)(job->work + thread * job->work_bytes), *high = low + TILE;
  float *scales = high + TILE, *peak = scales + 2 * TILE, *queries = peak + TILE;
  float *scores = queries + up_to(width, 4) * TILE;
  char *patches = (char *)(scores + up_to(pixels, 4) * TILE);
  int64_t head = i / job->tiles, from = i % job->tiles * TILE;
  int64_t some = smaller(TILE, pixels - from);
  char *codes = job->codes + head * job->head_codes;
  float *numbers = job->numbers + head * job->head_numbers;
  float *y = job->y + head * width * pixels + from;
  CALL_KERNEL(op->activate, (int64_t)(head_of(job, head) + from), 4 * pixels, (int64_t)queries,
              (int64_t)(4 * TILE), (int64_t)low, (int64_t)high, some, width,
              (int64_t)job->gains, 1.0);
  static const int32_t here = 0;
  for (int64_t v = 0; v < VECTORS; v++)
    CALL_KERNEL(op->pack, (int64_t)(queries + LANES * v), (int64_t)(low + LANES * v),
                (int64_t)(high + LANES * v), (int64_t)job->offsets, key_fours, (int64_t)&here,
                (int64_t)1, (int64_t)(patches + 4 * LANES * v), (int64_t)(4 * TILE),
                (int64_t)(scales + 2 * LANES * v));
  CALL_KERNEL(op->scores, (int64_t)patches, (int64_t)scales, (int64_t)codes, (int64_t)numbers,
              key_fours, pixels, (int64_t)scores, (int64_t)peak);
  CALL_KERNEL(op->shares, (int64_t)scores, (int64_t)peak, (int64_t)scales, value_fours,
              (int64_t)patches);
  codes += job->key_codes, numbers += job->key_numbers;
  CALL_KERNEL(op->multiply, (int64_t)patches, (int64_t)scales, (int64_t)codes, (int64_t)numbers,
              value_fours, (int64_t)(BLOCK / 4), (int64_t)y, 4 * pixels, some, width,
              (int64_t)job->zeros, (int64_t)0);
}

/* Memory for keys and values as weights, for what convolution's kernels want besides, and for what
 * each thread works with. */
static Status allocate(Job *job) {
  int64_t key_fours = up_to(job->width, 4) / 4, value_fours = up_to(job->pixels, 4) / 4;
  int64_t blocks = up_to(job->pixels, BLOCK) / BLOCK;
  job->key_codes = up_to(job->pixels, LANES) * key_fours * 4;
  job->head_codes = job->key_codes + up_to(job->width, OUTPUTS) * value_fours * 4;
  job->key_numbers = up_to(job->pixels, LANES) * 2;
  job->head_numbers = job->key_numbers + up_to(job->width, OUTPUTS) * (blocks + 1);
  int64_t patch_bytes = larger(key_fours, value_fours) * 4 * TILE;
  job->work_bytes = up_to(4 * TILE * (5 + 4 * key_fours + 4 * value_fours) + patch_bytes, 64);
  int64_t codes = up_to(job->heads * job->head_codes, 64);
  int64_t numbers = up_to(4 * job->heads * job->head_numbers, 64);
  int64_t offsets = up_to(16 * key_fours, 64), gains = up_to(8 * job->width, 64);
  int64_t zeros = up_to(4 * up_to(job->width, OUTPUTS), 64);
  char *memory = scratch((size_t)(codes + numbers + offsets + gains + zeros +
                                  MOST_THREADS * job->work_bytes));
  if (!memory) return fail("PixelAttention: out of memory for %lld pixels", (long long)job->pixels);
  job->codes = memory, memory += codes;
  job->numbers = (float *)memory, memory += numbers;
  job->offsets = (int32_t *)memory, memory += offsets;
  job->gains = (float *)memory, memory += gains;
  job->zeros = (float *)memory, memory += zeros;
  job->work = memory;
  for (int64_t i = 0; i < 4 * key_fours; i++) job->offsets[i] = (int32_t)(4 * TILE * i);
  for (int64_t i = 0; i < job->width; i++) job->gains[2 * i] = 1, job->gains[2 * i + 1] = 0;
  memset(job->zeros, 0, (size_t)zeros);
  return NULL;
}

static Status compute(void *self, void *context) {
  const PixelAttention *op = self;
  static const Tensor unknown;
  Tensor x;
  TRY(get_inputs(context, &unknown, 1, &x));
  if (x.rank < 3 || x.dims[1] < 1 || x.dims[1] % (3 * op->heads))
    return fail("PixelAttention: qkv has rank %zu and %lld channels, expected 3 times %lld heads",
                x.rank, (long long)(x.rank > 1 ? x.dims[1] : 0), (long long)op->heads);
  int64_t dims[MAX_RANK];
  memcpy(dims, x.dims, sizeof dims);
  dims[1] /= 3;
  Job job = {.op = op, .qkv = x.data, .heads = x.dims[0] * op->heads,
             .width = dims[1] / op->heads};
  TRY(get_output(context, 0, dims, x.rank, (void **)&job.y));
  if (!x.count) return NULL;
  job.pixels = x.count / (x.dims[0] * x.dims[1]);
  job.tiles = up_to(job.pixels, TILE) / TILE;
  if (job.pixels > 1 << 20 || job.width > 1 << 16 || job.heads * job.tiles > MOST_PARTS)
    return fail("PixelAttention: %lld pixels of %lld channels a head are too many",
                (long long)job.pixels, (long long)job.width);
  TRY(allocate(&job));
  Phase phases[] = {
      {.part = round_head, .job = &job, .parts = (int32_t)(2 * job.heads)},
      {.part = attend, .job = &job, .parts = (int32_t)(job.heads * job.tiles)},
  };
  return run_phases(context, phases, 2);
}

static Status infer(const CustomOp *self, void *context) {
  (void)self;
  int64_t dims[MAX_RANK];
  const char *names[MAX_RANK] = {0};
  size_t rank;
  TRY(infer_input(context, 0, dims, names, &rank));
  if (rank < 3 || dims[1] < 0) return NULL;
  dims[1] /= 3;
  return infer_output(context, 0, dims, names, rank);
}

OPERATOR(pixel_attention_op, "PixelAttention", 1, 1, OP_ON_CPU, .input_type = op_float,
         .input_characteristic = op_required, .output_type = op_float, .infer_shape = infer);
