/* Runs work in phases on threads that come when they like, as ORT's do: prints what each phase made
 * of what the one before it had made. Built with ThreadSanitizer by test_kernels_phases.py.
 *
 *     phases_runner THREADS SEED */
#define _DEFAULT_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "op.h"

enum { PHASES = 200, PARTS = 40, RUNS = 10, THREADS = 16 };

any_fn *ort_api;

typedef struct {
  uint64_t made[PHASES][PARTS];
  int64_t running[MOST_THREADS]; /* no lock: a thread's number is its own while it runs a part */
} Data;

typedef struct {
  Data *data;
  int phase, parts, before;
} Job;

/* Needs all of the phase before, and leaves something that depends on the part. */
static void part(void *given, int64_t i, int64_t thread) {
  const Job *job = given;
  uint64_t sum = (uint64_t)i + 1;
  if ((i + job->phase) % 16 == 0) usleep(1); /* let others in, though cores are few or busy */
  for (int j = 0; j < job->before; j++)
    sum = sum * 6364136223846793005u + job->data->made[job->phase - 1][j];
  job->data->running[thread]++;
  job->data->made[job->phase][i] += sum; /* twice, if it is run twice */
}

typedef struct {
  void (*work)(void *, size_t);
  void *region;
  size_t first, last;
  useconds_t late_us;
} Stretch;

static void *run_stretch(void *given) {
  const Stretch *stretch = given;
  if (stretch->late_us) usleep(stretch->late_us);
  for (size_t i = stretch->first; i < stretch->last; i++) stretch->work(stretch->region, i);
  return NULL;
}

static size_t threads;

static Status parallel_for(void *context, void (*work)(void *, size_t), size_t total, size_t batch,
                           void *region) {
  (void)context, (void)batch;
  pthread_t ids[THREADS];
  Stretch stretches[THREADS];
  for (size_t i = 0; i < threads; i++) {
    useconds_t late = rand() % 3 ? 0 : (useconds_t)(rand() % 300);
    stretches[i] =
        (Stretch){work, region, total * i / threads, total * (i + 1) / threads, late};
    if (i) pthread_create(&ids[i], NULL, run_stretch, &stretches[i]);
  }
  run_stretch(&stretches[0]);
  for (size_t i = 1; i < threads; i++) pthread_join(ids[i], NULL);
  return NULL;
}

int main(int count, char **given) {
  static any_fn api[KernelContext_ParallelFor + 1];
  static Data data, expected;
  static Phase phases[PHASES];
  static Job jobs[PHASES];
  if (count < 3) return 2;
  threads = (size_t)atoi(given[1]);
  srand((unsigned)atoi(given[2]));
  api[KernelContext_ParallelFor] = (any_fn)parallel_for;
  ort_api = api;
  for (int run = 0; run < RUNS; run++) {
    memset(&data, 0, sizeof data);
    memset(&expected, 0, sizeof expected);
    int length = 1 + rand() % PHASES;
    for (int i = 0; i < length; i++) {
      jobs[i] = (Job){&data, i, rand() % 3 ? 1 + rand() % PARTS : 1, i ? jobs[i - 1].parts : 0};
      phases[i] = (Phase){.part = part, .job = &jobs[i], .parts = jobs[i].parts};
      Job alone = jobs[i];
      alone.data = &expected;
      for (int j = 0; j < alone.parts; j++) part(&alone, j, 0);
    }
    if (run_phases(NULL, phases, (size_t)length)) return 3;
    if (memcmp(data.made, expected.made, sizeof data.made)) return 4;
    int64_t parts = 0;
    for (int i = 0; i < MOST_THREADS; i++) parts += data.running[i];
    if (parts != expected.running[0]) return 5;
  }
  puts("ok");
  return 0;
}
