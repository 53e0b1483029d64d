/* An ONNX Runtime custom-op library: registers the operators of the domain "leangen". */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "op.h"

any_fn *ort_api;

Status fail(const char *format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return ORT(CreateStatus)(ORT_INVALID_ARGUMENT, message);
}

static Status read_tensor(void *value, Tensor *tensor) {
  void *info;
  TRY(ORT(GetTensorTypeAndShape)(value, &info));
  Status status = ORT(GetDimensionsCount)(info, &tensor->rank);
  if (!status && tensor->rank > MAX_RANK)
    status = fail("an input has rank %zu, expected at most %d", tensor->rank, MAX_RANK);
  if (!status) status = ORT(GetDimensions)(info, tensor->dims, tensor->rank);
  if (!status) status = ORT(GetTensorElementType)(info, &tensor->type);
  ORT(ReleaseTensorTypeAndShapeInfo)(info);
  TRY(status);
  tensor->count = 1;
  for (size_t i = 0; i < tensor->rank; i++) tensor->count *= tensor->dims[i];
  return ORT(GetTensorMutableData)(value, &tensor->data);
}

Status read_constants(const void *info, size_t count, Tensor *constants) {
  memset(constants, 0, count * sizeof *constants);
  for (size_t i = 0; i < count; i++) {
    int constant = 0;
    void *value = NULL;
    TRY(ORT(KernelInfoGetConstantInput_tensor)(info, i, &constant, &value));
    if (constant && value) TRY(read_tensor(value, &constants[i]));
  }
  return NULL;
}

Status get_inputs(void *context, const Tensor *constants, size_t count, Tensor *inputs) {
  size_t given = 0;
  memcpy(inputs, constants, count * sizeof *inputs);
  TRY(ORT(KernelContext_GetInputCount)(context, &given));
  for (size_t i = 0; i < count && i < given; i++) {
    void *value = NULL;
    if (inputs[i].data) continue;
    TRY(ORT(KernelContext_GetInput)(context, i, &value));
    if (value) TRY(read_tensor(value, &inputs[i]));
  }
  return NULL;
}

Status get_output(void *context, size_t index, const int64_t *dims, size_t rank, void **data) {
  void *value;
  TRY(ORT(KernelContext_GetOutput)(context, index, dims, rank, &value));
  if (!value) return fail("output %zu is missing", index);
  return ORT(GetTensorMutableData)(value, data);
}

static int absent(Status status) {
  if (status) ORT(ReleaseStatus)(status);
  return status != NULL;
}

/* An attribute's name, valid as long as `room`. */
static const char *full_name(Options from, const char *name, char room[64]) {
  if (from.step < 0) return name;
  snprintf(room, 64, "%s_%lld", name, (long long)from.step);
  return room;
}

int64_t attribute_int(Options from, const char *name, int64_t otherwise) {
  char room[64];
  int64_t value;
  name = full_name(from, name, room);
  return absent(ORT(KernelInfoGetAttribute_int64)(from.info, name, &value)) ? otherwise : value;
}

float attribute_float(Options from, const char *name, float otherwise) {
  char room[64];
  float value;
  name = full_name(from, name, room);
  return absent(ORT(KernelInfoGetAttribute_float)(from.info, name, &value)) ? otherwise : value;
}

void attribute_string(Options from, const char *name, char *out, size_t size) {
  char room[64];
  name = full_name(from, name, room);
  if (absent(ORT(KernelInfoGetAttribute_string)(from.info, name, out, &size))) out[0] = 0;
}

Status attribute_word(Options from, const char *owner, const char *name, const char *const *words,
                      int *at) {
  char given[32], expected[128] = "";
  attribute_string(from, name, given, sizeof given);
  *at = 0;
  if (!*given) return NULL;
  for (; words[*at]; (*at)++)
    if (!strcmp(given, words[*at])) return NULL;
  for (int i = 0; words[i]; i++) append_name(expected, sizeof expected, words[i]);
  return fail("%s: %s '%s', expected one of %s", owner, name, given, expected);
}

size_t attribute_ints(Options from, const char *name, int64_t *out, size_t most) {
  char room[64];
  size_t count = most;
  name = full_name(from, name, room);
  return absent(ORT(KernelInfoGetAttributeArray_int64)(from.info, name, out, &count)) ? 0 : count;
}

Status infer_attribute_int(void *context, const char *name, int64_t otherwise, int64_t *value) {
  const void *attribute = NULL;
  size_t read;
  *value = otherwise;
  if (absent(ORT(ShapeInferContext_GetAttribute)(context, name, &attribute)) || !attribute)
    return NULL;
  return ORT(ReadOpAttr)(attribute, OP_ATTR_INT, value, sizeof *value, &read);
}

Status infer_attribute_ints(void *context, const char *name, int64_t *out, size_t most,
                            size_t *count) {
  const void *attribute = NULL;
  *count = 0;
  if (absent(ORT(ShapeInferContext_GetAttribute)(context, name, &attribute)) || !attribute)
    return NULL;
  size_t bytes = 0;
  TRY(ORT(ReadOpAttr)(attribute, OP_ATTR_INTS, out, most * sizeof *out, &bytes));
  *count = bytes / sizeof *out;
  return NULL;
}

Status infer_input(void *context, size_t input, int64_t *dims, const char **names, size_t *rank) {
  void *given;
  TRY(ORT(ShapeInferContext_GetInputTypeShape)(context, input, &given));
  TRY(ORT(GetDimensionsCount)(given, rank));
  if (*rank > MAX_RANK) *rank = 0; /* as if unknown: checked when it runs */
  TRY(ORT(GetDimensions)(given, dims, *rank));
  return ORT(GetSymbolicDimensions)(given, names, *rank);
}

Status infer_output(void *context, size_t output, const int64_t *dims, const char **names,
                    size_t rank) {
  void *made;
  for (size_t i = 0; i < rank; i++) {
    if (!names[i]) names[i] = "";
    if (dims[i] < 0 && !*names[i]) return NULL; /* ORT would take -1 for a size */
  }
  TRY(ORT(CreateTensorTypeAndShapeInfo)(&made));
  Status status = ORT(SetTensorElementType)(made, TENSOR_FLOAT);
  if (!status) status = ORT(SetDimensions)(made, dims, rank);
  if (!status) status = ORT(SetSymbolicDimensions)(made, names, rank);
  if (!status) status = ORT(ShapeInferContext_SetOutputTypeShape)(context, output, made);
  ORT(ReleaseTensorTypeAndShapeInfo)(made);
  return status;
}

Status infer_like_first(void *context, size_t output, int64_t last) {
  size_t rank;
  int64_t dims[MAX_RANK];
  const char *names[MAX_RANK] = {0};
  TRY(infer_input(context, 0, dims, names, &rank));
  if (rank == 0) return NULL;
  dims[rank - 1] = last;
  names[rank - 1] = "";
  return infer_output(context, output, dims, names, rank);
}

Status infer_like(void *context, size_t output, size_t input) {
  void *given;
  TRY(ORT(ShapeInferContext_GetInputTypeShape)(context, input, &given));
  return ORT(ShapeInferContext_SetOutputTypeShape)(context, output, given);
}

/* Freed when its thread ends: the library must stay loaded (linked with -z nodelete). */
struct memory {
  char *data;
  size_t bytes;
};
static pthread_key_t memory_key;

static void free_memory(void *given) {
  struct memory *memory = given;
  free(memory->data);
  free(memory);
}

static void make_memory_key(void) { pthread_key_create(&memory_key, free_memory); }

char *scratch(size_t bytes) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, make_memory_key);
  struct memory *memory = pthread_getspecific(memory_key);
  if (!memory) {
    memory = calloc(1, sizeof *memory);
    if (!memory || pthread_setspecific(memory_key, memory)) {
      free(memory);
      return NULL;
    }
  }
  if (memory->bytes < bytes) {
    free(memory->data);
    memory->bytes = (bytes + 4095) & ~(size_t)4095;
    memory->data = aligned_alloc(64, memory->bytes);
    if (!memory->data) memory->bytes = 0;
  }
  return memory->data;
}

const char *op_any_cpu(const CustomOp *op) { return (void)op, NULL; }
int op_default_memory(const CustomOp *op, size_t index) { return (void)op, (void)index, 0; }
int op_required(const CustomOp *op, size_t index) { return (void)op, (void)index, REQUIRED; }
int op_one(const CustomOp *op) { return (void)op, 1; }
int op_mixed(const CustomOp *op) { return (void)op, 0; }
int op_float(const CustomOp *op, size_t index) { return (void)op, (void)index, TENSOR_FLOAT; }
int op_packed_second(const CustomOp *op, size_t index) {
  return (void)op, index == 1 ? TENSOR_UINT8 : TENSOR_FLOAT;
}
int op_two_required(const CustomOp *op, size_t index) {
  return (void)op, index < 2 ? REQUIRED : OPTIONAL;
}
int op_newest(const CustomOp *op) { return (void)op, 0x7fffffff; }
size_t op_no_map(int **from, int **to) { return *from = *to = NULL, 0; }
void op_release_map(int *from, int *to) { (void)from, (void)to; }
/* Never called: ORT takes the second versions where there are any. */
void *op_create_v1(const CustomOp *op, const void *api, const void *info) {
  return (void)op, (void)api, (void)info, NULL;
}
void op_compute_v1(void *kernel, void *context) { (void)kernel, (void)context; }

static const CustomOp *const operators[] = {&linear_op, &argmax_linear_op, &attention_op, &chain_op,
                                          &cuda_linear_op, &cuda_attention_op, &conv_op,
                                          &conv_transpose_op, &pixel_attention_op};

/* Each session frees the domain it was given, so make one for each. */
EXPORT Status RegisterCustomOps(void *options, const void *base) {
  const char *reason;
  void *domain;
  ort_api = ((any_fn * (*)(uint32_t)) * (void *const *)base)(ORT_ABI_VERSION);
  if (!leangen_kernels_variant(&reason)) return fail("leangen kernels: %s", reason);
  TRY(ORT(CreateCustomOpDomain)("leangen", &domain));
  for (size_t i = 0; i < sizeof operators / sizeof *operators; i++)
    TRY(ORT(CustomOpDomain_Add)(domain, operators[i]));
  return ORT(AddCustomOpDomain)(options, domain);
}
