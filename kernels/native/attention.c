/* Attention: rotary grouped-query attention that appends to a preallocated cache.
 *
 *   qkv          float [batch, new, (heads + 2 kv_heads) * width]
 *   past_key     [batch, kv_heads, capacity, columns], opaque: layout.py says what it holds
 *   past_value   as past_key
 *   seqlens_k    int32 [batch]: positions in the cache after this run, less one
 *   cosines      float [positions, width / 2], optional: no rotation without
 *   sines        float [positions, width / 2], as cosines
 *   query_gain   float [width] or [heads * width], optional: an RMS norm of queries before they are
 *                rotated, of each head or of all
 *   key_gain     float [width] or [kv_heads * width], likewise of keys
 *   -> y         float [batch, new, heads * width]
 *   present_key, present_value: as the past; bind them to the same buffers, else they are copied
 *
 * Attributes: heads, kv_heads, scale (default 1 / sqrt(width)), window (keys seen, default all),
 * cache ("fp32", "fp16" or "int8", the type of the caches; columns are width, or width + 4 for
 * int8), epsilon (of the norms). capacity and width are multiples of 16. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "op.h"

enum { ROWS = 16, CHUNK = 64, MAX_PARTS = 64 };

/* A part with fewer multiplications than this costs more to hand to a thread than to run. */
enum { PART_WORK = 32 << 10 };

/* Fewer heads times tiles of queries than this are cut along the keys as well. */
enum { FEW_TILES = 16 };

typedef struct {
  int64_t queries, columns; /* rows at once; vectors of 16 that the width is a multiple of */
  attend_fn attend;
} Tile;

enum { QKV, KEY, VALUE, LENGTHS, COSINES, SINES, QUERY_GAIN, KEY_GAIN, INPUTS };

typedef struct {
  Tensor constants[INPUTS];
  int64_t heads, kv_heads, window;
  float scale;
  int type, size, scaled; /* of the cache */
  double epsilon;
  rms_norm_fn rms_norm;
  rotate_fn rotate;
  elementwise_fn narrow; /* NULL: as it is */
  merge_fn merge;
  finish_fn finish;
  Tile tiles[3]; /* the one for many rows, for few rows, for any width */
} Attention;

typedef struct {
  const Attention *op;
  const Tile *tile;
  const float *qkv, *cosines, *sines;
  const Tensor *query_gain, *key_gain;
  const int32_t *last;
  char *keys, *values;
  float *y, *q, *states, *work;
  float scale;
  int64_t batch, new, capacity, width, parts, tiles, chunks, work_floats, state_floats;
  int64_t block_bytes, head_bytes; /* of 16 positions, of all positions of a head */
} Job;

static int64_t past_of(const Job *job, int64_t sequence) {
  /* not below 0 for a prompt shorter than the longest of its batch */
  return larger(job->last[sequence] + (int64_t)1 - job->new, 0);
}

/* Put keys and values of one position in their places. */
static void store(const Job *job, char *block, int64_t lane, const float *row, char *narrowed,
                  int keys) {
  const Attention *op = job->op;
  int64_t width = job->width, size = op->size;
  const char *from = (const char *)row;
  if (op->narrow) {
    CALL_KERNEL(op->narrow, (int64_t)row, (int64_t)narrowed, width);
    from = narrowed;
  }
  char *to = block + lane * size * (keys ? 1 : width);
  if (!keys)
    memcpy(to, from, (size_t)(width * size));
  else if (size == 4)
    for (int64_t d = 0; d < width; d++) memcpy(to + d * 4 * ROWS, from + d * 4, 4);
  else if (size == 2)
    for (int64_t d = 0; d < width; d++) memcpy(to + d * 2 * ROWS, from + d * 2, 2);
  else
    for (int64_t d = 0; d < width; d++) to[d * ROWS] = from[d];
  if (op->scaled) memcpy(block + ROWS * width + 4 * lane, from + width, 4);
}

/* Heads side by side, normed into `to` where there is a gain. */
static const float *norm(const Attention *op, const float *from, int64_t count, const Tensor *gain,
                         float *to) {
  if (!gain->data) return from;
  for (int64_t i = 0; i < count; i += gain->count)
    CALL_KERNEL(op->rms_norm, (int64_t)(from + i), (int64_t)gain->data, (int64_t)(to + i),
                gain->count, op->epsilon);
  return to;
}

/* A head as its position turns it, times `factor`. */
static void turn(const Job *job, const float *from, float *to, int64_t position, float factor) {
  int64_t half = job->width / 2;
  if (job->cosines)
    CALL_KERNEL(job->op->rotate, (int64_t)from, (int64_t)to,
                (int64_t)(job->cosines + position * half), (int64_t)(job->sines + position * half),
                half, (double)factor);
  else
    for (int64_t d = 0; d < job->width; d++) to[d] = from[d] * factor;
}

/* Rotate the queries and keys of some tokens; append keys and values to the cache. */
static void append(void *given, size_t part) {
  const Job *job = given;
  const Attention *op = job->op;
  int64_t width = job->width, group = op->heads / op->kv_heads, all = job->batch * job->new;
  int64_t queries = job->tile->queries;
  float *turned = job->work + job->work_floats * (int64_t)part, *normed = turned + 2 * width;
  char *narrowed = (char *)(turned + width);
  for (int64_t i = all * (int64_t)part / job->parts; i < all * ((int64_t)part + 1) / job->parts;
       i++) {
    int64_t sequence = i / job->new, token = i % job->new;
    int64_t position = past_of(job, sequence) + token, lane = position % ROWS;
    const float *row = job->qkv + i * (op->heads + 2 * op->kv_heads) * width;
    const float *from = norm(op, row, op->heads * width, job->query_gain, normed);
    for (int64_t head = 0; head < op->heads; head++, from += width) {
      turn(job, from, turned, position, job->scale);
      int64_t query = token * group + head % group;
      int64_t tile = (sequence * op->kv_heads + head / group) * job->tiles + query / queries;
      float *to = job->q + tile * queries * width + query % queries;
      for (int64_t d = 0; d < width; d++) to[d * queries] = turned[d];
    }
    int64_t block = sequence * op->kv_heads * job->head_bytes + position / ROWS * job->block_bytes;
    row += op->heads * width;
    from = norm(op, row, op->kv_heads * width, job->key_gain, normed);
    for (int64_t head = 0; head < op->kv_heads; head++, from += width) {
      turn(job, from, turned, position, 1);
      store(job, job->keys + block + head * job->head_bytes, lane, turned, narrowed, 1);
    }
    row += op->kv_heads * width;
    for (int64_t head = 0; head < op->kv_heads; head++, row += width)
      store(job, job->values + block + head * job->head_bytes, lane, row, narrowed, 0);
  }
}

/* One chunk of the keys for tile `tile` of a head: heads are those of all sequences. */
static void attend_chunk(const Job *job, int64_t head, int64_t tile, int64_t chunk, float *scores,
                         float *state) {
  const Attention *op = job->op;
  int64_t group = op->heads / op->kv_heads, row = tile * job->tile->queries;
  int64_t q = (int64_t)(job->q + (head * job->tiles + tile) * job->tile->queries * job->width);
  CALL_KERNEL(job->tile->attend, q, (int64_t)(job->keys + head * job->head_bytes),
              (int64_t)(job->values + head * job->head_bytes), (int64_t)scores, (int64_t)state,
              job->width, row, group, past_of(job, head / op->kv_heads), job->new, op->window,
              chunk * CHUNK);
}

/* The chunks that a tile of a head sees: from `first` up to the returned one. */
static int64_t chunks_of(const Job *job, int64_t head, int64_t tile, int64_t *first) {
  const Attention *op = job->op;
  int64_t group = op->heads / op->kv_heads, past = past_of(job, head / op->kv_heads);
  int64_t token = tile * job->tile->queries / group;
  int64_t last = smaller(((tile + 1) * job->tile->queries - 1) / group, job->new - 1);
  int64_t low = op->window ? past + token + 1 - op->window : 0;
  *first = larger(low, 0) / CHUNK;
  return (past + last) / CHUNK + 1;
}

/* The rows of y that a tile of a head is, from the state in which all its chunks are. */
static void finish_tile(const Job *job, int64_t head, int64_t tile, const float *state) {
  const Attention *op = job->op;
  int64_t group = op->heads / op->kv_heads, queries = job->tile->queries, row = tile * queries;
  for (int64_t t = 0; t < queries && row + t < job->new * group; t++) {
    int64_t token = head / op->kv_heads * job->new + (row + t) / group;
    int64_t query_head = head % op->kv_heads * group + (row + t) % group;
    CALL_KERNEL(op->finish, (int64_t)state,
                (int64_t)(job->y + (token * op->heads + query_head) * job->width), job->width,
                queries, t);
  }
}

/* Some tiles, each with all its keys; later tokens first as they take longest. */
static void attend_tiles(void *given, size_t part) {
  const Job *job = given;
  int64_t heads = job->batch * job->op->kv_heads, all = heads * job->tiles, first;
  float *state = job->work + job->work_floats * (int64_t)part, *more = state + job->state_floats;
  float *scores = more + job->state_floats;
  for (int64_t i = (int64_t)part; i < all; i += job->parts) {
    int64_t head = i % heads, tile = job->tiles - 1 - i / heads;
    int64_t chunks = chunks_of(job, head, tile, &first);
    attend_chunk(job, head, tile, first, scores, state);
    while (++first < chunks) {
      attend_chunk(job, head, tile, first, scores, more);
      CALL_KERNEL(job->op->merge, (int64_t)state, (int64_t)more, job->width, job->tile->queries);
    }
    finish_tile(job, head, tile, state);
  }
}

/* Some chunks of all tiles, to be merged after. */
static void attend_chunks(void *given, size_t part) {
  const Job *job = given;
  int64_t all = job->batch * job->op->kv_heads * job->tiles * job->chunks, first;
  float *scores = job->work + job->work_floats * (int64_t)part;
  for (int64_t i = (int64_t)part; i < all; i += job->parts) {
    int64_t chunk = i % job->chunks, tile = i / job->chunks % job->tiles;
    int64_t head = i / job->chunks / job->tiles;
    if (chunk < chunks_of(job, head, tile, &first) && chunk >= first)
      attend_chunk(job, head, tile, chunk, scores, job->states + i * job->state_floats);
  }
}

static void merge_chunks(const Job *job) {
  int64_t all = job->batch * job->op->kv_heads * job->tiles, first;
  for (int64_t i = 0; i < all; i++) {
    int64_t head = i / job->tiles, tile = i % job->tiles;
    int64_t chunks = chunks_of(job, head, tile, &first);
    float *states = job->states + i * job->chunks * job->state_floats;
    float *state = states + first * job->state_floats;
    while (++first < chunks)
      CALL_KERNEL(job->op->merge, (int64_t)state, (int64_t)(states + first * job->state_floats),
                  job->width, job->tile->queries);
    finish_tile(job, head, tile, state);
  }
}

static Status check_gain(const Tensor *gain, const char *name, int64_t width, int64_t all) {
  if (gain->data && gain->count != width && gain->count != all)
    return fail("Attention: %s has %lld elements, expected %lld or %lld", name,
                (long long)gain->count, (long long)width, (long long)all);
  return NULL;
}

static Status check(const Attention *op, const Tensor *in) {
  static const char *const names[] = {"qkv", "past_key", "past_value", "seqlens_k", "cosines",
                                      "sines"};
  static const size_t ranks[] = {3, 4, 4, 1, 2, 2};
  int rotated = in[COSINES].data || in[SINES].data, given = rotated ? QUERY_GAIN : COSINES;
  for (int i = 0; i < given; i++)
    if (in[i].rank != ranks[i])
      return fail("Attention: %s has rank %zu, expected %zu", names[i], in[i].rank, ranks[i]);
  const int64_t *qkv = in[QKV].dims, *key = in[KEY].dims, *value = in[VALUE].dims;
  int64_t batch = qkv[0], capacity = key[2], width = key[3] - (op->scaled ? 4 : 0);
  if (in[KEY].type != op->type || in[VALUE].type != op->type)
    return fail("Attention: past_key and past_value are not of the type that cache says");
  if (width < 16 || width % 16 || capacity % ROWS)
    return fail("Attention: capacity %lld and width %lld, expected multiples of 16",
                (long long)capacity, (long long)width);
  if (qkv[2] != (op->heads + 2 * op->kv_heads) * width)
    return fail("Attention: qkv has %lld columns, expected %lld", (long long)qkv[2],
                (long long)((op->heads + 2 * op->kv_heads) * width));
  if (key[0] != batch || key[1] != op->kv_heads || memcmp(key, value, 4 * sizeof *key))
    return fail("Attention: past_key and past_value must be [%lld, %lld, capacity, columns]",
                (long long)batch, (long long)op->kv_heads);
  if (in[LENGTHS].dims[0] != batch)
    return fail("Attention: seqlens_k has %lld elements, expected %lld",
                (long long)in[LENGTHS].dims[0], (long long)batch);
  int64_t positions = capacity;
  for (int i = COSINES; i < given; i++) {
    if (in[i].dims[1] != width / 2)
      return fail("Attention: %s has %lld columns, expected %lld", names[i],
                  (long long)in[i].dims[1], (long long)(width / 2));
    positions = smaller(positions, in[i].dims[0]);
  }
  const int32_t *last = in[LENGTHS].data;
  for (int64_t i = 0; i < batch; i++) {
    int64_t end = larger(last[i] + (int64_t)1, qkv[1]);
    if (last[i] < 0 || end > positions)
      return fail("Attention: %lld positions, expected at most %lld, by a capacity of %lld and the "
                  "rotations", (long long)end, (long long)positions, (long long)capacity);
  }
  TRY(check_gain(&in[QUERY_GAIN], "query_gain", width, op->heads * width));
  return check_gain(&in[KEY_GAIN], "key_gain", width, op->kv_heads * width);
}

static int64_t parts_for(int64_t work, int64_t most) {
  return larger(smaller(smaller(work / PART_WORK, MAX_PARTS), most), 1);
}

static Status run(void *context, Job *job, void (*part)(void *, size_t), int64_t parts) {
  job->parts = parts;
  return run_parts(context, part, parts, job);
}

static const Tile *tile_for(const Attention *op, int64_t rows, int64_t width) {
  const Tile *tile = op->tiles + (rows < op->tiles[0].queries);
  while (!tile->attend || width % (ROWS * tile->columns)) tile++;
  return tile;
}

static Status compute(void *self, void *context) {
  const Attention *op = self;
  Tensor in[INPUTS];
  TRY(get_inputs(context, op->constants, INPUTS, in));
  TRY(check(op, in));
  int64_t batch = in[0].dims[0], new = in[0].dims[1], columns = in[1].dims[3];
  int64_t width = columns - (op->scaled ? 4 : 0), rows = new * (op->heads / op->kv_heads);
  Job job = {.op = op, .qkv = in[QKV].data, .last = in[LENGTHS].data,
             .cosines = in[COSINES].data, .sines = in[SINES].data,
             .query_gain = &in[QUERY_GAIN], .key_gain = &in[KEY_GAIN], .batch = batch, .new = new, .capacity = in[1].dims[2],
             .width = width, .tile = tile_for(op, rows, width),
             .scale = op->scale != 0 ? op->scale : 1 / sqrtf((float)width),
             .block_bytes = ROWS * columns * op->size};
  int64_t dims[] = {batch, new, op->heads * width}, queries = job.tile->queries;
  job.tiles = up_to(rows, queries) / queries;
  job.head_bytes = job.capacity / ROWS * job.block_bytes;
  TRY(get_output(context, 0, dims, 3, (void **)&job.y));
  TRY(get_output(context, 1, in[1].dims, 4, (void **)&job.keys));
  TRY(get_output(context, 2, in[2].dims, 4, (void **)&job.values));
  size_t cache_bytes = (size_t)(in[1].count * op->size);
  if (job.keys != in[1].data) memcpy(job.keys, in[1].data, cache_bytes);
  if (job.values != in[2].data) memcpy(job.values, in[2].data, cache_bytes);
  if (!batch || !new) return NULL;

  int64_t seen = 0; /* keys of the longest sequence */
  for (int64_t i = 0; i < batch; i++) seen = larger(seen, past_of(&job, i) + new);
  job.chunks = up_to(seen, CHUNK) / CHUNK;
  int64_t tiles = batch * op->kv_heads * job.tiles;
  int split = tiles < FEW_TILES && job.chunks > 1;
  int64_t units = split ? tiles * job.chunks : tiles;
  job.state_floats = up_to(queries * (width + 2), ROWS);
  job.work_floats = larger(2 * job.state_floats + CHUNK * queries, (op->heads + 2) * width);
  job.work_floats = up_to(job.work_floats, ROWS);
  int64_t q_floats = up_to(tiles * queries * width, ROWS);
  int64_t states_floats = split ? units * job.state_floats : 0;
  int64_t work = 2 * tiles * queries * width * (seen - new / 2);
  int64_t append_parts = new == 1 ? 1 : parts_for(in[0].count * 8, batch * new);
  int64_t parts = parts_for(work, units), most = larger(parts, append_parts);
  job.q = (float *)scratch((size_t)(q_floats + states_floats + job.work_floats * most) *
                           sizeof(float));
  if (!job.q) return fail("Attention: out of memory for %lld tokens", (long long)new);
  job.states = job.q + q_floats, job.work = job.states + states_floats;
  for (int64_t i = 0; i < batch * op->kv_heads; i++) { /* rows beyond the last are computed too */
    float *end = job.q + (i + 1) * job.tiles * queries * width;
    memset(end - queries * width, 0, (size_t)(queries * width) * sizeof(float));
  }
  TRY(run(context, &job, append, append_parts));
  TRY(run(context, &job, split ? attend_chunks : attend_tiles, parts));
  if (split) merge_chunks(&job);
  return NULL;
}

static Status create(const CustomOp *self, const void *api, const void *info, void **kernel) {
  (void)self, (void)api;
  static const struct {
    const char *name;
    int type, size, scaled;
  } caches[] = {{"fp32", TENSOR_FLOAT, 4, 0}, {"fp16", TENSOR_FLOAT16, 2, 0},
                {"int8", TENSOR_INT8, 1, 1}};
  char cache[16], kernel_name[64];
  attribute_string(info, "cache", cache, sizeof cache);
  if (!*cache) strcpy(cache, "fp32");
  int kind = 0;
  while (kind < 3 && strcmp(cache, caches[kind].name)) kind++;
  if (kind == 3) return fail("Attention: cache '%s', expected fp32, fp16 or int8", cache);
  int64_t heads = attribute_int(info, "heads", 0), kv_heads = attribute_int(info, "kv_heads", 0);
  int64_t window = attribute_int(info, "window", 0);
  if (heads < 1 || kv_heads < 1 || heads % kv_heads || window < 0)
    return fail("Attention: heads %lld, kv_heads %lld, window %lld, expected a multiple of"
                " kv_heads and a window of 0 or more",
                (long long)heads, (long long)kv_heads, (long long)window);
  Attention *op = calloc(1, sizeof *op);
  if (!op) return fail("Attention: out of memory");
  op->heads = heads, op->kv_heads = kv_heads, op->window = window;
  op->scale = attribute_float(info, "scale", 0);
  op->epsilon = attribute_float(info, "epsilon", 1e-5f);
  op->type = caches[kind].type, op->size = caches[kind].size, op->scaled = caches[kind].scaled;
  const char *variant = leangen_kernels_variant(NULL);
  op->rms_norm = leangen_kernels_find(variant, "rms_norm");
  op->rotate = leangen_kernels_find(variant, "rotate");
  op->merge = leangen_kernels_find(variant, "merge");
  op->finish = leangen_kernels_find(variant, "finish");
  snprintf(kernel_name, sizeof kernel_name, "narrow_%s", cache);
  op->narrow = leangen_kernels_find(variant, kernel_name); /* none for fp32 */
  static const int shapes[][2] = {{8, 2}, {4, 4}, {4, 1}};
  for (int i = 0; i < 3; i++) {
    snprintf(kernel_name, sizeof kernel_name, "attend_%s_%d_%d", cache, shapes[i][0],
             shapes[i][1]);
    op->tiles[i] = (Tile){shapes[i][0], shapes[i][1], leangen_kernels_find(variant, kernel_name)};
  }
  if (!op->tiles[2].attend) {
    free(op);
    return fail("Attention: the library has no kernel %s", kernel_name);
  }
  Status status = read_constants(info, INPUTS, op->constants);
  if (status) return free(op), status;
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
  return (void)op, index == 3 ? TENSOR_INT32 : index == 1 || index == 2 ? ANY_TYPE : TENSOR_FLOAT;
}
static int output_type(const CustomOp *op, size_t index) {
  return (void)op, index ? ANY_TYPE : TENSOR_FLOAT;
}
static int characteristic(const CustomOp *op, size_t index) {
  return (void)op, index < COSINES ? REQUIRED : OPTIONAL;
}
static size_t inputs(const CustomOp *op) { return (void)op, INPUTS; }
static size_t outputs(const CustomOp *op) { return (void)op, 3; }

const CustomOp attention_op = {
    OP_COMMON,
    .name = name,
    .input_type = input_type,
    .input_count = inputs,
    .output_type = output_type,
    .output_count = outputs,
    .input_characteristic = characteristic,
    .infer_shape = infer,
};
