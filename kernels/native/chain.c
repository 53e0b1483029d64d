/* Chain: `Linear`s and `Attention`s one after another, as one operator.
 *
 *   inputs   what the steps read from outside, in any order
 *   -> y     float, of each step in `results`
 *   -> present_key, present_value of each attention, in order
 *
 * Attributes: kinds (of each step: 0 Linear, 1 Attention), results (steps whose y is an output),
 * given (how many inputs there are), and for step i the attributes of its operator with _i behind
 * their names, and inputs_i: for each of its inputs the number of an input of the chain, or `given`
 * plus j for the y of step j, or -1 for none.
 *
 * ORT's threads are woken once, not at each of a hundred and more operators, which for one token
 * cost a tenth of the time. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "linear.h"

enum { LINEAR, ATTENTION };
enum { MOST_STEPS = 1024, MOST_INPUTS = 8, MOST_PHASES = 3 };

typedef struct {
  int64_t kind, inputs[MOST_INPUTS];
  size_t input_count;
  int64_t output; /* of the chain, or -1 */
  int64_t slot;   /* else where its y lies until the last reader is done */
  size_t caches;  /* the first of its two outputs */
  union {
    Linear linear;
    Attention attention;
  };
} Step;

typedef struct {
  int64_t inputs, count, slots;
  Tensor *constants;
  Step steps[];
} Chain;

typedef union {
  LinearJob linear;
  AttentionJob attention;
} Job;

/* One run: values are the chain's inputs, then what each step makes. */
typedef struct {
  Tensor *values;
  Job *jobs;
  int64_t *slots; /* first their bytes, then where they begin */
} Run;

static Status read_step(Options from, int64_t kind, int64_t inputs, Step *step) {
  *step = (Step){.kind = kind, .output = -1};
  step->input_count = kind == LINEAR ? LINEAR_INPUTS : ATTENTION_INPUTS;
  if (attribute_ints(from, "inputs", step->inputs, MOST_INPUTS) != step->input_count)
    return fail("Chain: step %lld, expected %zu inputs", (long long)from.step, step->input_count);
  for (size_t i = 0; i < step->input_count; i++) {
    /* which of its inputs may be made by a step before */
    int made = kind == LINEAR ? i != WEIGHTS : i != KEY && i != VALUE && i != LENGTHS;
    int64_t most = made ? inputs + from.step : inputs;
    if (step->inputs[i] >= most || step->inputs[i] < (i ? -1 : 0))
      return fail("Chain: input %zu of step %lld is value %lld, expected one below %lld", i,
                  (long long)from.step, (long long)step->inputs[i], (long long)most);
  }
  if (kind == LINEAR) return linear_init(&step->linear, from, 0);
  if (kind == ATTENTION) return attention_init(&step->attention, from);
  return fail("Chain: a step of kind %lld, expected 0 or 1", (long long)kind);
}

/* Give each y that is no output of the chain a slot, which it leaves to others once it is read. */
static void assign_slots(Chain *chain, int64_t *last_use, int64_t *free_after) {
  for (int64_t i = 0; i < chain->count; i++) {
    last_use[i] = i;
    for (size_t j = 0; j < chain->steps[i].input_count; j++)
      if (chain->steps[i].inputs[j] >= chain->inputs)
        last_use[chain->steps[i].inputs[j] - chain->inputs] = i;
  }
  for (int64_t i = 0, slot; i < chain->count; i++) {
    if (chain->steps[i].output >= 0) continue;
    for (slot = 0; slot < chain->slots && free_after[slot] >= i;) slot++;
    if (slot == chain->slots) chain->slots++;
    chain->steps[i].slot = slot, free_after[slot] = last_use[i];
  }
}

static Status read_chain(Chain *chain, const void *info, const int64_t *kinds) {
  int64_t results[MOST_STEPS], last_use[MOST_STEPS];
  Options own = {info, -1};
  size_t outputs = attribute_ints(own, "results", results, MOST_STEPS);
  for (int64_t i = 0; i < chain->count; i++)
    TRY(read_step((Options){info, i}, kinds[i], chain->inputs, &chain->steps[i]));
  for (size_t i = 0; i < outputs; i++) {
    if (results[i] < 0 || results[i] >= chain->count)
      return fail("Chain: a result of step %lld, expected one of %lld", (long long)results[i],
                  (long long)chain->count);
    chain->steps[results[i]].output = (int64_t)i;
  }
  for (int64_t i = 0; i < chain->count; i++)
    if (chain->steps[i].kind == ATTENTION) chain->steps[i].caches = outputs, outputs += 2;
  assign_slots(chain, last_use, results);
  return read_constants(info, (size_t)chain->inputs, chain->constants);
}

static Status create(const CustomOp *self, const void *api, const void *info, void **kernel) {
  (void)self, (void)api;
  int64_t kinds[MOST_STEPS];
  Options own = {info, -1};
  int64_t count = (int64_t)attribute_ints(own, "kinds", kinds, MOST_STEPS);
  int64_t inputs = attribute_int(own, "given", 0);
  if (count < 1 || inputs < 1 || inputs > MOST_STEPS * MOST_INPUTS)
    return fail("Chain: %lld inputs and %lld steps, expected 1 to %d and to %d", (long long)inputs,
                (long long)count, MOST_STEPS * MOST_INPUTS, MOST_STEPS);
  size_t bytes = sizeof(Chain) + (size_t)count * sizeof(Step);
  Chain *chain = calloc(1, bytes + (size_t)inputs * sizeof(Tensor));
  if (!chain) return fail("Chain: out of memory");
  chain->inputs = inputs, chain->count = count;
  chain->constants = (Tensor *)((char *)chain + bytes);
  Status status = read_chain(chain, info, kinds);
  if (status) return free(chain), status;
  *kernel = chain;
  return NULL;
}

/* The inputs of a step; of the kinds that its kernels read. */
static Status gather(const Chain *chain, const Run *run, int64_t at, Tensor *in) {
  const Step *step = &chain->steps[at];
  for (size_t i = 0; i < step->input_count; i++) {
    in[i] = step->inputs[i] < 0 ? (Tensor){0} : run->values[step->inputs[i]];
    int type = TENSOR_FLOAT;
    if (step->kind == LINEAR && i == WEIGHTS) type = TENSOR_UINT8;
    if (step->kind == ATTENTION && i == LENGTHS) type = TENSOR_INT32;
    if (step->kind == ATTENTION && (i == KEY || i == VALUE)) type = step->attention.type;
    if (in[i].rank && in[i].type != type)
      return fail("Chain: input %zu of step %lld is of type %d, expected %d", i, (long long)at,
                  in[i].type, type);
  }
  return NULL;
}

/* Plan every step, from the shapes of what those before it will make; the memory they work in. */
static Status plan(const Chain *chain, const Run *run, int64_t *work_bytes) {
  for (int64_t i = 0; i < chain->count; i++) {
    const Step *step = &chain->steps[i];
    Job *job = &run->jobs[i];
    Tensor in[MOST_INPUTS], *y = &run->values[chain->inputs + i];
    TRY(gather(chain, run, i, in));
    if (step->kind == LINEAR)
      TRY(linear_plan(&step->linear, in, &job->linear));
    else
      TRY(attention_plan(&step->attention, in, &job->attention));
    int64_t columns = step->kind == LINEAR ? step->linear.outputs
                                           : step->attention.heads * job->attention.width;
    int64_t bytes = step->kind == LINEAR ? job->linear.bytes : job->attention.bytes;
    *y = (Tensor){.type = TENSOR_FLOAT, .rank = in[0].rank};
    memcpy(y->dims, in[0].dims, sizeof y->dims);
    y->count = in[0].count / in[0].dims[in[0].rank - 1] * columns;
    y->dims[in[0].rank - 1] = columns;
    *work_bytes = larger(*work_bytes, up_to(bytes, 64));
    if (step->output < 0)
      run->slots[step->slot] = larger(run->slots[step->slot], up_to(4 * y->count, 64));
  }
  return NULL;
}

/* Put every step's y in its place and list the phases of all; how many. */
static Status place(const Chain *chain, const Run *run, void *context, char *slots, char *work,
                    Phase *phases, size_t *count) {
  for (int64_t i = 0; i < chain->count; i++) {
    const Step *step = &chain->steps[i];
    Job *job = &run->jobs[i];
    Tensor in[MOST_INPUTS], *y = &run->values[chain->inputs + i];
    TRY(gather(chain, run, i, in));
    if (step->output < 0)
      y->data = slots + run->slots[step->slot];
    else
      TRY(get_output(context, (size_t)step->output, y->dims, y->rank, &y->data));
    if (step->kind == LINEAR) {
      *count += linear_phases(&job->linear, in, y->data, work, phases + *count);
      continue;
    }
    TRY(attention_caches(context, step->caches, in, &job->attention));
    *count += attention_phases(&job->attention, in, y->data, work, phases + *count);
  }
  return NULL;
}

static Status run_chain(const Chain *chain, void *context, const Run *run) {
  int64_t work_bytes = 0, phases_bytes = MOST_PHASES * chain->count * (int64_t)sizeof(Phase);
  TRY(get_inputs(context, chain->constants, (size_t)chain->inputs, run->values));
  TRY(plan(chain, run, &work_bytes));
  int64_t slots_bytes = 0;
  for (int64_t i = 0; i < chain->slots; i++) {
    int64_t bytes = run->slots[i];
    run->slots[i] = slots_bytes;
    slots_bytes += bytes;
  }
  char *memory = scratch((size_t)(phases_bytes + slots_bytes + work_bytes));
  if (!memory) return fail("Chain: out of memory for %lld bytes", (long long)slots_bytes);
  char *slots = memory + phases_bytes, *work = slots + slots_bytes;
  size_t count = 0;
  TRY(place(chain, run, context, slots, work, (Phase *)memory, &count));
  return run_phases(context, (Phase *)memory, count);
}

static Status compute(void *self, void *context) {
  const Chain *chain = self;
  size_t values = (size_t)(chain->inputs + chain->count) * sizeof(Tensor);
  size_t jobs = (size_t)chain->count * sizeof(Job);
  char *memory = calloc(1, values + jobs + (size_t)chain->slots * sizeof(int64_t));
  if (!memory) return fail("Chain: out of memory");
  Run run = {(Tensor *)memory, (Job *)(memory + values), (int64_t *)(memory + values + jobs)};
  Status status = run_chain(chain, context, &run);
  free(memory);
  return status;
}

static Status infer_step_int(void *context, const char *name, int64_t step, int64_t *value) {
  char full[64];
  snprintf(full, sizeof full, "%s_%lld", name, (long long)step);
  return infer_attribute_int(context, full, 0, value);
}

/* The shape of the y of a step: the rows that its x has, with columns of its own. */
static Status infer_y(void *context, int64_t inputs, int64_t step, int64_t *dims,
                      const char **names, size_t *rank) {
  int64_t from[MOST_INPUTS], n, gated, heads, kv_heads;
  char name[64];
  size_t count;
  *rank = 0;
  snprintf(name, sizeof name, "inputs_%lld", (long long)step);
  TRY(infer_attribute_ints(context, name, from, MOST_INPUTS, &count));
  if (!count || from[0] < 0 || from[0] >= inputs + step) return NULL; /* refused when it is made */
  if (from[0] < inputs)
    TRY(infer_input(context, (size_t)from[0], dims, names, rank));
  else
    TRY(infer_y(context, inputs, from[0] - inputs, dims, names, rank));
  if (!*rank) return NULL;
  int64_t *columns = &dims[*rank - 1];
  TRY(infer_step_int(context, "n", step, &n));
  TRY(infer_step_int(context, "gated", step, &gated));
  TRY(infer_step_int(context, "heads", step, &heads));
  TRY(infer_step_int(context, "kv_heads", step, &kv_heads));
  if (n)
    *columns = gated ? n / 2 : n;
  else if (*columns > 0 && heads + kv_heads > 0) /* attention keeps those of the queries */
    *columns = *columns / (heads + 2 * kv_heads) * heads;
  names[*rank - 1] = *columns < 0 ? "columns" : "";
  return NULL;
}

static Status infer(const CustomOp *self, void *context) {
  (void)self;
  int64_t kinds[MOST_STEPS], results[MOST_STEPS], from[MOST_INPUTS], inputs;
  char name[64];
  size_t steps, outputs, count;
  TRY(infer_attribute_ints(context, "kinds", kinds, MOST_STEPS, &steps));
  TRY(infer_attribute_ints(context, "results", results, MOST_STEPS, &outputs));
  TRY(infer_attribute_int(context, "given", 0, &inputs));
  for (size_t i = 0; i < outputs; i++) {
    int64_t dims[MAX_RANK];
    const char *names[MAX_RANK] = {0};
    size_t rank;
    TRY(infer_y(context, inputs, results[i], dims, names, &rank));
    if (rank) TRY(infer_output(context, i, dims, names, rank));
  }
  for (size_t i = 0; i < steps; i++) {
    if (kinds[i] != ATTENTION) continue;
    snprintf(name, sizeof name, "inputs_%zu", i);
    TRY(infer_attribute_ints(context, name, from, MOST_INPUTS, &count));
    if (count != ATTENTION_INPUTS) return NULL;
    TRY(infer_like(context, outputs++, (size_t)from[KEY]));
    TRY(infer_like(context, outputs++, (size_t)from[VALUE]));
  }
  return NULL;
}

static int any_type(const CustomOp *op, size_t index) { return (void)op, (void)index, ANY_TYPE; }
static int variadic(const CustomOp *op, size_t index) { return (void)op, (void)index, VARIADIC; }

OPERATOR(chain_op, "Chain", 1, 1, .provider = op_any_cpu, .input_type = any_type,
         .input_characteristic = variadic, .output_type = any_type,
         .output_characteristic = variadic, .infer_shape = infer);
