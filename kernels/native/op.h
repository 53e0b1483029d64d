/* What the operators share: access to ORT, shapes, error statuses, scratch memory. */
#ifndef LEANGEN_OP_H
#define LEANGEN_OP_H

#include "ort_abi.h"

enum { MAX_RANK = 8, LINE = 64 /* bytes, of a cache */ };

typedef void *(*any_fn)();
extern any_fn *ort_api; /* OrtApi of this process */
#define ORT(slot) (ort_api[slot])
#define TRY(expression) \
  do { \
    Status status_ = (Status)(expression); \
    if (status_) return status_; \
  } while (0)

/* An error status with a message made as by printf. */
Status fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

typedef struct {
  void *data; /* NULL: an optional input that is absent */
  int type;
  size_t rank;
  int64_t dims[MAX_RANK];
  int64_t count; /* of elements */
} Tensor;

/* Those of the first `count` inputs that are constants of the graph: read once, not at each run. */
Status read_constants(const void *info, size_t count, Tensor *constants);
/* The first `count` inputs of this run, those in `constants` as they are there. */
Status get_inputs(void *context, const Tensor *constants, size_t count, Tensor *inputs);
Status get_output(void *context, size_t index, const int64_t *dims, size_t rank, void **data);

/* Whose attributes are read: an operator's (`step` is below 0), or those of a step of a `Chain`,
 * whose names end in _STEP. */
typedef struct {
  const void *info;
  int64_t step;
} Options;

int64_t attribute_int(Options from, const char *name, int64_t otherwise);
float attribute_float(Options from, const char *name, float otherwise);
/* Empty when absent or longer than `size` allows. */
void attribute_string(Options from, const char *name, char *out, size_t size);
/* The place of an attribute among words, a list that ends in NULL: the first where it is absent.
 * Another is an error of `owner`. */
Status attribute_word(Options from, const char *owner, const char *name, const char *const *words,
                      int *at);
/* Up to `most` numbers; how many there are, 0 when absent. */
size_t attribute_ints(Options from, const char *name, int64_t *out, size_t most);

/* Output `output` has the dims of input 0 with the last one `last`; it keeps symbolic names. */
Status infer_like_first(void *context, size_t output, int64_t last);
/* Output `output` is like input `input`. */
Status infer_like(void *context, size_t output, size_t input);
Status infer_attribute_int(void *context, const char *name, int64_t otherwise, int64_t *value);
Status infer_attribute_ints(void *context, const char *name, int64_t *out, size_t most,
                            size_t *count);
/* The float shape of an input, and of an output; a dim of unknown size is -1 and may have a name. */
Status infer_input(void *context, size_t input, int64_t *dims, const char **names, size_t *rank);
Status infer_output(void *context, size_t output, const int64_t *dims, const char **names,
                    size_t rank);

static inline int64_t up_to(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Work that begins when that of the phase before has ended: part(job, i, thread) for each i below
 * `parts`, by any thread and in any order. Neighbours are mostly run by one thread, in order.
 * `thread` is below MOST_THREADS and no other part runs with it meanwhile. */
enum { MOST_THREADS = 64, MOST_PARTS = 1 << 27 };
typedef struct {
  void (*part)(void *job, int64_t i, int64_t thread);
  void (*ask)(const void *job, int64_t i); /* for what part i will miss in the cache; or NULL */
  void *job;
  int32_t parts;
  _Atomic int32_t done; /* to begin with 0 */
} Phase;

/* Run phases one after another, the threads of ORT entering once for all of them. */
Status run_phases(void *context, Phase *phases, size_t count);

/* Memory of the calling thread, 64-byte aligned, valid until its next call; NULL if exhausted. */
char *scratch(size_t bytes);

extern const CustomOp linear_op, argmax_linear_op, attention_op, chain_op;
extern const CustomOp cuda_linear_op, cuda_attention_op;
extern const CustomOp conv_op, conv_transpose_op, pixel_attention_op;

/* The parts of an operator that are alike in all of them. */
const char *op_any_cpu(const CustomOp *);
int op_default_memory(const CustomOp *, size_t);
int op_required(const CustomOp *, size_t);
int op_one(const CustomOp *);
int op_mixed(const CustomOp *);
int op_newest(const CustomOp *);
size_t op_no_map(int **, int **);
void op_release_map(int *, int *);
void *op_create_v1(const CustomOp *, const void *, const void *);
void op_compute_v1(void *, void *);
int op_float(const CustomOp *, size_t);
int op_packed_second(const CustomOp *, size_t);
int op_two_required(const CustomOp *, size_t);

/* Defines an operator: what it is called, how many inputs and outputs it has, and the fields that
 * differ between operators. A file's operators share its `create` and `compute`; what they make is
 * one block of memory. */
#define OPERATOR(op, title, most_inputs, most_outputs, ...) \
  static const char *op##_name(const CustomOp *self) { return (void)self, title; } \
  static size_t op##_inputs(const CustomOp *self) { return (void)self, most_inputs; } \
  static size_t op##_outputs(const CustomOp *self) { return (void)self, most_outputs; } \
  const CustomOp op = { \
    .version = ORT_ABI_VERSION, .create = op_create_v1, .compute = op_compute_v1, \
    .create_v2 = create, .compute_v2 = compute, .destroy = free, \
    .name = op##_name, .input_count = op##_inputs, .output_count = op##_outputs, \
    .input_memory = op_default_memory, \
    .variadic_input_min = op_one, .variadic_input_homogeneous = op_mixed, \
    .variadic_output_min = op_one, .variadic_output_homogeneous = op_mixed, \
    .start_version = op_one, .end_version = op_newest, \
    .may_inplace = op_no_map, .release_may_inplace = op_release_map, \
    .alias_map = op_no_map, .release_alias_map = op_release_map, \
    __VA_ARGS__}

/* Fields of an operator whose outputs are all made, on the CPU. */
#define OP_ON_CPU .provider = op_any_cpu, .output_characteristic = op_required

/* Inputs of an operator on packed weights: x, the weights, then optional floats. */
#define OP_WEIGHTED .input_type = op_packed_second, .input_characteristic = op_two_required

#endif
