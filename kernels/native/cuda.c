/* CudaLinear and CudaAttention: what Linear and Attention compute, on ONNX Runtime's CUDA provider.
 *
 * Kernels come from leangen_cuda.*.cubin or leangen_cuda.ptx beside this library and run on ORT's
 * own stream, on device pointers as ORT hands them over: no copies, nothing waits for the host, so
 * a run can be captured in a CUDA graph. The driver is opened when the first of these operators
 * runs; without one, all else in this library works. `launches.py` says the same in Python.
 *
 * CudaLinear   x, weights (tiles.py), gain, bias, residual, shift as Linear's; table float [16]
 *              Attributes as Linear's.
 * CudaAttention
 *              inputs and attributes as Attention's, caches fp16 or int8 (tiles.py), gains for one
 *              head. Lengths stay in device memory: a position beyond the capacity or the rotations
 *              is dropped. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "linear.h"

#ifndef CUDA_PROVIDER
#define CUDA_PROVIDER "CUDAExecutionProvider"
#endif

enum { CAPABILITY_MAJOR = 75, MULTIPROCESSORS = 16 }; /* CUdevice_attribute */
enum { DEVICES = 16, STREAMS = 64, MOST_COLUMNS = 16384, QUERIES = 4, UNIT = 128, TILE = 16 };
static const double LOG2_E = 1.4426950408889634;

static struct {
  int (*init)(unsigned);
  int (*get_device)(int *);
  int (*attribute)(int *, int, int);
  int (*load)(void **, const void *);
  int (*function)(void **, void *, const char *);
  int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                void *, void **, void **);
  int (*allocate)(void **, size_t);
  int (*release)(void *);
  int (*copy)(void *, const void *, size_t, void *);
  int (*wait)(void *);
  int (*error)(int, const char **);
} cuda;

static struct {
  void *module;
  int64_t multiprocessors;
} devices[DEVICES];

/* One workspace for each stream: what runs there runs in order. */
static struct {
  void *stream, *data;
  size_t bytes;
  int device, used;
} spaces[STREAMS];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static Status checked(int error, const char *what) {
  if (!error) return NULL;
  const char *text = NULL;
  if (cuda.error) cuda.error(error, &text);
  return fail("CUDA: %s: %s (%d)%s", what, text ? text : "unknown error", error,
              error == 2 ? "; a lower-bit scheme, a shorter context or --device cpu needs less"
                         : "");
}

static Status open_driver(void) {
  static const struct {
    const char *name;
    void *to;
  } wanted[] = {
      {"cuInit", &cuda.init}, {"cuCtxGetDevice", &cuda.get_device},
      {"cuDeviceGetAttribute", &cuda.attribute}, {"cuModuleLoadData", &cuda.load},
      {"cuModuleGetFunction", &cuda.function}, {"cuLaunchKernel", &cuda.launch},
      {"cuMemAlloc_v2", &cuda.allocate}, {"cuMemFree_v2", &cuda.release},
      {"cuMemcpyDtoDAsync_v2", &cuda.copy}, {"cuStreamSynchronize", &cuda.wait},
      {"cuGetErrorString", &cuda.error},
  };
  if (cuda.error) return NULL; /* the last to be found */
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) return fail("CUDA: no NVIDIA driver: libcuda.so.1 cannot be loaded");
  for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
    void *found = dlsym(library, wanted[i].name);
    if (!found) return fail("CUDA: the driver has no %s: it is too old", wanted[i].name);
    memcpy(wanted[i].to, &found, sizeof found);
  }
  return checked(cuda.init(0), "cuInit");
}

/* The kernels for a device: its machine code, else PTX that the driver compiles. */
static Status load_module(int device) {
  Dl_info info;
  char path[4096];
  int major = 0, processors = 0;
  TRY(checked(cuda.attribute(&major, CAPABILITY_MAJOR, device), "capability"));
  TRY(checked(cuda.attribute(&processors, MULTIPROCESSORS, device), "multiprocessors"));
  if (!dladdr((void *)leangen_kernels_variant, &info)) return fail("CUDA: where is this library?");
  const char *slash = strrchr(info.dli_fname, '/');
  int folder = slash ? (int)(slash - info.dli_fname) + 1 : 0;
  snprintf(path, sizeof path, "%.*scuda/leangen_cuda.sm_%d0.cubin", folder, info.dli_fname, major);
  FILE *file = fopen(path, "rb");
  if (!file) {
    snprintf(path, sizeof path, "%.*scuda/leangen_cuda.ptx", folder, info.dli_fname);
    file = fopen(path, "rb");
  }
  if (!file) return fail("CUDA: there is no %s: the GPU kernels were not built", path);
  fseek(file, 0, SEEK_END);
  long size = ftell(file);
  rewind(file);
  char *image = size > 0 ? calloc(1, (size_t)size + 1) : NULL;
  size_t got = image ? fread(image, 1, (size_t)size, file) : 0;
  fclose(file);
  Status status = got != (size_t)size || !image ? fail("CUDA: %s cannot be read", path) : NULL;
  if (!status) status = checked(cuda.load(&devices[device].module, image), "loading the kernels");
  /* The fake of the tests keeps it; the driver has copied it. A few MB, once for each device. */
  if (status) free(image);
  devices[device].multiprocessors = processors;
  return status;
}

static Status current_device(int *device) {
  pthread_mutex_lock(&lock);
  Status status = open_driver();
  if (!status) status = checked(cuda.get_device(device), "cuCtxGetDevice");
  if (!status && (*device < 0 || *device >= DEVICES)) status = fail("CUDA: device %d", *device);
  if (!status && !devices[*device].module) status = load_module(*device);
  pthread_mutex_unlock(&lock);
  return status;
}

/* Memory of the device that the next launches on a stream may use; grows outside captures only, as
 * ORT runs a graph once before it captures it. */
static Status workspace(int device, void *stream, size_t bytes, int64_t *address) {
  Status status = NULL;
  pthread_mutex_lock(&lock);
  size_t i = 0;
  while (i < STREAMS && spaces[i].used &&
         !(spaces[i].stream == stream && spaces[i].device == device))
    i++;
  if (i == STREAMS) {
    pthread_mutex_unlock(&lock);
    return fail("CUDA: more than %d streams", STREAMS);
  }
  spaces[i].stream = stream, spaces[i].device = device, spaces[i].used = 1;
  if (spaces[i].bytes < bytes) {
    if (spaces[i].data) {
      status = checked(cuda.wait(stream), "waiting for the stream");
      if (!status) status = checked(cuda.release(spaces[i].data), "cuMemFree");
      spaces[i].data = NULL, spaces[i].bytes = 0;
    }
    if (!status) status = checked(cuda.allocate(&spaces[i].data, bytes), "a workspace");
    if (!status) spaces[i].bytes = bytes;
  }
  *address = (int64_t)spaces[i].data;
  pthread_mutex_unlock(&lock);
  return status;
}

static Status find_kernel(int device, const char *name, void **function) {
  char symbol[96];
  if (*function) return NULL;
  snprintf(symbol, sizeof symbol, "leangen_%s", name);
  return checked(cuda.function(function, devices[device].module, symbol), symbol);
}

typedef union {
  int64_t i;
  float f;
} Argument;

static Status launch(void *function, const int64_t grid[3], int64_t threads, void *stream,
                     Argument *arguments, size_t count) {
  void *pointers[16];
  for (size_t i = 0; i < count; i++) pointers[i] = &arguments[i];
  return checked(cuda.launch(function, (unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2],
                             (unsigned)threads, 1, 1, 0, stream, pointers, NULL),
                 "a launch");
}

static Argument whole(int64_t value) { return (Argument){.i = value}; }
static Argument address(const void *pointer) { return (Argument){.i = (int64_t)pointer}; }
static Argument real(double value) {
  Argument argument = {.i = 0};
  argument.f = (float)value;
  return argument;
}

enum { LOOKUP = LINEAR_INPUTS, INPUTS }; /* CudaLinear's beside those of Linear */
enum { SHAPES = 4 }; /* tiles, eights, warps */
static const int shapes[SHAPES][3] = {{1, 1, 8}, {2, 1, 4}, {2, 2, 4}, {2, 4, 4}};

/* A graph of one session runs on one device: the kernels found for it stay. */
typedef struct {
  int attention, half, layer, gated, curve, scaled;
  int64_t n, k, outputs, unit_bytes, heads, kv_heads, window;
  double epsilon, scale;
  char kind[16];
  void *rows, *products[SHAPES], *append, *attend, *merge;
} Op;

static Status check_linear(const Op *op, const Tensor *in) {
  int64_t bytes = up_to(op->n, TILE) / TILE * (up_to(op->k, UNIT) / UNIT) * op->unit_bytes;
  if (!in[X].rank || in[X].dims[in[X].rank - 1] != op->k)
    return fail("CudaLinear: x has %lld columns, expected %lld",
                (long long)(in[X].rank ? in[X].dims[in[X].rank - 1] : 0), (long long)op->k);
  if (in[WEIGHTS].count != bytes)
    return fail("CudaLinear: weights have %lld bytes, expected %lld",
                (long long)in[WEIGHTS].count, (long long)bytes);
  if ((in[GAIN].data && in[GAIN].count != op->k) || (in[SHIFT].data && in[SHIFT].count != op->k) ||
      (in[BIAS].data && in[BIAS].count != op->outputs) || (op->layer && !in[SHIFT].data) ||
      (!strcmp(op->kind, "table")) != (in[LOOKUP].data && in[LOOKUP].count == 16))
    return fail("CudaLinear: gain and shift take %lld elements, bias %lld, a table 16",
                (long long)op->k, (long long)op->outputs);
  int64_t elements = in[X].count / op->k * op->outputs;
  if (in[RESIDUAL].data && in[RESIDUAL].count != elements)
    return fail("CudaLinear: residual has %lld elements, expected %lld",
                (long long)in[RESIDUAL].count, (long long)elements);
  return NULL;
}

static Status run_linear(Op *op, void *context, int device, void *stream) {
  Tensor none[INPUTS] = {0}, in[INPUTS];
  TRY(get_inputs(context, none, INPUTS, in));
  TRY(check_linear(op, in));
  int64_t units = up_to(op->k, UNIT) / UNIT, along = up_to(op->n, TILE) / TILE;
  int64_t tokens = in[X].count / op->k, dims[MAX_RANK];
  memcpy(dims, in[X].dims, sizeof dims);
  dims[in[X].rank - 1] = op->outputs;
  void *y;
  TRY(get_output(context, 0, dims, in[X].rank, &y));
  if (!tokens) return NULL;

  int64_t columns = units * UNIT, scratch;
  int64_t rows_bytes = up_to(tokens * columns * (op->half ? 2 : 1), 256);
  int64_t scales_bytes = up_to(tokens * (op->half ? 4 : columns / 4), 256);
  int64_t sums_bytes = up_to(op->half ? tokens * columns / 8 : 0, 256);
  TRY(workspace(device, stream, (size_t)(rows_bytes + scales_bytes + sums_bytes), &scratch));
  int64_t scales = scratch + rows_bytes, sums = scales + scales_bytes;
  char name[64];
  snprintf(name, sizeof name, "rows_%s", op->half ? "a16" : "a8");
  TRY(find_kernel(device, name, &op->rows));
  Argument ready[] = {address(in[X].data), address(in[GAIN].data), address(in[SHIFT].data),
                      whole(scratch), whole(scales), whole(sums), whole(op->k), whole(units),
                      whole(op->layer), real(op->epsilon)};
  int64_t row_threads = smaller(up_to(op->k, 512) / 512 * 32, 1024);
  TRY(launch(op->rows, (int64_t[]){tokens, 1, 1}, row_threads, stream, ready, 10));

  int chosen = tokens > 16 ? 3 : tokens > 8 ? 2 : op->gated ? 1 : 0, shift = 0;
  const int *shape = shapes[chosen];
  int64_t across = up_to(tokens, 8 * shape[1]) / (8 * shape[1]);
  /* As many warps with rows of their own as leave two blocks for each multiprocessor. */
  while (2 << shift <= shape[2]) {
    int64_t of_block = (int64_t)shape[0] << (shift + 1);
    if (up_to(along, of_block) / of_block * across < 2 * devices[device].multiprocessors) break;
    shift++;
  }
  snprintf(name, sizeof name, "linear_%s_%s_%dx%d", op->kind, op->half ? "a16" : "a8", shape[0],
           shape[1]);
  TRY(find_kernel(device, name, &op->products[chosen]));
  int64_t parts = shape[2] >> shift;
  Argument product[] = {whole(scratch), whole(scales), whole(sums), address(in[WEIGHTS].data),
                        address(in[LOOKUP].data), address(y), address(in[BIAS].data),
                        address(in[RESIDUAL].data), whole(tokens), whole(op->n), whole(units),
                        whole(shift), whole(parts), whole(parts * op->unit_bytes),
                        whole(op->gated), whole(op->curve)};
  int64_t of_block = (int64_t)shape[0] << shift;
  return launch(op->products[chosen], (int64_t[]){up_to(along, of_block) / of_block, across, 1},
                32 * shape[2], stream, product, 16);
}

static Status check_attention(const Op *op, const Tensor *in) {
  const int64_t *key = in[KEY].dims;
  if (in[QKV].rank != 3 || in[KEY].rank != 4 || in[VALUE].rank != 4 ||
      memcmp(key, in[VALUE].dims, 4 * sizeof *key))
    return fail("CudaAttention: expected qkv [batch, new, columns] and two caches alike, [batch,"
                " heads, capacity, columns]");
  int64_t batch = in[QKV].dims[0], capacity = key[2], width = key[3] - (op->scaled ? 4 : 0);
  int type = op->scaled ? TENSOR_INT8 : TENSOR_FLOAT16;
  if ((width != 64 && width != 128) || capacity % 16 || key[0] != batch ||
      key[1] != op->kv_heads || in[KEY].type != type || in[VALUE].type != type ||
      in[QKV].dims[2] != (op->heads + 2 * op->kv_heads) * width || in[LENGTHS].count != batch)
    return fail("CudaAttention: qkv %lld columns, width %lld, capacity %lld: expected heads of 64"
                " or 128, a capacity of a multiple of 16",
                (long long)in[QKV].dims[2], (long long)width, (long long)capacity);
  for (int i = QUERY_GAIN; i <= KEY_GAIN; i++)
    if (in[i].data && in[i].count != width)
      return fail("CudaAttention: a gain has %lld elements, expected %lld", (long long)in[i].count,
                  (long long)width);
  if (!in[COSINES].data != !in[SINES].data || in[COSINES].count != in[SINES].count ||
      in[COSINES].count % (width / 2) || (in[COSINES].data && !in[COSINES].count))
    return fail("CudaAttention: %lld cosines and %lld sines, expected as many, %lld a position",
                (long long)in[COSINES].count, (long long)in[SINES].count, (long long)width / 2);
  return NULL;
}

static Status run_attention(Op *op, void *context, int device, void *stream) {
  Tensor none[ATTENTION_INPUTS] = {0}, in[ATTENTION_INPUTS];
  TRY(get_inputs(context, none, ATTENTION_INPUTS, in));
  TRY(check_attention(op, in));
  const int64_t *key = in[KEY].dims;
  int64_t batch = in[QKV].dims[0], new = in[QKV].dims[1], capacity = key[2];
  int64_t width = key[3] - (op->scaled ? 4 : 0), group = op->heads / op->kv_heads;
  void *y, *keys, *values;
  int64_t dims[] = {batch, new, op->heads * width};
  TRY(get_output(context, 0, dims, 3, &y));
  TRY(get_output(context, 1, key, 4, &keys));
  TRY(get_output(context, 2, key, 4, &values));
  size_t bytes = (size_t)(in[KEY].count * (op->scaled ? 1 : 2));
  if (keys != in[KEY].data) TRY(checked(cuda.copy(keys, in[KEY].data, bytes, stream), "a copy"));
  if (values != in[VALUE].data)
    TRY(checked(cuda.copy(values, in[VALUE].data, bytes, stream), "a copy"));
  if (!batch || !new) return NULL;

  int64_t tiles = up_to(new * group, QUERIES) / QUERIES, blocks = batch * op->kv_heads * tiles;
  int64_t splits = 4 * devices[device].multiprocessors / blocks;
  splits = larger(1, smaller(smaller(splits, capacity / 64), 64));
  int64_t rows = batch * new * op->heads, q;
  TRY(workspace(device, stream, (size_t)(4 * rows * (width + splits * (width + 2))), &q));
  int64_t parts = q + 4 * rows * width;
  int64_t rotations = in[COSINES].data ? in[COSINES].count / (width / 2) : capacity;
  int64_t limit = smaller(capacity, rotations);
  double scale = (op->scale != 0 ? op->scale : 1 / sqrt((double)width)) * LOG2_E;
  char name[64];
  const char *cache = op->scaled ? "int8" : "fp16";
  snprintf(name, sizeof name, "append_%s_%lld", cache, (long long)width);
  TRY(find_kernel(device, name, &op->append));
  snprintf(name, sizeof name, "attend_%s_%lld", cache, (long long)width);
  TRY(find_kernel(device, name, &op->attend));
  snprintf(name, sizeof name, "merge_%lld", (long long)width);
  TRY(find_kernel(device, name, &op->merge));
  Argument append[] = {address(in[QKV].data), address(in[LENGTHS].data),
                       address(in[COSINES].data), address(in[SINES].data),
                       address(in[QUERY_GAIN].data), address(in[KEY_GAIN].data), whole(q),
                       address(keys), address(values), whole(new), whole(op->heads),
                       whole(op->kv_heads), whole(capacity), whole(limit), real(op->epsilon),
                       real(scale)};
  int64_t all_heads = op->heads + 2 * op->kv_heads;
  TRY(launch(op->append, (int64_t[]){all_heads, new, batch}, 32, stream, append, 16));
  Argument attend[] = {whole(q), address(in[LENGTHS].data), address(keys), address(values),
                       whole(parts), whole(new), whole(group), whole(op->kv_heads),
                       whole(capacity), whole(op->window)};
  TRY(launch(op->attend, (int64_t[]){splits, tiles, batch * op->kv_heads}, 128, stream, attend,
             10));
  Argument merge[] = {whole(parts), address(y), whole(new), whole(group), whole(op->kv_heads),
                      whole(splits)};
  return launch(op->merge, (int64_t[]){new * group, batch * op->kv_heads, 1}, width, stream, merge,
                6);
}

static Status compute(void *self, void *context) {
  Op *op = self;
  int device = 0;
  void *stream = NULL;
  TRY(current_device(&device));
  TRY(ORT(KernelContext_GetGPUComputeStream)(context, &stream));
  return (op->attention ? run_attention : run_linear)(op, context, device, stream);
}

static Status read_linear(Options from, Op *op) {
  static const char *const forms[] = {"q4", "q4_wide", "q4_min", "q4_min_wide", "q8", "q8_wide",
                                      "nf4_wide", "fp4_wide", NULL};
  static const char *const kinds[] = {"int8", "fp32", NULL};
  static const char *const norms[] = {"rms", "layer", NULL};
  static const char *const curves[] = {"none", "gelu_tanh", "gelu", "relu", NULL};
  int form;
  TRY(attribute_word(from, "CudaLinear", "form", forms, &form));
  TRY(attribute_word(from, "CudaLinear", "activations", kinds, &op->half));
  TRY(attribute_word(from, "CudaLinear", "norm", norms, &op->layer));
  TRY(attribute_word(from, "CudaLinear", "activation", curves, &op->curve));
  int table = form >= 6, minimum = form == 2 || form == 3, bits = form == 4 || form == 5 ? 8 : 4;
  int wide = table || form % 2;
  op->half = op->half || table;
  strcpy(op->kind, table ? "table" : forms[form]);
  op->unit_bytes = TILE * UNIT * bits / 8 + ((TILE * 4 * 2 * (1 + minimum)) << wide);
  op->n = attribute_int(from, "n", 0), op->k = attribute_int(from, "k", 0);
  op->gated = attribute_int(from, "gated", 0) != 0;
  op->outputs = op->gated ? op->n / 2 : op->n;
  if (op->n < 1 || op->k < 1 || op->k > MOST_COLUMNS || (op->gated && op->n % 32))
    return fail("CudaLinear: n %lld, k %lld: expected k up to %d, and n a multiple of 32 with a"
                " gate", (long long)op->n, (long long)op->k, MOST_COLUMNS);
  return NULL;
}

static Status read_attention(Options from, Op *op) {
  static const char *const caches[] = {"fp16", "int8", NULL};
  TRY(attribute_word(from, "CudaAttention", "cache", caches, &op->scaled));
  op->attention = 1;
  op->heads = attribute_int(from, "heads", 0), op->kv_heads = attribute_int(from, "kv_heads", 0);
  op->window = attribute_int(from, "window", 0);
  op->scale = attribute_float(from, "scale", 0);
  if (op->heads < 1 || op->kv_heads < 1 || op->heads % op->kv_heads)
    return fail("CudaAttention: heads %lld, kv_heads %lld, expected a multiple",
                (long long)op->heads, (long long)op->kv_heads);
  return NULL;
}

static Status create(const CustomOp *self, const void *api, const void *info, void **kernel) {
  (void)api;
  Op *op = calloc(1, sizeof *op);
  if (!op) return fail("CUDA: out of memory");
  Options from = {info, -1};
  op->epsilon = attribute_float(from, "epsilon", 1e-5f);
  Status status = self == &cuda_linear_op ? read_linear(from, op) : read_attention(from, op);
  if (status) return free(op), status;
  *kernel = op;
  return NULL;
}

static const char *provider(const CustomOp *op) { return (void)op, CUDA_PROVIDER; }
#define ON_CARD .provider = provider, .output_characteristic = op_required

OPERATOR(cuda_linear_op, "CudaLinear", INPUTS, 1, ON_CARD, OP_WEIGHTED, .output_type = op_float,
         .infer_shape = linear_infer);
OPERATOR(cuda_attention_op, "CudaAttention", ATTENTION_INPUTS, ATTENTION_OUTPUTS, ON_CARD,
         OP_ATTENDING);
