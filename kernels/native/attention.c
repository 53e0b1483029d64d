/* Attention: rotary grouped-query attention that appends to a preallocated cache.
 *
 *   qkv          float [batch, new, (heads + 2 kv_heads) * width]
 *   past_key     [batch, kv_heads, capacity, columns], opaque: cache_layout.py says what it holds
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

#include "attention.h"

enum { ROWS = 16, CHUNK = 64, MAX_PARTS = 64 };

/* A part with fewer multiplications than this costs more to hand to a thread than to run. */
enum { PART_WORK = 16 << 10 };

/* Fewer heads times tiles of queries than this are cut along the keys as well. */
enum { FEW_TILES = 16 };

typedef struct {
  Attention op;
  Tensor constants[ATTENTION_INPUTS];
} Kernel;

typedef AttentionJob Job;

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

/* From `first`, `count` of `all` numbers: heads side by side, normed into `to` if there is a gain. */
static const float *norm(const Attention *op, const float *from, int64_t all, int64_t first,
                         int64_t count, const Tensor *gain, float *to) {
  if (!gain->data) return from + first;
  int64_t begin = gain->count == all ? 0 : first, end = gain->count == all ? all : first + count;
  for (int64_t i = begin; i < end; i += gain->count)
    CALL_KERNEL(op->rms_norm, (int64_t)(from + i), (int64_t)gain->data, (int64_t)(to + i),
                gain->count, op->epsilon);
  return to + first;
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

/* The query rows of a head beyond the last are computed too. */
static void clear_unused(const Job *job, int64_t head) {
  int64_t queries = job->tile->queries, group = job->op->heads / job->op->kv_heads;
  int64_t used = job->new * group - (job->tiles - 1) * queries;
  float *tile = job->q + ((head + 1) * job->tiles - 1) * queries * job->width;
  for (int64_t i = 0; i < job->width; i++)
    for (int64_t row = used; row < queries; row++) tile[i * queries + row] = 0;
}

/* Rotate a head's keys and its queries, of some heads and tokens; append to the cache. */
static void append(void *given, int64_t part, int64_t thread) {
  const Job *job = given;
  const Attention *op = job->op;
  int64_t width = job->width, group = op->heads / op->kv_heads, queries = job->tile->queries;
  int64_t all = job->batch * job->new * op->kv_heads;
  float *turned = job->work + job->work_floats * thread, *normed = turned + 2 * width;
  char *narrowed = (char *)(turned + width);
  int64_t first = all * part / job->append_parts;
  int64_t last = all * (part + 1) / job->append_parts;
  for (int64_t i = first; i < last; i++) {
    int64_t kv_head = i % op->kv_heads, sequence = i / op->kv_heads / job->new;
    int64_t token = i / op->kv_heads % job->new, head = sequence * op->kv_heads + kv_head;
    int64_t position = past_of(job, sequence) + token, lane = position % ROWS;
    const float *row = job->qkv + i / op->kv_heads * (op->heads + 2 * op->kv_heads) * width;
    const float *from = norm(op, row, op->heads * width, kv_head * group * width, group * width,
                             &job->query_gain, normed);
    for (int64_t j = 0; j < group; j++, from += width) {
      turn(job, from, turned, position, job->scale);
      int64_t query = token * group + j;
      float *to = job->q + (head * job->tiles + query / queries) * queries * width + query % queries;
      for (int64_t d = 0; d < width; d++) to[d * queries] = turned[d];
    }
    if (token == job->new - 1) clear_unused(job, head);
    int64_t block = head * job->head_bytes + position / ROWS * job->block_bytes;
    row += op->heads * width;
    from = norm(op, row, op->kv_heads * width, kv_head * width, width, &job->key_gain, normed);
    turn(job, from, turned, position, 1);
    store(job, job->keys + block, lane, turned, narrowed, 1);
    row += (op->kv_heads + kv_head) * width;
    store(job, job->values + block, lane, row, narrowed, 0);
  }
}

/* Where the new keys and values go was last used a token ago. */
static void ask_for_places(const void *given, int64_t part) {
  const Job *job = given;
  if (part || job->new > 1) return;
  for (int64_t head = 0; head < job->batch * job->op->kv_heads; head++) {
    int64_t position = past_of(job, head / job->op->kv_heads);
    int64_t block = head * job->head_bytes + position / ROWS * job->block_bytes;
    int64_t row = position % ROWS * job->width * job->op->size;
    for (int64_t i = 0; i < job->block_bytes; i += LINE) __builtin_prefetch(job->keys + block + i, 1);
    for (int64_t i = 0; i < job->width * job->op->size; i += LINE)
      __builtin_prefetch(job->values + block + row + i, 1);
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
static void attend_tiles(void *given, int64_t part, int64_t thread) {
  const Job *job = given;
  int64_t heads = job->batch * job->op->kv_heads, all = heads * job->tiles, first;
  float *state = job->work + job->work_floats * thread, *more = state + job->state_floats;
  float *scores = more + job->state_floats;
  for (int64_t i = part; i < all; i += job->parts) {
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

/* The keys that part `part` begins with: what follows, the kernel asks for. */
static void ask_for_keys(const void *given, int64_t part) {
  const Job *job = given;
  int64_t units = job->batch * job->op->kv_heads * job->tiles * job->chunks;
  int64_t unit = units * part / job->parts, head = unit / job->chunks / job->tiles;
  int64_t bytes = CHUNK / ROWS * job->block_bytes;
  const char *keys = job->keys + head * job->head_bytes + unit % job->chunks * bytes;
  for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(keys + i);
}

/* Some chunks of all tiles, to be merged after. */
static void attend_chunks(void *given, int64_t part, int64_t thread) {
  const Job *job = given;
  int64_t all = job->batch * job->op->kv_heads * job->tiles * job->chunks, first;
  float *scores = job->work + job->work_floats * thread;
  int64_t begin = all * part / job->parts, end = all * (part + 1) / job->parts;
  for (int64_t i = begin; i < end; i++) {
    int64_t chunk = i % job->chunks, tile = i / job->chunks % job->tiles;
    int64_t head = i / job->chunks / job->tiles;
    if (chunk >= chunks_of(job, head, tile, &first) || chunk < first) continue;
    attend_chunk(job, head, tile, chunk, scores, job->states + i * job->state_floats);
  }
}

/* Part `part` is one tile of a head. */
static void merge_chunks(void *given, int64_t part, int64_t thread) {
  (void)thread;
  const Job *job = given;
  int64_t head = part / job->tiles, tile = part % job->tiles, first;
  int64_t chunks = chunks_of(job, head, tile, &first);
  float *states = job->states + part * job->chunks * job->state_floats;
  float *state = states + first * job->state_floats;
  while (++first < chunks)
    CALL_KERNEL(job->op->merge, (int64_t)state, (int64_t)(states + first * job->state_floats),
                job->width, job->tile->queries);
  finish_tile(job, head, tile, state);
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

static const AttentionTile *tile_for(const Attention *op, int64_t rows, int64_t width) {
  const AttentionTile *tile = op->tiles + (rows < op->tiles[0].queries);
  while (!tile->attend || width % (ROWS * tile->columns)) tile++;
  return tile;
}

Status attention_plan(const Attention *op, const Tensor *in, Job *job) {
  TRY(check(op, in));
  int64_t batch = in[QKV].dims[0], new = in[QKV].dims[1], columns = in[KEY].dims[3];
  int64_t width = columns - (op->scaled ? 4 : 0), rows = new * (op->heads / op->kv_heads);
  *job = (Job){.op = op, .last = in[LENGTHS].data, .batch = batch, .new = new,
               .capacity = in[KEY].dims[2], .width = width, .tile = tile_for(op, rows, width),
               .scale = op->scale != 0 ? op->scale : 1 / sqrtf((float)width),
               .block_bytes = ROWS * columns * op->size};
  int64_t queries = job->tile->queries, seen = 0; /* keys of the longest sequence */
  job->tiles = up_to(rows, queries) / queries;
  job->head_bytes = job->capacity / ROWS * job->block_bytes;
  for (int64_t i = 0; i < batch; i++) seen = larger(seen, past_of(job, i) + new);
  job->chunks = up_to(seen, CHUNK) / CHUNK;
  int64_t tiles = batch * op->kv_heads * job->tiles;
  job->split = tiles < FEW_TILES && job->chunks > 1;
  int64_t units = job->split ? tiles * job->chunks : tiles;
  job->state_floats = up_to(queries * (width + 2), ROWS);
  job->work_floats = larger(2 * job->state_floats + CHUNK * queries, (op->heads + 2) * width);
  job->work_floats = up_to(job->work_floats, ROWS);
  job->states_at = up_to(tiles * queries * width, ROWS);
  job->work_at = job->states_at + (job->split ? units * job->state_floats : 0);
  job->append_parts = smaller(batch * new * op->kv_heads, MAX_PARTS);
  job->parts = parts_for(2 * tiles * queries * width * (seen - new / 2), units);
  job->bytes = (job->work_at + job->work_floats * MOST_THREADS) * (int64_t)sizeof(float);
  return NULL;
}

Status attention_caches(void *context, size_t first, const Tensor *in, Job *job) {
  size_t bytes = (size_t)(in[KEY].count * job->op->size);
  TRY(get_output(context, first, in[KEY].dims, 4, (void **)&job->keys));
  TRY(get_output(context, first + 1, in[VALUE].dims, 4, (void **)&job->values));
  if (job->keys != in[KEY].data) memcpy(job->keys, in[KEY].data, bytes);
  if (job->values != in[VALUE].data) memcpy(job->values, in[VALUE].data, bytes);
  return NULL;
}

size_t attention_phases(Job *job, const Tensor *in, void *y, char *memory, Phase *phases) {
  job->qkv = in[QKV].data, job->y = y;
  job->cosines = in[COSINES].data, job->sines = in[SINES].data;
  job->query_gain = in[QUERY_GAIN], job->key_gain = in[KEY_GAIN];
  job->q = (float *)memory;
  job->states = job->q + job->states_at, job->work = job->q + job->work_at;
  if (!job->batch || !job->new) return 0;
  phases[0] = (Phase){.part = append, .ask = ask_for_places, .job = job,
                      .parts = (int32_t)job->append_parts};
  phases[1] = (Phase){.part = job->split ? attend_chunks : attend_tiles, .job = job,
                      .parts = (int32_t)job->parts};
  if (job->split) phases[1].ask = ask_for_keys;
  phases[2] = (Phase){.part = merge_chunks, .job = job,
                      .parts = (int32_t)(job->batch * job->op->kv_heads * job->tiles)};
  return job->split ? 3 : 2;
}

static Status compute(void *self, void *context) {
  const Kernel *kernel = self;
  Tensor in[ATTENTION_INPUTS];
  TRY(get_inputs(context, kernel->constants, ATTENTION_INPUTS, in));
  Job job;
  TRY(attention_plan(&kernel->op, in, &job));
  void *y;
  int64_t dims[] = {job.batch, job.new, job.op->heads * job.width};
  TRY(get_output(context, 0, dims, 3, &y));
  TRY(attention_caches(context, 1, in, &job));
  char *memory = scratch((size_t)job.bytes);
  if (!memory) return fail("Attention: out of memory for %lld tokens", (long long)job.new);
  Phase phases[ATTENTION_PHASES];
  return run_phases(context, phases, attention_phases(&job, in, y, memory, phases));
}

Status attention_init(Attention *op, Options from) {
  static const char *const caches[] = {"fp32", "fp16", "int8", NULL};
  static const int types[] = {TENSOR_FLOAT, TENSOR_FLOAT16, TENSOR_INT8}, sizes[] = {4, 2, 1};
  int cache;
  TRY(attribute_word(from, "Attention", "cache", caches, &cache));
  int64_t heads = attribute_int(from, "heads", 0), kv_heads = attribute_int(from, "kv_heads", 0);
  int64_t window = attribute_int(from, "window", 0);
  if (heads < 1 || kv_heads < 1 || heads % kv_heads || window < 0)
    return fail("Attention: heads %lld, kv_heads %lld, window %lld, expected a multiple of"
                " kv_heads and a window of 0 or more",
                (long long)heads, (long long)kv_heads, (long long)window);
  *op = (Attention){.heads = heads, .kv_heads = kv_heads, .window = window};
  op->scale = attribute_float(from, "scale", 0);
  op->epsilon = attribute_float(from, "epsilon", 1e-5f);
  op->type = types[cache], op->size = sizes[cache], op->scaled = types[cache] == TENSOR_INT8;
  const char *variant = leangen_kernels_variant(NULL);
  op->rms_norm = leangen_kernels_find(variant, "rms_norm");
  op->rotate = leangen_kernels_find(variant, "rotate");
  op->merge = leangen_kernels_find(variant, "merge");
  op->finish = leangen_kernels_find(variant, "finish");
  char kernel_name[64];
  snprintf(kernel_name, sizeof kernel_name, "narrow_%s", caches[cache]);
  op->narrow = leangen_kernels_find(variant, kernel_name); /* none for fp32 */
  static const int shapes[][2] = {{8, 2}, {4, 4}, {4, 1}};
  for (int i = 0; i < 3; i++) {
    snprintf(kernel_name, sizeof kernel_name, "attend_%s_%d_%d", caches[cache], shapes[i][0],
             shapes[i][1]);
    op->tiles[i] =
        (AttentionTile){shapes[i][0], shapes[i][1], leangen_kernels_find(variant, kernel_name)};
  }
  if (!op->tiles[2].attend) return fail("Attention: the library has no kernel %s", kernel_name);
  return NULL;
}

static Status create(const CustomOp *self, const void *api, const void *info, void **made) {
  (void)self, (void)api;
  Kernel *kernel = malloc(sizeof *kernel);
  if (!kernel) return fail("Attention: out of memory");
  Status status = attention_init(&kernel->op, (Options){info, -1});
  if (!status) status = read_constants(info, ATTENTION_INPUTS, kernel->constants);
  if (status) return free(kernel), status;
  *made = kernel;
  return NULL;
}

Status attention_infer(const CustomOp *self, void *context) {
  (void)self;
  TRY(infer_like(context, 1, KEY));
  return infer_like(context, 2, VALUE);
}

int attention_input_type(const CustomOp *op, size_t index) {
  if (index == KEY || index == VALUE) return ANY_TYPE;
  return (void)op, index == LENGTHS ? TENSOR_INT32 : TENSOR_FLOAT;
}

int attention_input_needed(const CustomOp *op, size_t index) {
  return (void)op, index < COSINES ? REQUIRED : OPTIONAL;
}

int attention_output_type(const CustomOp *op, size_t index) {
  return (void)op, index ? ANY_TYPE : TENSOR_FLOAT;
}

OPERATOR(attention_op, "Attention", ATTENTION_INPUTS, ATTENTION_OUTPUTS, OP_ON_CPU, OP_ATTENDING);
