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

enum { LANES = 16, OUTPUTS = 4, VECTORS = 2, TILE = LANES * VECTORS, BLOCK = 32, PARTS = 64 };

typedef struct {
  int64_t heads;
  float scale;
  normalize_fn activate;
  pack_patches_fn pack;
  conv_fn multiply;
  elementwise_fn exponentials;
} PixelAttention;

typedef struct {
  const PixelAttention *op;
  const float *qkv;
  float *y, *numbers, *zeros, *gains;
  int8_t *codes;
  int32_t *offsets;
  char *work;
  int64_t heads, width, pixels, tiles, parts; /* heads of the whole batch */
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
  op.multiply = leangen_kernels_find(variant, "conv_2");
  op.exponentials = leangen_kernels_find(variant, "exponentials");
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

/* x * inverse rounded, ties to even, for |x * inverse| up to 127. */
static int8_t rounded(float x, float inverse) {
  union {
    float number;
    int32_t bits;
  } both = {.number = x * inverse + 12582912.0f};
  return (int8_t)both.bits;
}

static float magnitude(const float *x, int64_t count, int64_t step) {
  float most = 1e-30f;
  for (int64_t i = 0; i < count; i++) {
    float one = x[i * step] < 0 ? -x[i * step] : x[i * step];
    if (one > most) most = one;
  }
  return most;
}

/* Rounds `count` weights of row `row`, from column `column`, to one block, as layout.py says. */
static float round_block(const float *x, int64_t count, int64_t step, int8_t *codes, int64_t fours,
                         int64_t row, int64_t column, int *total) {
  float most = magnitude(x, count, step), inverse = 127.0f / most;
  int8_t *group = codes + (row / OUTPUTS * fours * OUTPUTS + row % OUTPUTS) * 4;
  *total = 0;
  for (int64_t i = 0; i < count; i++) {
    int8_t code = rounded(x[i * step], inverse);
    group[(column + i) / 4 * 4 * OUTPUTS + (column + i) % 4] = code;
    *total += code;
  }
  return most / 127.0f;
}

/* Keys and values of some heads as weights. */
static void round_heads(void *given, size_t part) {
  const Job *job = given;
  int64_t width = job->width, pixels = job->pixels, third = job->op->heads * width * pixels;
  int64_t blocks = up_to(pixels, BLOCK) / BLOCK;
  for (int64_t head = (int64_t)part; head < job->heads; head += job->parts) {
    int8_t *codes = job->codes + head * job->head_codes;
    float *numbers = job->numbers + head * job->head_numbers;
    const float *keys = head_of(job, head) + third, *values = keys + third;
    memset(codes, 0, (size_t)job->head_codes);
    int total;
    for (int64_t i = 0; i < pixels; i++) {
      float scale = job->op->scale * round_block(keys + i, width, pixels, codes,
                                                 up_to(width, 4) / 4, i, 0, &total);
      float *group = numbers + i / OUTPUTS * 2 * OUTPUTS + i % OUTPUTS;
      group[0] = scale, group[OUTPUTS] = scale * (float)total;
    }
    codes += job->key_codes, numbers += job->key_numbers;
    for (int64_t c = 0; c < width; c++) {
      float sum = 0, *group = numbers + c / OUTPUTS * (blocks + 1) * OUTPUTS + c % OUTPUTS;
      for (int64_t i = 0; i < blocks; i++) {
        group[i * OUTPUTS] = round_block(values + c * pixels + i * BLOCK,
                                         smaller(BLOCK, pixels - i * BLOCK), 1, codes,
                                         up_to(pixels, 4) / 4, c, i * BLOCK, &total);
        sum += group[i * OUTPUTS] * (float)total;
      }
      group[blocks * OUTPUTS] = sum;
    }
  }
}

/* One tile's product with weights of a head, `outputs` rows to y. */
static void multiply(const Job *job, const char *patches, const float *scales, const int8_t *codes,
                     const float *numbers, int64_t fours, int64_t block, float *y, int64_t stride,
                     int64_t outputs, int64_t pixels) {
  int64_t blocks = up_to(fours, block) / block;
  for (int64_t output = 0; output < outputs; output += OUTPUTS)
    CALL_KERNEL(job->op->multiply, (int64_t)patches, (int64_t)scales,
                (int64_t)(codes + output * fours * 4),
                (int64_t)(numbers + output * (blocks + 1)), fours, block,
                (int64_t)(y + output * stride), 4 * stride, pixels,
                smaller(OUTPUTS, outputs - output), (int64_t)job->zeros, (int64_t)0);
}

/* A tile [rows, TILE] rounded in columns, from the ranges given, as patches. */
static void pack(const Job *job, const float *tile, const float *low, const float *high,
                 int64_t fours, char *patches, float *scales) {
  static const int32_t here = 0;
  for (int64_t v = 0; v < VECTORS; v++)
    CALL_KERNEL(job->op->pack, (int64_t)(tile + LANES * v), (int64_t)(low + LANES * v),
                (int64_t)(high + LANES * v), (int64_t)job->offsets, fours, (int64_t)&here,
                (int64_t)1, (int64_t)(patches + 4 * LANES * v), (int64_t)(4 * TILE),
                (int64_t)(scales + 2 * LANES * v));
}

/* Some tiles of queries. */
static void attend(void *given, size_t part) {
  const Job *job = given;
  int64_t width = job->width, pixels = job->pixels, all = job->heads * job->tiles;
  int64_t key_fours = up_to(width, 4) / 4, value_fours = up_to(pixels, 4) / 4;
  float *low = (float *)(job->work + (int64_t)part * job->work_bytes), *high = low + TILE;
  float *scales = high + TILE, *sums = scales + 2 * TILE, *none = sums + TILE, *one = none + TILE;
  float *queries = one + TILE, *scores = queries + up_to(width, 4) * TILE;
  char *patches = (char *)(scores + up_to(pixels, 4) * TILE);
  for (int64_t i = 0; i < TILE; i++) none[i] = 0, one[i] = 1;
  for (int64_t i = all * (int64_t)part / job->parts; i < all * ((int64_t)part + 1) / job->parts;
       i++) {
    int64_t head = i / job->tiles, from = i % job->tiles * TILE;
    int64_t some = smaller(TILE, pixels - from);
    const int8_t *codes = job->codes + head * job->head_codes;
    const float *numbers = job->numbers + head * job->head_numbers;
    CALL_KERNEL(job->op->activate, (int64_t)(head_of(job, head) + from), 4 * pixels,
                (int64_t)queries, (int64_t)(4 * TILE), (int64_t)low, (int64_t)high, some, width,
                (int64_t)job->gains, 1.0);
    pack(job, queries, low, high, key_fours, patches, scales);
    multiply(job, patches, scales, codes, numbers, key_fours, key_fours, scores, TILE, pixels,
             TILE);
    CALL_KERNEL(job->op->exponentials, (int64_t)scores, pixels, (int64_t)sums);
    pack(job, scores, none, one, value_fours, patches, scales);
    for (int64_t lane = 0; lane < TILE; lane++)
      scales[lane / LANES * 2 * LANES + lane % LANES] /= sums[lane];
    multiply(job, patches, scales, codes + job->key_codes, numbers + job->key_numbers, value_fours,
             BLOCK / 4, job->y + head * width * pixels + from, pixels, width, some);
  }
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
  if (job.pixels > 1 << 20 || job.width > 1 << 16)
    return fail("PixelAttention: %lld pixels of %lld channels a head are too many",
                (long long)job.pixels, (long long)job.width);
  job.tiles = up_to(job.pixels, TILE) / TILE;
  int64_t key_fours = up_to(job.width, 4) / 4, value_fours = up_to(job.pixels, 4) / 4;
  int64_t most_fours = larger(key_fours, value_fours);
  int64_t blocks = up_to(job.pixels, BLOCK) / BLOCK;
  job.key_codes = up_to(job.pixels, OUTPUTS) * key_fours * 4;
  job.head_codes = job.key_codes + up_to(job.width, OUTPUTS) * value_fours * 4;
  job.key_numbers = up_to(job.pixels, OUTPUTS) * 2;
  job.head_numbers = job.key_numbers + up_to(job.width, OUTPUTS) * (blocks + 1);
  job.work_bytes = up_to(4 * TILE * (8 + 4 * key_fours + 4 * value_fours + most_fours), 64);
  int64_t parts = smaller(job.heads * job.tiles, PARTS);
  int64_t codes = up_to(job.heads * job.head_codes, 64);
  int64_t numbers = up_to(4 * job.heads * job.head_numbers, 64);
  int64_t offsets = up_to(16 * most_fours, 64), gains = up_to(8 * job.width, 64);
  char *memory = scratch((size_t)(codes + numbers + offsets + gains + 64 + parts * job.work_bytes));
  if (!memory) return fail("PixelAttention: out of memory for %lld pixels", (long long)job.pixels);
  job.codes = (int8_t *)memory, memory += codes;
  job.numbers = (float *)memory, memory += numbers;
  job.offsets = (int32_t *)memory, memory += offsets;
  job.gains = (float *)memory, memory += gains;
  job.zeros = (float *)memory, memory += 64;
  job.work = memory;
  memset(job.numbers, 0, (size_t)numbers);
  for (int64_t i = 0; i < 4 * most_fours; i++) job.offsets[i] = (int32_t)(4 * TILE * i);
  for (int64_t i = 0; i < job.width; i++) job.gains[2 * i] = 1, job.gains[2 * i + 1] = 0;
  for (int64_t i = 0; i < OUTPUTS; i++) job.zeros[i] = 0;
  job.parts = smaller(job.heads, parts);
  TRY(run_parts(context, round_heads, job.parts, &job));
  job.parts = parts;
  return run_parts(context, attend, parts, &job);
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

static const char *name(const CustomOp *op) { return (void)op, "PixelAttention"; }

const CustomOp pixel_attention_op = {
    OP_COMMON,
    .name = name,
    .input_type = op_float,
    .input_count = op_single,
    .output_type = op_float,
    .output_count = op_single,
    .input_characteristic = op_none,
    .infer_shape = infer,
};
