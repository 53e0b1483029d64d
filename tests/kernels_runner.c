/* Runs kernels of a library built for another machine, under an emulator.
 *
 * argv: variant. stdin, for each call: 'k' with the length of the kernel's name and the name; for
 * each argument a letter, then int64 ('i'), double ('d'), or a length and that many bytes ('b',
 * passed as an address); '.'. stdout: the buffers afterwards. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "../kernels/native/kernels.h"

enum { MOST = 16 };

static int64_t read_int(void) {
  int64_t value;
  if (fread(&value, sizeof value, 1, stdin) != 1) exit(4);
  return value;
}

static char *read_bytes(size_t size) {
  char *bytes = malloc(size + 1);
  if (!bytes || fread(bytes, 1, size, stdin) != size) exit(4);
  bytes[size] = 0;
  return bytes;
}

static void call(int (*kernel)()) {
  int64_t i[MOST] = {0}, sizes[MOST] = {0};
  char *buffers[MOST];
  double real = 0;
  size_t used = 0, held = 0;
  for (int letter; (letter = getchar()) != '.';) {
    if (used == MOST) exit(5);
    if (letter == 'd') {
      if (fread(&real, sizeof real, 1, stdin) != 1) exit(4);
    } else if (letter == 'i') {
      i[used++] = read_int();
    } else if (letter == 'b') {
      sizes[held] = read_int();
      buffers[held] = read_bytes((size_t)sizes[held]);
      i[used++] = (int64_t)buffers[held++];
    } else {
      exit(6);
    }
  }
  void *nothing = NULL, *exception = NULL;
  /* More arguments than it takes do no harm, and a double has registers of its own. */
  kernel(&nothing, &exception, i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9],
         i[10], i[11], real);
  for (size_t b = 0; b < held; b++) {
    fwrite(buffers[b], 1, (size_t)sizes[b], stdout);
    free(buffers[b]);
  }
  fflush(stdout);
}

int main(int count, char **words) {
  if (count != 2) return 2;
  while (getchar() == 'k') {
    char *name = read_bytes((size_t)read_int());
    int (*kernel)() = (int (*)())leangen_kernels_find(words[1], name);
    free(name);
    if (!kernel) return 3;
    call(kernel);
  }
  return 0;
}
