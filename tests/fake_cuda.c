/* A stand-in for libcuda.so.1: memory is the host's, a launch is a line in $FAKE_CUDA_LOG.
 *
 * The letters of a kernel's arguments stand in $FAKE_CUDA_NAMES, as the build writes them. The
 * allocation that passes $FAKE_CUDA_BYTES fails, as on a full card. What fake_cuda_runs is given
 * does the work of a launch; without it none is done. With $FAKE_CUDA_OVERLAPS a line stands before
 * each launch that may overlap, which one of a capability below 9 ($FAKE_CUDA_MAJOR) must not. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  char name[96], letters[32];
} Function;

typedef struct {
  int id, pad, value[16];
} Attribute;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream;
  Attribute *attributes;
  unsigned count;
} Config;
typedef int (*Run)(const char *name, const unsigned *grid, unsigned threads, void **arguments);

static size_t allocated;
static int capturing;
static Run run;

void fake_cuda_runs(Run given) { run = given; }

static const char *setting(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value && *value ? value : otherwise;
}

static void note(const char *line) {
  FILE *log = fopen(setting("FAKE_CUDA_LOG", "/dev/null"), "a");
  if (!log) return;
  fprintf(log, "%s\n", line);
  fclose(log);
}

static int capability(void) { return atoi(setting("FAKE_CUDA_MAJOR", "9")); }

int cuInit(unsigned flags) { return (void)flags, atoi(setting("FAKE_CUDA_INIT", "0")); }
int cuGetErrorString(int error, const char **text) {
  return *text = error == 2 ? "out of memory" : "something is wrong", 0;
}
int cuDeviceGetCount(int *count) { return *count = atoi(setting("FAKE_CUDA_COUNT", "1")), 0; }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDeviceGetName(char *name, int size, int device) {
  return (void)device, snprintf(name, (size_t)size, "Fake H100"), 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return (void)device, *bytes = 1u << 30, 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
  (void)device;
  *value = which == 75 ? capability() : which == 76 ? 0 : which == 16 ? 132 : 1 << 16;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  return (void)device, *context = &allocated, 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, note("release"), 0; }
int cuCtxPushCurrent_v2(void *context) { return (void)context, note("push"), 0; }
int cuCtxPopCurrent_v2(void **context) { return *context = NULL, note("pop"), 0; }
int cuCtxSetCurrent(void *context) { return (void)context, 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuCtxSynchronize(void) { return 0; }
int cuStreamCreate(void **stream, unsigned flags) { return (void)flags, *stream = &capturing, 0; }
int cuStreamSynchronize(void *stream) { return (void)stream, 0; }
int cuStreamBeginCapture_v2(void *stream, int mode) {
  return (void)stream, (void)mode, capturing = 1, 0;
}
int cuStreamEndCapture(void *stream, void **graph) {
  return *graph = stream, capturing = 0, 0;
}
int cuGraphInstantiateWithFlags(void **executable, void *graph, uint64_t flags) {
  return (void)flags, *executable = graph, 0;
}
int cuGraphDestroy(void *graph) { return (void)graph, 0; }
int cuGraphLaunch(void *graph, void *stream) { return (void)graph, (void)stream, note("graph"), 0; }
int cuModuleLoadData(void **module, const void *image) { return *module = (void *)image, 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  (void)module;
  Function *made = calloc(1, sizeof *made);
  char line[160], given[96], letters[32];
  FILE *names = fopen(setting("FAKE_CUDA_NAMES", "/dev/null"), "r");
  while (names && fgets(line, sizeof line, names))
    if (sscanf(line, "%95s %31s", given, letters) == 2 && !strncmp(name, "leangen_", 8) &&
        !strcmp(name + 8, given)) {
      strcpy(made->name, given);
      strcpy(made->letters, letters);
    }
  if (names) fclose(names);
  *function = made;
  return *made->name ? 0 : 500; /* not found */
}
int cuMemAlloc_v2(void **pointer, size_t bytes) {
  size_t most = (size_t)atoll(setting("FAKE_CUDA_BYTES", "4000000000"));
  if (allocated + bytes > most) return 2;
  allocated += bytes;
  return *pointer = aligned_alloc(256, (bytes + 255) / 256 * 256), 0;
}
int cuMemFree_v2(void *pointer) { return free(pointer), 0; }
int cuMemsetD8_v2(void *pointer, unsigned char value, size_t bytes) {
  return memset(pointer, value, bytes), 0;
}
int cuMemcpyHtoD_v2(void *to, const void *from, size_t bytes) { return memcpy(to, from, bytes), 0; }
int cuMemcpyDtoH_v2(void *to, const void *from, size_t bytes) { return memcpy(to, from, bytes), 0; }
int cuMemcpyDtoD_v2(void *to, const void *from, size_t bytes) { return memcpy(to, from, bytes), 0; }
int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
  return (void)stream, memmove(to, from, bytes), note("copy"), 0;
}
int cuEventCreate(void **event, unsigned flags) { return (void)flags, *event = NULL, 0; }
int cuEventRecord(void *event, void *stream) { return (void)event, (void)stream, 0; }
int cuEventSynchronize(void *event) { return (void)event, 0; }
int cuEventElapsedTime(float *milliseconds, void *first, void *last) {
  return (void)first, (void)last, *milliseconds = 30, 0;
}
int cuEventDestroy_v2(void *event) { return (void)event, 0; }
int cuLaunchKernelEx(const Config *config, Function *function, void **arguments, void **extra) {
  const unsigned *grid = config->grid, *block = config->block;
  void **given = arguments;
  char line[1024];
  int at = snprintf(line, sizeof line, "%s %u %u %u %u %d", function->name, grid[0], grid[1],
                    grid[2], block[0], config->stream != NULL);
  for (const char *letter = function->letters; *letter; letter++, arguments++)
    at += *letter == 'f' ? snprintf(line + at, sizeof line - (size_t)at, " %.6g",
                                    (double)*(float *)*arguments)
                         : snprintf(line + at, sizeof line - (size_t)at, " %lld",
                                    (long long)*(int64_t *)*arguments);
  int overlaps = config->count == 1 && config->attributes->id == 6 && config->attributes->value[0];
  if (overlaps && *setting("FAKE_CUDA_OVERLAPS", "")) note("overlaps");
  note(line);
  if (config->count != (unsigned)overlaps || (overlaps && capability() < 9)) return 1;
  if (block[1] != 1 || block[2] != 1 || config->shared || extra) return 1;
  return run ? run(function->name, grid, block[0], given) : 0;
}
