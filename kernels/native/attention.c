/* Attention: rotary grouped-query attention that appends to a preallocated cache.
 *
 *   qkv          float [batch, new, (heads + 2 kv_heads) * width]
 *   past_key     float [batch, kv_heads, capacity, width], opaque: see attention.py for its order
 *   past_value   float [batch, kv_heads, capacity, width]
 *   seqlens_k    int32 [batch]: positions in the cache after this run, less one
 *   cosines      float [positions, width / 2]
 *   sines        float [positions, width / 2]
 *   -> y         float [batch, new, heads * width]
 *   present_key, present_value: as the past; bind them to the same buffers, else they are copied
 *
 * Attributes: heads, kv_heads, scale (default 1 / sqrt(width)), window (keys seen, default all).
 * capacity and width are multiples of 16. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "op.h"

enum { ROWS = 16, QUERIES = 4, MAX_PARTS = 16 };

/* A part with fewer multiplications than this costs more to hand to a thread than to run. */
enum { PART_WORK = 64 << 10 };

typedef struct {
  int64_t heads, kv_heads, window;
  float scale;
  rotate_fn rotate;
  attend_fn attend;
} Attention;

typedef struct {
  const Attention *op;
  const float *qkv, *cosines, *sines;
  const int32_t *last;
  float *keys, *values, *y, *q, *work;
  int64_t batch, new, capacity, width, parts, tiles, work_floats;
} Job;

static int64_t past_of(const Job *job, int64_t sequence) {
  int64_t past = job->last[sequence] + 1 - job->new;
  return past < 0 ? 0 : past; /* a prompt shorter than the longest of its batch */
}

/* Rotate the queries and keys of some tokens; append keys and values to the cache. */
static void append(void *given, size_t part) {
  const Job *job = given;
  const Attention *op = job->op;
  int64_t width = job->width, group = op->heads / op->kv_heads, all = job->batch * job->new;
  float *turned = job->work + job->work_floats * (int64_t)part;
  for (int64_t i = all * (int64_t)part / job->parts; i < all * ((int64_t)part + 1) / job->parts;
       i++) {
    int64_t sequence = i / job->new, token = i % job->new;
    int64_t position = past_of(job, sequence) + token;
    const float *from = job->qkv + i * (op->heads + 2 * op->kv_heads) * width;
    int64_t cosines = (int64_t)(job->cosines + position * (width / 2));
    int64_t sines = (int64_t)(job->sines + position * (width / 2));
    for (int64_t head = 0; head < op->heads; head++, from += width) {
      CALL_KERNEL(op->rotate, (int64_t)from, (int64_t)turned, cosines, sines, width / 2,
                  (double)op->scale);
      int64_t row = token * group + head % group;
      int64_t tile = (sequence * op->kv_heads + head / group) * job->tiles + row / QUERIES;
      float *to = job->q + tile * QUERIES * width + row % QUERIES;
      for (int64_t d = 0; d < width; d++) to[d * QUERIES] = turned[d];
    }
    for (int64_t head = 0; head < op->kv_heads; head++, from += width) {
      CALL_KERNEL(op->rotate, (int64_t)from, (int64_t)turned, cosines, sines, width / 2, 1.0);
      float *block = job->keys + ((sequence * op->kv_heads + head) * job->capacity +
                                  position / ROWS * ROWS) * width;
      for (int64_t d = 0; d < width; d++) block[d * ROWS + position % ROWS] = turned[d];
    }
    for (int64_t head = 0; head < op->kv_heads; head++, from += width)
      memcpy(job->values + ((sequence * op->kv_heads + head) * job->capacity + position) * width,
             from, (size_t)width * sizeof *from);
  }
}

/* Some tiles of query rows, later tokens first as they take longest. */
static void attend(void *given, size_t part) {
  const Job *job = given;
  const Attention *op = job->op;
  int64_t width = job->width, group = op->heads / op->kv_heads, rows = job->new * group;
  int64_t heads = job->batch * op->kv_heads, all = heads * job->tiles;
  float *out = job->work + job->work_floats * (int64_t)part, *scores = out + QUERIES * width;
  for (int64_t i = (int64_t)part; i < all; i += job->parts) {
    int64_t head = i % heads, tile = job->tiles - 1 - i / heads, sequence = head / op->kv_heads;
    int64_t cache = head * job->capacity * width, row = tile * QUERIES;
    CALL_KERNEL(op->attend, (int64_t)(job->q + (head * job->tiles + tile) * QUERIES * width),
                (int64_t)(job->keys + cache), (int64_t)(job->values + cache), (int64_t)scores,
                (int64_t)out, width, row, group, past_of(job, sequence), job->new,
                op->window);
    for (int64_t t = 0; t < QUERIES && row + t < rows; t++) {
      int64_t token = sequence * job->new + (row + t) / group;
      int64_t query_head = head % op->kv_heads * group + (row + t) % group;
      memcpy(job->y + (token * op->heads + query_head) * width, out + t * width,
             (size_t)width * sizeof *out);
    }
  }
}

static Status check(const Attention *op, const Tensor *in) {
  static const char *const names[] = {"qkv", "past_key", "past_value", "seqlens_k", "cosines",
                                      "sines"};
  static const size_t ranks[] = {3, 4, 4, 1, 2, 2};
  for (int i = 0; i < 6; i++)
    if (in[i].rank != ranks[i])
      return fail("Attention: %s has rank %zu, expected %zu", names[i], in[i].rank, ranks[i]);
  const int64_t *qkv = in[0].dims, *key = in[1].dims, *value = in[2].dims;
  int64_t batch = qkv[0], capacity = key[2], width = key[3];
  if (width < 16 || width % 16 || capacity % ROWS)
    return fail("Attention: capacity %lld and width %lld, expected multiples of 16",
                (long long)capacity, (long long)width);
  if (qkv[2] != (op->heads + 2 * op->kv_heads) * width)
    return fail("Attention: qkv has %lld columns, expected %lld", (long long)qkv[2],
                (long long)((op->heads + 2 * op->kv_heads) * width));
  if (key[0] != batch || key[1] != op->kv_heads || memcmp(key, value, 4 * sizeof *key))
    return fail("Attention: past_key and past_value must be [%lld, %lld, capacity, width]",
                (long long)batch, (long long)op->kv_heads);
  if (in[3].dims[0] != batch)
    return fail("Attention: seqlens_k has %lld elements, expected %lld", (long long)in[3].dims[0],
                (long long)batch);
  for (int i = 4; i < 6; i++)
    if (in[i].dims[1] != width / 2)
      return fail("Attention: %s has %lld columns, expected %lld", names[i],
                  (long long)in[i].dims[1], (long long)(width / 2));
  const int32_t *last = in[3].data;
  for (int64_t i = 0; i < batch; i++) {
    int64_t end = last[i] + (int64_t)1 > qkv[1] ? last[i] + (int64_t)1 : qkv[1];
    if (last[i] < 0 || end > capacity || end > in[4].dims[0] || end > in[5].dims[0])
      return fail("Attention: %lld positions, expected at most %lld (capacity) and %lld (rotations)",
                  (long long)end, (long long)capacity, (long long)in[4].dims[0]);
  }
  return NULL;
}

static int64_t parts_for(int64_t work, int64_t most) {
  int64_t parts = work / PART_WORK;
  parts = parts > MAX_PARTS ? MAX_PARTS : parts;
  return parts > most ? most : parts < 1 ? 1 : parts;
}

static Status run(void *context, Job *job, void (*part)(void *, size_t), int64_t parts) {
  job->parts = parts;
  if (parts == 1) return part(job, 0), NULL;
  return ORT(KernelContext_ParallelFor)(context, part, (size_t)parts, (size_t)0, job);
}

static Status compute(void *self, void *context) {
  Attention op = *(Attention *)self;
  Tensor in[6];
  for (size_t i = 0; i < 6; i++) TRY(get_input(context, i, &in[i]));
  TRY(check(&op, in));
  int64_t batch = in[0].dims[0], new = in[0].dims[1], width = in[1].dims[3];
  int64_t group = op.heads / op.kv_heads;
  if (op.scale == 0) op.scale = 1 / sqrtf((float)width);
  Job job = {.op = &op, .qkv = in[0].data, .last = in[3].data, .cosines = in[4].data,
             .sines = in[5].data, .batch = batch, .new = new, .capacity = in[1].dims[2],
             .width = width, .tiles = (new * group + QUERIES - 1) / QUERIES};
  int64_t dims[] = {batch, new, op.heads * width};
  TRY(get_output(context, 0, dims, 3, (void **)&job.y));
  TRY(get_output(context, 1, in[1].dims, 4, (void **)&job.keys));
  TRY(get_output(context, 2, in[2].dims, 4, (void **)&job.values));
  if (job.keys != in[1].data) memcpy(job.keys, in[1].data, (size_t)in[1].count * 4);
  if (job.values != in[2].data) memcpy(job.values, in[2].data, (size_t)in[2].count * 4);
  if (!batch || !new) return NULL;

  int64_t seen = 0; /* keys of the longest sequence */
  for (int64_t i = 0; i < batch; i++) {
    int64_t end = past_of(&job, i) + new;
    if (end > seen) seen = end;
  }
  int64_t q_floats = batch * op.kv_heads * job.tiles * QUERIES * width;
  job.work_floats = QUERIES * (width + (seen + 2 * ROWS) / ROWS * ROWS);
  int64_t units = batch * op.kv_heads * job.tiles;
  int64_t work = 2 * units * QUERIES * width * (seen - new / 2);
  int64_t append_parts = new == 1 ? 1 : parts_for(in[0].count * 8, batch * new);
  int64_t parts = parts_for(work, units), most = parts > append_parts ? parts : append_parts;
  job.q = (float *)scratch((size_t)(q_floats + job.work_floats * most) * sizeof(float));
  if (!job.q) return fail("Attention: out of memory for %lld tokens", (long long)new);
  job.work = job.q + q_floats;
  memset(job.q, 0, (size_t)q_floats * sizeof(float)); /* rows beyond the last are computed too */
  TRY(run(context, &job, append, append_parts));
  return run(context, &job, attend, parts);
}

static Status create(const CustomOp *self, const void *api, const void *info, void **kernel) {
  (void)self, (void)api;
  Attention *op = calloc(1, sizeof *op);
  if (!op) return fail("Attention: out of memory");
  op->heads = attribute_int(info, "heads", 0), op->kv_heads = attribute_int(info, "kv_heads", 0);
  op->window = attribute_int(info, "window", 0), op->scale = attribute_float(info, "scale", 0);
  if (op->heads < 1 || op->kv_heads < 1 || op->heads % op->kv_heads || op->window < 0) {
    Status status = fail("Attention: heads %lld, kv_heads %lld, window %lld, expected a multiple"
                         " of kv_heads and a window of 0 or more",
                         (long long)op->heads, (long long)op->kv_heads, (long long)op->window);
    free(op);
    return status;
  }
  const char *variant = leangen_kernels_variant(NULL);
  op->rotate = (rotate_fn)leangen_kernels_find(variant, "rotate");
  op->attend = (attend_fn)leangen_kernels_find(variant, "attend");
  *kernel = op;
  return NULL;
}

static Status infer(const CustomOp *self, void *context) {
  (void)self;
  TRY(infer_like(context, 1, 1));
  return infer_like(context, 2, 2);
}

static const char *name(const CustomOp *op) { return (void)op, "Attention"; }
static int input_type(const CustomOp *op, size_t index) {
  return (void)op, index == 3 ? TENSOR_INT32 : TENSOR_FLOAT;
}
static int output_type(const CustomOp *op, size_t index) {
  return (void)op, (void)index, TENSOR_FLOAT;
}
static size_t inputs(const CustomOp *op) { return (void)op, 6; }
static size_t outputs(const CustomOp *op) { return (void)op, 3; }

const CustomOp attention_op = {
    OP_COMMON,
    .name = name,
    .input_type = input_type,
    .input_count = inputs,
    .output_type = output_type,
    .output_count = outputs,
    .input_characteristic = op_none,
    .create_v2 = create,
    .compute_v2 = compute,
    .destroy = free,
    .infer_shape = infer,
};
