/* Runs one kernel of a library built for another machine, under an emulator.
 *
 * argv: variant, kernel. stdin: for each argument a letter, then int64 ('i'), double ('d'), or a
 * length and that many bytes ('b', passed as an address). stdout: the buffers afterwards. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "../kernels/native/kernels.h"

int main(int count, char **words) {
  if (count != 3) return 2;
  int (*kernel)() = (int (*)())leangen_kernels_find(words[1], words[2]);
  if (!kernel) return 3;
  int64_t integers[16] = {0}, sizes[16] = {0}, size;
  char *buffers[16];
  double real = 0;
  size_t used = 0, held = 0;
  for (int letter; (letter = getchar()) != EOF && used < 16;) {
    if (letter == 'd') {
      if (fread(&real, sizeof real, 1, stdin) != 1) return 4;
      continue;
    }
    if (fread(&size, sizeof size, 1, stdin) != 1) return 4;
    integers[used] = size;
    if (letter == 'b') {
      buffers[held] = malloc((size_t)size + 1);
      if (fread(buffers[held], 1, (size_t)size, stdin) != (size_t)size) return 4;
      integers[used] = (int64_t)buffers[held];
      sizes[held++] = size;
    }
    used++;
  }
  void *nothing = NULL, *exception = NULL;
  int64_t *i = integers;
  /* More arguments than it takes do no harm, and a double has registers of its own. */
  kernel(&nothing, &exception, i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9],
         i[10], i[11], real);
  for (size_t b = 0; b < held; b++) fwrite(buffers[b], 1, (size_t)sizes[b], stdout);
  return 0;
}
