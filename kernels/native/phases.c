/* Runs work that is cut into phases, on ORT's threads, which are woken once for all phases.
 *
 * A thread takes parts of a phase by a counter; where none is left it waits for those that others
 * have taken and are running. So nobody waits for a thread that has not come: one that ORT starts
 * late joins the phase that is current, and one alone does everything. What a part computes does
 * not depend on who runs it. */
#define _POSIX_C_SOURCE 200112L
#include <sched.h>
#include <stdatomic.h>

#include "op.h"

/* Looks at a counter before giving the core away, as the others may be more threads than cores. */
enum { PATIENCE = 2000 };

/* A phase is cut into as many stretches, so that threads seldom take from the same one. */
enum { LANES = 8 };

typedef struct {
  _Alignas(LINE) _Atomic uint64_t next; /* number of a phase << 32 | part of its stretch */
} Lane;

typedef struct {
  Phase *phases;
  size_t count;
  Lane lanes[LANES];
} Region;

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int is_done(const Phase *phase) {
  return atomic_load_explicit(&phase->done, memory_order_acquire) == phase->parts;
}

/* Run what is left of a phase's stretch in a lane; how many parts. */
static int32_t run_lane(Region *region, size_t number, int32_t index, int64_t thread) {
  Phase *phase = &region->phases[number];
  _Atomic uint64_t *next = &region->lanes[index].next;
  int32_t first = phase->parts * index / LANES, done = 0;
  uint64_t begin = (uint64_t)number << 32;
  uint64_t end = begin + (uint64_t)(phase->parts * (index + 1) / LANES - first);
  uint64_t seen = atomic_load_explicit(next, memory_order_relaxed);
  for (;;) {
    uint64_t part = seen < begin ? begin : seen; /* nobody has come to this phase before */
    if (part >= end) return done;
    if (!atomic_compare_exchange_weak_explicit(next, &seen, part + 1, memory_order_relaxed,
                                               memory_order_relaxed))
      continue;
    phase->part(phase->job, first + (int64_t)(part - begin), thread);
    done++, seen = part + 1;
  }
}

/* ORT calls with the numbers below MOST_THREADS, each of its threads with a stretch of them: what a
 * thread comes with first says where it stands among them, in this run and in the next one. */
static void work(void *given, size_t thread) {
  Region *region = given;
  if (is_done(&region->phases[region->count - 1])) return;
  /* Far from the others', so that each thread reads memory as one stream as long as it can, and the
   * same memory each time: caches that cores do not share then hold more. */
  int32_t start = (int32_t)thread * LANES / MOST_THREADS;
  for (size_t number = 0; number < region->count; number++) {
    Phase *phase = &region->phases[number], *next = phase + 1;
    if (is_done(phase)) continue;
    if (number + 1 < region->count && next->ask) next->ask(next->job, next->parts * start / LANES);
    int32_t done = 0;
    for (int32_t i = 0; i < LANES; i++)
      done += run_lane(region, number, (start + i) % LANES, (int64_t)thread);
    if (done) atomic_fetch_add_explicit(&phase->done, done, memory_order_release);
    for (int looks = 1; !is_done(phase); looks++) {
      if (looks % PATIENCE)
        pause_briefly();
      else
        sched_yield();
    }
  }
}

Status run_phases(void *context, Phase *phases, size_t count) {
  Region region = {.phases = phases, .count = count};
  size_t alone = 0;
  while (alone < count && phases[alone].parts == 1) alone++;
  if (alone < count)
    return ORT(KernelContext_ParallelFor)(context, work, (size_t)MOST_THREADS, (size_t)0, &region);
  if (count) work(&region, 0);
  return NULL;
}
