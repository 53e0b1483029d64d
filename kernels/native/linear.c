/* Linear: y = activation(norm(x) w^T + bias) + residual, weights packed as layout.py says.
 *
 *   x         float [..., k]
 *   weights   uint8 [bytes of layout.pack]
 *   gain      float [k], optional: RMS norm of each row of x first
 *   bias      float [outputs], optional
 *   residual  float [..., outputs], optional
 *   -> y      float [..., outputs]
 *
 * Attributes: k, n (rows of the weights), form (a name of layout.FORMS), activations ("int8" or
 * "fp32"), epsilon (of the norm), gated: 1 where rows of gate and up stand by turns of 16, the
 * output is silu(gate) * up, and `outputs` is n / 2 instead of n. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "op.h"

enum { ROWS = 16, BLOCK = 32, TILES = 4, MAX_PARTS = 16 };

/* Activation rows that are worked on at once: they should stay in the second-level cache. */
enum { CHUNK_BYTES = 128 << 10 };

/* A part smaller than this costs more to hand to a thread than to run: weight bytes x tokens. */
enum { PART_WORK = 48 << 10 };

typedef struct {
  int64_t k, n, outputs, center, wide, gated, block_bytes;
  int64_t blocks, groups, row_block_bytes, row_bytes;
  double epsilon;
  row_fn pack_row;
  rms_norm_fn rms_norm;
  elementwise_fn add, silu_multiply;
  linear_fn tiles[TILES]; /* of 1, 2, 4, 8 tokens; NULL where there is none */
} Linear;

typedef struct {
  const Linear *op;
  const char *x, *weights, *gain, *bias, *residual;
  char *y, *rows, *work;
  int64_t tokens, tile, parts, chunk, work_bytes;
  linear_fn kernel;
} Job;

static int64_t up_to(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

static const struct form {
  const char *name, *kernel;
  int64_t bits, minimum, wide;
} forms[] = {
    {"q4", "q4", 4, 0, 0},         {"q4_wide", "q4", 4, 0, 1},         {"q8", "q8", 8, 0, 0},
    {"q4_min", "q4_min", 4, 1, 0}, {"q4_min_wide", "q4_min", 4, 1, 1}, {"q8_wide", "q8", 8, 0, 1},
};

static const struct form *find_form(const char *name) {
  for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
    if (!strcmp(forms[i].name, name)) return &forms[i];
  return NULL;
}

static Status create(const CustomOp *self, const void *api, const void *info, void **kernel) {
  (void)self, (void)api;
  char form_name[32], activations[32], name[64];
  attribute_string(info, "form", form_name, sizeof form_name);
  attribute_string(info, "activations", activations, sizeof activations);
  if (!*activations) strcpy(activations, "int8");
  const struct form *form = find_form(form_name);
  if (!form) return fail("Linear: form '%s' is unknown", form_name);
  int floats = !strcmp(activations, "fp32");
  if (!floats && strcmp(activations, "int8"))
    return fail("Linear: activations '%s', expected int8 or fp32", activations);
  int64_t k = attribute_int(info, "k", 0), n = attribute_int(info, "n", 0);
  int64_t gated = attribute_int(info, "gated", 0);
  if (k < 1 || n < 1 || k > 1 << 24 || n > 1 << 24)
    return fail("Linear: n %lld, k %lld, expected 1 to 2**24", (long long)n, (long long)k);
  if (gated && n % (2 * ROWS))
    return fail("Linear: gated with n %lld, expected a multiple of 32", (long long)n);

  Linear *op = calloc(1, sizeof *op);
  if (!op) return fail("Linear: out of memory");
  op->k = k, op->n = n, op->gated = gated != 0, op->wide = form->wide;
  op->outputs = gated ? n / 2 : n;
  op->center = form->minimum ? 0 : 1 << (form->bits - 1);
  op->blocks = up_to(k, BLOCK) / BLOCK, op->groups = up_to(n, ROWS) / ROWS;
  op->block_bytes = ROWS * BLOCK * form->bits / 8 + ROWS * (2 << form->wide) * (1 + form->minimum);
  op->row_block_bytes = floats ? 4 * BLOCK + 4 : BLOCK + 8;
  op->row_bytes = op->blocks * op->row_block_bytes;
  op->epsilon = attribute_float(info, "epsilon", 1e-5f);
  const char *variant = leangen_kernels_variant(NULL);
  op->pack_row = leangen_kernels_find(variant, floats ? "keep" : "quantize");
  op->rms_norm = leangen_kernels_find(variant, "rms_norm");
  op->add = leangen_kernels_find(variant, "add");
  op->silu_multiply = leangen_kernels_find(variant, "silu_multiply");
  for (int i = 0; i < TILES; i++) {
    snprintf(name, sizeof name, "%s_%s_%d", activations, form->kernel, 1 << i);
    op->tiles[i] = leangen_kernels_find(variant, name);
  }
  *kernel = op;
  return NULL;
}

/* Pack the activation rows of one part. */
static void pack_rows(void *given, size_t part) {
  const Job *job = given;
  const Linear *op = job->op;
  int64_t first = job->tokens * (int64_t)part / job->parts;
  int64_t last = job->tokens * ((int64_t)part + 1) / job->parts;
  for (int64_t i = first; i < last; i++) {
    int64_t x = (int64_t)(job->x + 4 * op->k * i);
    if (job->gain) {
      int64_t normed = (int64_t)(job->work + job->work_bytes * (int64_t)part);
      CALL_KERNEL(op->rms_norm, x, (int64_t)job->gain, normed, op->k, op->epsilon);
      x = normed;
    }
    int64_t slot = i % job->tile;
    char *row = job->rows + op->row_bytes * (i - slot) + op->row_block_bytes * slot;
    CALL_KERNEL(op->pack_row, x, (int64_t)row, op->row_block_bytes * job->tile, op->k, op->center);
  }
}

/* The outputs of one part: some groups of weight rows for all tokens. */
static void multiply(void *given, size_t part) {
  const Job *job = given;
  const Linear *op = job->op;
  int64_t step = op->gated ? 2 : 1, pairs = op->groups / step;
  int64_t first = pairs * (int64_t)part / job->parts * step;
  int64_t last = pairs * ((int64_t)part + 1) / job->parts * step;
  int64_t from = first * ROWS / step, to = last * ROWS / step; /* columns of y */
  if (to > op->outputs) to = op->outputs;
  for (int64_t start = 0; start < job->tokens; start += job->chunk) {
    int64_t tokens = job->tokens - start < job->chunk ? job->tokens - start : job->chunk;
    int64_t x = (int64_t)(job->rows + op->row_bytes * start);
    int64_t stride = 4 * op->outputs, y = (int64_t)job->y + stride * start;
    int64_t out = y, out_stride = stride;
    if (op->gated) { /* products first go to work, as if it began at group 0 */
      out_stride = 4 * ROWS * (last - first);
      out = (int64_t)job->work + job->work_bytes * (int64_t)part - 4 * ROWS * first;
    }
    CALL_KERNEL(job->kernel, x, (int64_t)job->weights, op->blocks, out, out_stride, tokens, op->n,
                first, last, op->wide);
    for (int64_t i = 0; i < tokens; i++) {
      int64_t row = y + stride * i + 4 * from, width = to - from;
      if (op->gated)
        CALL_KERNEL(op->silu_multiply, out + out_stride * i + 4 * ROWS * first, row, width);
      if (job->bias) CALL_KERNEL(op->add, (int64_t)(job->bias + 4 * from), row, width);
      if (job->residual) {
        int64_t residual = (int64_t)job->residual + stride * (start + i) + 4 * from;
        CALL_KERNEL(op->add, residual, row, width);
      }
    }
  }
}

static Status check(const Linear *op, const Tensor *x, const Tensor *weights, const Tensor *gain,
                    const Tensor *bias, const Tensor *residual) {
  if (!x->data && x->count) return fail("Linear: x is missing");
  if (!x->rank || x->dims[x->rank - 1] != op->k)
    return fail("Linear: the last dimension of x is %lld, expected k = %lld",
                (long long)(x->rank ? x->dims[x->rank - 1] : 0), (long long)op->k);
  int64_t bytes = op->groups * op->blocks * op->block_bytes;
  if (weights->count != bytes)
    return fail("Linear: weights hold %lld bytes, expected %lld for n = %lld, k = %lld",
                (long long)weights->count, (long long)bytes, (long long)op->n, (long long)op->k);
  if (gain->data && gain->count != op->k)
    return fail("Linear: gain has %lld elements, expected k = %lld", (long long)gain->count,
                (long long)op->k);
  if (bias->data && bias->count != op->outputs)
    return fail("Linear: bias has %lld elements, expected %lld", (long long)bias->count,
                (long long)op->outputs);
  int64_t outputs = x->count / op->k * op->outputs;
  if (residual->rank && residual->count != outputs)
    return fail("Linear: residual has %lld elements, expected %lld, the shape of the output",
                (long long)residual->count, (long long)outputs);
  return NULL;
}

/* Into how many parts to cut so much work: bytes of weights, or of activations, times tokens. */
static int64_t parts_for(int64_t work) {
  int64_t parts = work / PART_WORK;
  return parts < 1 ? 1 : parts > MAX_PARTS ? MAX_PARTS : parts;
}

static Status run(void *context, Job *job, void (*part)(void *, size_t), int64_t parts) {
  job->parts = parts;
  if (parts == 1) return part(job, 0), NULL;
  return ORT(KernelContext_ParallelFor)(context, part, (size_t)parts, (size_t)0, job);
}

static Status compute(void *self, void *context) {
  const Linear *op = self;
  Tensor x, weights, gain, bias, residual;
  TRY(get_input(context, 0, &x));
  TRY(get_input(context, 1, &weights));
  TRY(get_input(context, 2, &gain));
  TRY(get_input(context, 3, &bias));
  TRY(get_input(context, 4, &residual));
  TRY(check(op, &x, &weights, &gain, &bias, &residual));
  int64_t dims[MAX_RANK];
  memcpy(dims, x.dims, sizeof dims);
  dims[x.rank - 1] = op->outputs;
  Job job = {.op = op, .x = x.data, .weights = weights.data, .gain = gain.data,
             .bias = bias.data, .residual = residual.data, .tokens = x.count / op->k};
  TRY(get_output(context, 0, dims, x.rank, (void **)&job.y));
  if (!job.tokens) return NULL;

  int tile = 0;
  while (tile + 1 < TILES && 1 << tile < job.tokens && op->tiles[tile + 1]) tile++;
  while (!op->tiles[tile]) tile++;
  job.kernel = op->tiles[tile];
  job.tile = 1 << tile;
  int64_t padded = up_to(job.tokens, job.tile); /* what the last tile computes beyond is unused */
  job.chunk = up_to(CHUNK_BYTES / op->row_bytes + 1, job.tile);
  if (job.chunk > padded) job.chunk = padded;

  int64_t pack_parts = job.tokens < MAX_PARTS ? 1 : parts_for(4 * x.count);
  int64_t parts = parts_for(op->groups * op->blocks * op->block_bytes * job.tokens);
  job.work_bytes = up_to(4 * op->k, 64); /* of each part, for a normed row or gated products */
  int64_t gated_bytes = op->gated ? 8 * ROWS * (op->groups / 2 / parts + 1) * job.chunk : 0;
  if (gated_bytes > job.work_bytes) job.work_bytes = gated_bytes;
  int64_t rows_bytes = up_to(padded * op->row_bytes, 64);
  int64_t most = pack_parts > parts ? pack_parts : parts;
  job.rows = scratch((size_t)(rows_bytes + job.work_bytes * most));
  if (!job.rows) return fail("Linear: out of memory for %lld tokens", (long long)job.tokens);
  job.work = job.rows + rows_bytes;
  if (padded > job.tokens)
    memset(job.rows + op->row_bytes * (padded - job.tile), 0, (size_t)(op->row_bytes * job.tile));
  TRY(run(context, &job, pack_rows, pack_parts));
  return run(context, &job, multiply, parts);
}

static Status infer(const CustomOp *self, void *context) {
  (void)self;
  int64_t n, gated;
  TRY(infer_attribute_int(context, "n", 0, &n));
  TRY(infer_attribute_int(context, "gated", 0, &gated));
  return infer_like_first(context, 0, gated ? n / 2 : n);
}

static const char *name(const CustomOp *op) { return (void)op, "Linear"; }
static int input_type(const CustomOp *op, size_t index) {
  return (void)op, index == 1 ? TENSOR_UINT8 : TENSOR_FLOAT;
}
static int output_type(const CustomOp *op, size_t index) {
  return (void)op, (void)index, TENSOR_FLOAT;
}
static size_t inputs(const CustomOp *op) { return (void)op, 5; }
static size_t outputs(const CustomOp *op) { return (void)op, 1; }
static int input_characteristic(const CustomOp *op, size_t index) {
  return (void)op, index < 2 ? REQUIRED : OPTIONAL;
}

const CustomOp linear_op = {
    OP_COMMON,
    .name = name,
    .input_type = input_type,
    .input_count = inputs,
    .output_type = output_type,
    .output_count = outputs,
    .input_characteristic = input_characteristic,
    .create_v2 = create,
    .compute_v2 = compute,
    .destroy = free,
    .infer_shape = infer,
};
