/* Linear: y = activation(norm(x) w^T + bias) + residual, weights packed as layout.py says.
 *
 *   x         float [..., k]
 *   weights   uint8 [bytes of layout.pack]
 *   gain      float [k], optional: norm of each row of x first
 *   bias      float [outputs], optional
 *   residual  float [..., outputs], optional
 *   shift     float [k], added by the norm; with norm "layer" and there needed
 *   -> y      float [..., outputs]
 *
 * Attributes: k, n (rows of the weights), form (a name of layout.FORMS), activations ("int8" or
 * "fp32"), norm ("rms" or "layer"), epsilon (of the norm), activation (none, "gelu", "gelu_tanh",
 * "relu"), gated: 1 where rows of gate and up stand by turns of 16, the output is silu(gate) * up +
 * bias (or gelu_tanh(gate), where that is the activation) and `outputs` is n / 2 instead of n.
 *
 * ArgmaxLinear: the largest of norm(x) w^T + bias of each row, without its n products in memory.
 *
 *   x, weights, gain, bias as above; shift is input 4
 *   -> index  int64 [...], the lowest of several; of the first NaN if there is one
 *   -> most   float [...]
 *
 * Attributes: k, n, form, activations, norm, epsilon. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "linear.h"

enum { ROWS = 16, MAX_PARTS = 64 };

/* Scales as bytes times a unit for so many weights of a row. */
enum { SPLIT = 2, SUPER = 256 };

/* Parts are multiples of so many groups, as a kernel for more than two tokens works on as many. */
enum { STEP = 4, FEW_TOKENS = 2 };

/* Activation rows that are worked on at once: they should stay in the second-level cache. */
enum { CHUNK_BYTES = 128 << 10 };

/* A part smaller than this costs more to hand to a thread than to run: weight bytes x tokens. */
enum { PART_WORK = 8 << 10 };

/* Rows whose products are held at once where only the largest is kept. */
enum { ARGMAX_CHUNK = 8 };

typedef struct {
  Linear op;
  Tensor constants[LINEAR_INPUTS];
} Kernel;

typedef LinearJob Job;

static const struct form {
  const char *name, *kernel;
  int64_t bits, minimum, held, block, table; /* held: scales are 0 fp16, 1 fp32, 2 split */
} forms[] = {
    {"q4", "q4", 4, 0, 0, 32, 0},
    {"q4_wide", "q4", 4, 0, 1, 32, 0},
    {"q4_min", "q4_min", 4, 1, 0, 32, 0},
    {"q4_min_wide", "q4_min", 4, 1, 1, 32, 0},
    {"q4_min_split", "q4_min", 4, 1, 2, 32, 0},
    {"q5", "q5", 5, 0, 0, 32, 0},
    {"q5_wide", "q5", 5, 0, 1, 32, 0},
    {"q5_min", "q5_min", 5, 1, 0, 32, 0},
    {"q5_min_wide", "q5_min", 5, 1, 1, 32, 0},
    {"q5_min_split", "q5_min", 5, 1, 2, 32, 0},
    {"q8", "q8", 8, 0, 0, 32, 0},
    {"q8_wide", "q8", 8, 0, 1, 32, 0},
    {"q8_min", "q8_min", 8, 1, 0, 32, 0},
    {"q8_min_wide", "q8_min", 8, 1, 1, 32, 0},
    {"q4_g16", "q4_g16", 4, 0, 0, 16, 0},
    {"q4_g16_wide", "q4_g16", 4, 0, 1, 16, 0},
    {"q4_min_g16", "q4_min_g16", 4, 1, 0, 16, 0},
    {"q4_min_g16_wide", "q4_min_g16", 4, 1, 1, 16, 0},
    {"q6_g16", "q6_g16", 6, 0, 0, 16, 0},
    {"q6_g16_wide", "q6_g16", 6, 0, 1, 16, 0},
    {"q6_g16_split", "q6_g16", 6, 0, 2, 16, 0},
    {"q8_g16", "q8_g16", 8, 0, 0, 16, 0},
    {"q8_g16_wide", "q8_g16", 8, 0, 1, 16, 0},
    {"nf4_wide", "nf4", 4, 0, 1, 32, 1},
    {"fp4_wide", "fp4", 4, 0, 1, 32, 1},
};

static const struct form *find_form(const char *name) {
  for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
    if (!strcmp(forms[i].name, name)) return &forms[i];
  return NULL;
}

/* The kernels for weights of a form; `activation` is none where it is NULL. */
static Status find_kernels(Linear *op, const struct form *form, int floats, int layer,
                           const char *activation) {
  const char *variant = leangen_kernels_variant(NULL);
  char name[64];
  snprintf(name, sizeof name, "%s%s", floats ? "keep" : "quantize", form->block == 16 ? "_16" : "");
  op->pack_row = leangen_kernels_find(variant, name);
  if (layer)
    op->layer_norm = leangen_kernels_find(variant, "layer_norm");
  else
    op->rms_norm = leangen_kernels_find(variant, "rms_norm");
  op->add = leangen_kernels_find(variant, "add");
  op->gate = leangen_kernels_find(variant, activation ? "gelu_tanh_multiply" : "silu_multiply");
  if (activation && !op->gated) op->activate = leangen_kernels_find(variant, activation);
  for (int i = 0; i < LINEAR_TILES; i++) {
    snprintf(name, sizeof name, "%s_%s_%d", floats ? "fp32" : "int8", form->kernel, 1 << i);
    op->tiles[i] = leangen_kernels_find(variant, name);
  }
  if (!op->tiles[0]) return fail("Linear: the library has no kernels for form '%s'", form->name);
  return NULL;
}

Status linear_init(Linear *op, Options from, int argmax) {
  static const char *const kinds[] = {"int8", "fp32", NULL};
  static const char *const norms[] = {"rms", "layer", NULL};
  static const char *const activations[] = {"none", "gelu_tanh", "gelu", "relu", NULL};
  char form_name[32];
  int floats, layer, activation;
  attribute_string(from, "form", form_name, sizeof form_name);
  const struct form *form = find_form(form_name);
  if (!form) return fail("Linear: form '%s' is unknown", form_name);
  TRY(attribute_word(from, "Linear", "activations", kinds, &floats));
  TRY(attribute_word(from, "Linear", "norm", norms, &layer));
  TRY(attribute_word(from, "Linear", "activation", activations, &activation));
  if (form->table && !floats)
    return fail("Linear: form '%s' with int8 activations, expected fp32", form_name);
  int64_t k = attribute_int(from, "k", 0), n = attribute_int(from, "n", 0);
  int64_t gated = attribute_int(from, "gated", 0);
  if (k < 1 || n < 1 || k > 1 << 24 || n > 1 << 24)
    return fail("Linear: n %lld, k %lld, expected 1 to 2**24", (long long)n, (long long)k);
  if (gated && n % (2 * ROWS))
    return fail("Linear: gated with n %lld, expected a multiple of 32", (long long)n);
  if (argmax && (gated || activation)) return fail("ArgmaxLinear: takes no gate and no activation");
  if (gated && activation > 1)
    return fail("Linear: gated with activation '%s', expected none (SiLU) or gelu_tanh",
                activations[activation]);

  memset(op, 0, sizeof *op);
  op->k = k, op->n = n, op->gated = gated != 0, op->held = form->held, op->argmax = argmax;
  op->outputs = gated ? n / 2 : n;
  op->center = form->table || (form->minimum && form->bits < 8) ? 0 : 1 << (form->bits - 1);
  op->blocks = up_to(k, form->block) / form->block, op->groups = up_to(n, ROWS) / ROWS;
  int64_t numbers = 1 + form->minimum, number = form->held == SPLIT ? 1 : 2 << form->held;
  op->group_bytes = op->blocks * ROWS * (form->block * form->bits / 8 + number * numbers);
  if (form->held == SPLIT) op->group_bytes += up_to(k, SUPER) / SUPER * ROWS * 2 * numbers;
  op->row_block_bytes = floats ? 4 * form->block + 4 : form->block + 8;
  op->row_bytes = op->blocks * op->row_block_bytes;
  op->epsilon = attribute_float(from, "epsilon", 1e-5f);
  return find_kernels(op, form, floats, layer, activation ? activations[activation] : NULL);
}

/* Pack the activation rows of one part; those that fill up the last tile, unused, are zeros. */
static void pack_rows(void *given, int64_t part, int64_t thread) {
  const Job *job = given;
  const Linear *op = job->op;
  int64_t first = job->padded * part / job->pack_parts;
  int64_t last = job->padded * (part + 1) / job->pack_parts;
  int64_t normed = (int64_t)(job->work + job->work_bytes * thread);
  for (int64_t i = first; i < last; i++) {
    int64_t slot = i % job->tile, stride = op->row_block_bytes * job->tile;
    char *row = job->rows + op->row_bytes * (i - slot) + op->row_block_bytes * slot;
    if (i >= job->tokens) {
      for (int64_t block = 0; block < op->blocks; block++)
        memset(row + stride * block, 0, (size_t)op->row_block_bytes);
      continue;
    }
    int64_t x = (int64_t)(job->x + 4 * op->k * i);
    if (job->gain) {
      if (op->layer_norm)
        CALL_KERNEL(op->layer_norm, x, (int64_t)job->gain, (int64_t)job->shift, normed, op->k,
                    op->epsilon);
      else
        CALL_KERNEL(op->rms_norm, x, (int64_t)job->gain, normed, op->k, op->epsilon);
      x = normed;
    }
    CALL_KERNEL(op->pack_row, x, (int64_t)row, stride, op->k, op->center);
  }
}

/* A norm's gain is used once a token, and short. */
static void ask_for_gain(const void *given, int64_t part) {
  (void)part;
  const Job *job = given;
  for (int64_t i = 0; job->gain && i < 4 * job->op->k; i += LINE) __builtin_prefetch(job->gain + i);
}

/* The largest of a row of products, the first of which is that of weight row `first`. */
static Largest largest_of(const float *row, int64_t first, int64_t count) {
  Largest found = {first, row[0]};
  for (int64_t i = 1; i < count; i++)
    if (row[i] > found.value || (row[i] != row[i] && found.value == found.value))
      found = (Largest){first + i, row[i]};
  return found;
}

/* The outputs of one part: some groups of weight rows, for some or all tokens. */
static void multiply(void *given, int64_t part, int64_t thread) {
  const Job *job = given;
  const Linear *op = job->op;
  int64_t shrink = op->gated ? 2 : 1, steps = up_to(op->groups, job->step) / job->step;
  int64_t row_part = part / job->token_parts, token_part = part % job->token_parts;
  int64_t first = steps * row_part / job->row_parts * job->step;
  int64_t last = steps * (row_part + 1) / job->row_parts * job->step;
  last = smaller(last, op->groups);
  int64_t from = first * ROWS / shrink; /* columns of y */
  int64_t width = smaller(last * ROWS / shrink, op->outputs) - from;
  int64_t chunks = up_to(job->tokens, job->chunk) / job->chunk;
  char *work = job->work + job->work_bytes * thread;
  int64_t start = chunks * token_part / job->token_parts * job->chunk;
  int64_t end = smaller(chunks * (token_part + 1) / job->token_parts * job->chunk, job->tokens);
  for (; start < end; start += job->chunk) {
    int64_t tokens = smaller(end - start, job->chunk);
    int64_t x = (int64_t)(job->rows + op->row_bytes * start);
    int64_t stride = 4 * op->outputs, y = (int64_t)job->y + stride * start;
    int64_t out = y, out_stride = stride;
    if (op->gated || op->argmax) { /* products go to work, as if it began at group 0 */
      out_stride = 4 * ROWS * (last - first);
      out = (int64_t)work - 4 * ROWS * first;
    }
    CALL_KERNEL(job->kernel, x, (int64_t)job->weights, op->blocks, out, out_stride, tokens, op->n,
                first, last, op->held);
    for (int64_t i = 0; i < tokens; i++) {
      int64_t row = op->argmax ? (int64_t)work + out_stride * i : y + stride * i + 4 * from;
      if (op->gated)
        CALL_KERNEL(op->gate, (int64_t)work + out_stride * i, row, width);
      if (job->bias) CALL_KERNEL(op->add, (int64_t)(job->bias + 4 * from), row, width);
      if (op->activate) CALL_KERNEL(op->activate, row, width);
      if (job->residual) {
        int64_t residual = (int64_t)job->residual + stride * (start + i) + 4 * from;
        CALL_KERNEL(op->add, residual, row, width);
      }
      if (op->argmax)
        job->largest[job->tokens * row_part + start + i] =
            largest_of((const float *)row, from, width);
    }
  }
}

static Status check(const Linear *op, const Tensor *in) {
  const Tensor *x = &in[X], *weights = &in[WEIGHTS], *gain = &in[GAIN], *shift = &in[SHIFT];
  const Tensor *bias = &in[BIAS], *residual = &in[RESIDUAL];
  if (!x->rank || x->dims[x->rank - 1] != op->k)
    return fail("Linear: the last dimension of x is %lld, expected k = %lld",
                (long long)(x->rank ? x->dims[x->rank - 1] : 0), (long long)op->k);
  int64_t bytes = op->groups * op->group_bytes;
  if (weights->count != bytes)
    return fail("Linear: weights hold %lld bytes, expected %lld for n = %lld, k = %lld",
                (long long)weights->count, (long long)bytes, (long long)op->n, (long long)op->k);
  if (gain->data && gain->count != op->k)
    return fail("Linear: gain has %lld elements, expected k = %lld", (long long)gain->count,
                (long long)op->k);
  if (op->layer_norm && gain->data && (!shift->data || shift->count != op->k))
    return fail("Linear: shift has %lld elements, expected k = %lld with norm layer",
                (long long)(shift->data ? shift->count : 0), (long long)op->k);
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
  return larger(smaller(work / PART_WORK, MAX_PARTS), 1);
}

Status linear_plan(const Linear *op, const Tensor *in, Job *job) {
  TRY(check(op, in));
  *job = (Job){.op = op, .tokens = in[X].count / op->k};
  int tile = 0;
  for (int i = 1; i < LINEAR_TILES && 1 << (i - 1) < job->tokens; i++)
    if (op->tiles[i]) tile = i;
  job->kernel = op->tiles[tile];
  job->tile = 1 << tile;
  job->padded = up_to(job->tokens, job->tile);
  int64_t chunks = job->tokens * op->row_bytes / CHUNK_BYTES + 1; /* of one size, or nearly */
  job->chunk = op->argmax ? ARGMAX_CHUNK : up_to((job->tokens + chunks - 1) / chunks, job->tile);
  job->chunk = smaller(job->chunk, job->padded);

  job->pack_parts = job->tokens < ROWS ? 1 : parts_for(4 * in[X].count);
  /* gate and up stand in neighbouring groups */
  job->step = job->tokens > FEW_TOKENS ? STEP : 1 + op->gated;
  int64_t steps = up_to(op->groups, job->step) / job->step;
  int64_t work = op->groups * op->group_bytes * job->tokens;
  job->row_parts = smaller(parts_for(work), steps);
  /* few rows of weights are too few parts to share out evenly */
  job->token_parts = op->argmax ? 1 : smaller(larger(MAX_PARTS / job->row_parts, 1), chunks);
  int64_t parts = job->row_parts * job->token_parts;
  job->work_bytes = up_to(4 * op->k, 64); /* of a thread, for a normed row or products */
  int64_t products_bytes = 4 * ROWS * job->step * (steps / job->row_parts + 1) * job->chunk;
  if ((op->gated || op->argmax) && products_bytes > job->work_bytes)
    job->work_bytes = products_bytes;
  job->rows_bytes = up_to(job->padded * op->row_bytes, 64);
  job->largest_at = job->rows_bytes + job->work_bytes * MOST_THREADS;
  int64_t largest_bytes = op->argmax ? parts * job->tokens * (int64_t)sizeof(Largest) : 0;
  job->bytes = job->largest_at + largest_bytes;
  return NULL;
}

size_t linear_phases(Job *job, const Tensor *in, void *y, char *memory, Phase *phases) {
  job->x = in[X].data, job->weights = in[WEIGHTS].data, job->y = y;
  job->gain = in[GAIN].data, job->shift = in[SHIFT].data;
  job->bias = in[BIAS].data, job->residual = in[RESIDUAL].data;
  job->rows = memory, job->work = memory + job->rows_bytes;
  job->largest = (Largest *)(memory + job->largest_at);
  if (!job->tokens) return 0;
  phases[0] = (Phase){.part = pack_rows, .ask = ask_for_gain, .job = job,
                      .parts = (int32_t)job->pack_parts};
  phases[1] = (Phase){.part = multiply, .job = job,
                      .parts = (int32_t)(job->row_parts * job->token_parts)};
  return 2;
}

static Status compute(void *self, void *context) {
  const Kernel *kernel = self;
  const Linear *op = &kernel->op;
  Tensor in[LINEAR_INPUTS], *x = &in[X];
  TRY(get_inputs(context, kernel->constants, LINEAR_INPUTS - op->argmax, in));
  if (op->argmax) in[SHIFT] = in[RESIDUAL], in[RESIDUAL] = (Tensor){0};
  Job job;
  TRY(linear_plan(op, in, &job));
  int64_t dims[MAX_RANK], *indices = NULL;
  void *y = NULL;
  float *values = NULL;
  memcpy(dims, x->dims, sizeof dims);
  dims[x->rank - 1] = op->outputs;
  if (op->argmax) {
    TRY(get_output(context, 0, dims, x->rank - 1, (void **)&indices));
    TRY(get_output(context, 1, dims, x->rank - 1, (void **)&values));
  } else {
    TRY(get_output(context, 0, dims, x->rank, &y));
  }
  char *memory = scratch((size_t)job.bytes);
  if (!memory) return fail("Linear: out of memory for %lld tokens", (long long)job.tokens);
  Phase phases[LINEAR_PHASES];
  TRY(run_phases(context, phases, linear_phases(&job, in, y, memory, phases)));
  for (int64_t i = 0; indices && i < job.tokens; i++) {
    Largest found = job.largest[i];
    for (int64_t part = 1; part < job.row_parts; part++) {
      Largest other = job.largest[part * job.tokens + i];
      if (other.value > found.value || (other.value != other.value && found.value == found.value))
        found = other;
    }
    indices[i] = found.index, values[i] = found.value;
  }
  return NULL;
}

static Status create(const CustomOp *self, const void *api, const void *info, void **made) {
  (void)api;
  int argmax = self == &argmax_linear_op;
  Kernel *kernel = malloc(sizeof *kernel);
  if (!kernel) return fail("Linear: out of memory");
  Status status = linear_init(&kernel->op, (Options){info, -1}, argmax);
  if (!status) status = read_constants(info, (size_t)(LINEAR_INPUTS - argmax), kernel->constants);
  if (status) return free(kernel), status;
  *made = kernel;
  return NULL;
}

Status linear_infer(const CustomOp *self, void *context) {
  (void)self;
  int64_t n, gated;
  TRY(infer_attribute_int(context, "n", 0, &n));
  TRY(infer_attribute_int(context, "gated", 0, &gated));
  return infer_like_first(context, 0, gated ? n / 2 : n);
}

OPERATOR(linear_op, "Linear", LINEAR_INPUTS, 1, OP_ON_CPU, OP_WEIGHTED, .output_type = op_float,
         .infer_shape = linear_infer);

static int argmax_output_type(const CustomOp *op, size_t index) {
  return (void)op, index ? TENSOR_FLOAT : TENSOR_INT64;
}

OPERATOR(argmax_linear_op, "ArgmaxLinear", LINEAR_INPUTS - 1, 2, OP_ON_CPU, OP_WEIGHTED,
         .output_type = argmax_output_type);
