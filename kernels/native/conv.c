/* Conv: y = conv(activation(norm(x)), w) + bias + residual, and ConvTranspose, the same in 1-D.
 *
 *   x         float [batch, channels, (height,) width]
 *   weights   uint8, conv_layout.pack of [n, channels * kernel]
 *   bias      float [n], optional
 *   residual  float, shaped as y or with a batch of 1, optional
 *   gain      float [channels], optional: a norm first, over groups of channels:
 *   shift     float [channels]: norm(x) = gain * (x - mean) / deviation + shift
 *   film      float [batch, 2 * channels], optional: norm(x) * (1 + film[:, :c]) + film[:, c:]
 *   -> y      float [batch, n, (height,) width]
 *
 * Attributes: n, bits (of a weight: 8, 4), block (weights of a row that share a scale),
 * kernel_shape, pads, dilations, norm_groups, epsilon, activation ("silu", "leaky_relu" or none),
 * alpha (of leaky_relu). Strides are 1. ConvTranspose has strides instead of dilations; its weights
 * are those of a convolution with n * stride outputs, see conv_layout.transposed.
 *
 * A part of the output, a strip of rows or a stretch of samples, is one thread's work at a time;
 * conv.py says what is done to it. Where strips are few, several threads share one: its patches are
 * kept, and each makes some of the outputs of them. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "op.h"

enum { LANES = 16, OUTPUTS = 4, VECTORS = 2, TILE = LANES * VECTORS, UNIT = 128 };

/* A strip's padded image: small enough to stay in a second-level cache, as rows at its edge are
 * made twice. Strips with fewer multiplications than STRIP_WORK cost more to hand out than to run;
 * those with fewer than STRIP_PIXELS make many rows twice, so the outputs of two are cut instead. */
enum { IMAGE_BYTES = 512 << 10, STRIP_WORK = 1 << 20, STRIP_PIXELS = 512, SPLIT_GROUPS = 12 };
enum { NORM_WORK = 64 << 10 }; /* floats */
enum { UNPACK_WORK = 256 };    /* units */

enum { X, WEIGHTS, BIAS, RESIDUAL, GAIN, SHIFT, FILM, INPUTS };

typedef struct {
  Tensor constants[INPUTS];
  const char *name;
  int64_t n, bits, block, rank, norm_groups;
  int64_t kernel[2], before[2], after[2], dilations[2];
  int64_t stride, crop, crop_after; /* of ConvTranspose; else 1 and 0 */
  int64_t full_kernel;              /* of ConvTranspose: its own, not that of its phases */
  double epsilon, slope;
  moments_fn moments;
  normalize_fn activate;
  pack_patches_fn pack;
  elementwise_fn unpack;
  conv_fn multiply[VECTORS];
} Conv;

typedef struct {
  const Conv *op;
  const float *x, *bias, *residual, *gain, *shift, *film, *numbers;
  const char *codes, *nibbles;
  float *y, *biases, *moments, *gains, *kept_scales;
  int32_t *offsets, *taps;
  char *work, *kept, *unpacked;
  int64_t batch, channels, h, w;      /* of x */
  int64_t rows, columns, y_w;         /* of the convolution; of y, which has as many rows */
  int64_t residual_step;              /* from one batch to the next */
  int64_t n, fours, blocks, groups;   /* of the weights; n counts phases */
  int64_t units;                      /* of their codes */
  int64_t strip_rows, strip_columns, strips, splits, norm_parts, unpack_parts;
  int64_t lead, pitch, copy, copies, plane; /* of a strip's image, in floats */
  int64_t tiles;                      /* of a strip */
  int64_t work_bytes;                 /* all that a thread needs */
  int aligned;                        /* 16 pixels side by side never lie in two rows */
} Job;

static Status read_shape(Conv *op, Options from, int transposed) {
  int64_t shape[2], pads[4] = {0}, dilations[2] = {1, 1};
  op->rank = (int64_t)attribute_ints(from, "kernel_shape", shape, 2);
  if (op->rank < 1 || op->rank > 2 - transposed)
    return fail("%s: kernel_shape of rank %lld, expected 1%s", op->name, (long long)op->rank,
                transposed ? "" : " or 2");
  attribute_ints(from, "pads", pads, 4);
  attribute_ints(from, transposed ? "strides" : "dilations", dilations, 2);
  for (int64_t i = 0, at = 2 - op->rank; i < op->rank; i++, at++) {
    int64_t most = larger(larger(shape[i], dilations[i]), larger(pads[i], pads[i + op->rank]));
    if (shape[i] < 1 || dilations[i] < 1 || pads[i] < 0 || pads[i + op->rank] < 0 ||
        most > 1 << 16)
      return fail("%s: kernel_shape %lld, pads %lld and %lld, %s %lld are out of range", op->name,
                  (long long)shape[i], (long long)pads[i], (long long)pads[i + op->rank],
                  transposed ? "strides" : "dilations", (long long)dilations[i]);
    op->kernel[at] = shape[i], op->dilations[at] = dilations[i];
    op->before[at] = pads[i], op->after[at] = pads[i + op->rank];
  }
  if (!transposed) return NULL;
  /* Output q * stride + r - crop is phase r of a convolution at q with every stride-th weight. */
  op->full_kernel = op->kernel[1], op->stride = op->dilations[1], op->dilations[1] = 1;
  op->crop = op->before[1], op->crop_after = op->after[1];
  op->kernel[1] = up_to(op->full_kernel, op->stride) / op->stride;
  op->before[1] = op->after[1] = op->kernel[1] - 1;
  return NULL;
}

static Status create(const CustomOp *self, const void *api, const void *info, void **kernel) {
  (void)api;
  char activation[32];
  Options from = {info, -1};
  Conv op = {.name = self->name(self), .stride = 1, .kernel = {1, 1}, .dilations = {1, 1}};
  TRY(read_shape(&op, from, !strcmp(op.name, "ConvTranspose")));
  op.n = attribute_int(from, "n", 0);
  op.bits = attribute_int(from, "bits", 0);
  op.block = attribute_int(from, "block", 0);
  op.norm_groups = attribute_int(from, "norm_groups", 0);
  op.epsilon = attribute_float(from, "epsilon", 1e-5f);
  if (op.n < 1 || op.n > 1 << 20 || (op.bits != 4 && op.bits != 8) || op.block < 4 || op.block % 4)
    return fail("%s: n %lld, bits %lld, block %lld, expected outputs, 4 or 8 bits and blocks of a"
                " multiple of 4", op.name, (long long)op.n, (long long)op.bits,
                (long long)op.block);
  attribute_string(from, "activation", activation, sizeof activation);
  int silu = !strcmp(activation, "silu"), leaky = !strcmp(activation, "leaky_relu");
  if (*activation && !silu && !leaky)
    return fail("%s: activation '%s', expected silu or leaky_relu", op.name, activation);
  op.slope = leaky ? attribute_float(from, "alpha", 0.01f) : 1;
  if (!(op.slope >= 0 && op.slope <= 1))
    return fail("%s: alpha %g, expected 0 to 1", op.name, op.slope);
  const char *variant = leangen_kernels_variant(NULL);
  op.moments = leangen_kernels_find(variant, "moments");
  op.activate = leangen_kernels_find(variant, silu ? "activate_silu" : "activate_linear");
  op.pack = leangen_kernels_find(variant, "pack_patches");
  op.unpack = leangen_kernels_find(variant, "unpack_nibbles");
  op.multiply[0] = leangen_kernels_find(variant, "conv_1");
  op.multiply[1] = leangen_kernels_find(variant, "conv_2");
  TRY(read_constants(info, INPUTS, op.constants));
  *kernel = malloc(sizeof op);
  if (!*kernel) return fail("%s: out of memory", op.name);
  memcpy(*kernel, &op, sizeof op);
  return NULL;
}

/* Groups of channels that share a mean, or images where there is no norm. */
static int64_t norms_of(const Job *job) {
  return job->batch * (job->gain ? job->op->norm_groups : 1);
}

/* What each channel of a group is multiplied with, and what is added, before the activation. */
static void make_gains(const Job *job, int64_t group) {
  int64_t groups = job->gain ? job->op->norm_groups : 1, each = job->channels / groups;
  int64_t b = group / groups, first = group % groups * each;
  float *gains = job->gains + 2 * (b * job->channels + first), *moments = job->moments + 2 * group;
  if (job->gain)
    CALL_KERNEL(job->op->moments,
                (int64_t)(job->x + (b * job->channels + first) * job->h * job->w),
                each * job->h * job->w, (int64_t)moments, job->op->epsilon);
  for (int64_t c = first; c < first + each; c++, gains += 2) {
    float gain = 1, shift = 0;
    if (job->gain) {
      gain = job->gain[c] * moments[1];
      shift = job->shift[c] - gain * moments[0];
    }
    if (job->film) {
      const float *film = job->film + 2 * b * job->channels + c;
      gain *= 1 + film[0];
      shift = shift * (1 + film[0]) + film[job->channels];
    }
    gains[0] = gain, gains[1] = shift;
  }
}

/* What strips need: some groups of channels' gains, or some of the weights unpacked. */
static void prepare(void *given, int64_t part, int64_t thread) {
  const Job *job = given;
  (void)thread;
  if (part < job->norm_parts) {
    int64_t all = norms_of(job);
    for (int64_t i = all * part / job->norm_parts; i < all * (part + 1) / job->norm_parts; i++)
      make_gains(job, i);
    return;
  }
  part -= job->norm_parts;
  int64_t first = job->units * part / job->unpack_parts;
  int64_t last = job->units * (part + 1) / job->unpack_parts;
  CALL_KERNEL(job->op->unpack, (int64_t)(job->nibbles + first * UNIT / 2),
              (int64_t)(job->unpacked + first * UNIT), last - first);
}

/* Where the weights' elements are from a pixel's place in the image, in bytes. */
static void make_offsets(Job *job) {
  const Conv *op = job->op;
  int64_t k = 0, taps = op->kernel[0] * op->kernel[1];
  for (int64_t i = 0, tap = 0; i < op->kernel[0]; i++)
    for (int64_t j = 0; j < op->kernel[1]; j++) {
      int64_t at = i * op->dilations[0] * job->pitch;
      at += job->copies > 1 ? j * job->copy : j * op->dilations[1];
      job->taps[tap++] = (int32_t)(4 * at);
    }
  for (int64_t c = 0; c < job->channels; c++)
    for (int64_t tap = 0; tap < taps; tap++)
      job->offsets[k++] = (int32_t)(4 * c * job->plane) + job->taps[tap];
  while (k < 4 * job->fours) job->offsets[k++] = 0; /* these weights are zero */
}

/* What a thread works with: the padded image [channels, copies, rows, pitch] behind a strip, each
 * pixel's range over the channels in two more planes, and one tile of patches and of outputs. */
typedef struct {
  float *image, *low, *high, *scales, *tile;
  char *patches;
} Work;

static Work work_at(const Job *job, int64_t thread) {
  Work work = {.image = (float *)(job->work + thread * job->work_bytes)};
  work.low = work.image + job->channels * job->plane;
  work.high = work.low + job->plane;
  work.scales = work.high + job->plane;
  work.tile = work.scales + 2 * TILE;
  work.patches = (char *)(work.tile + OUTPUTS * job->groups * TILE);
  return work;
}

/* Part of the output: `rows` from `top` of image b by `columns` from `left`. */
typedef struct {
  int64_t b, top, left, rows, columns, pixels; /* pixels: places in the image from first to last */
} Strip;

static Strip strip_at(const Job *job, int64_t number) {
  int64_t across = up_to(job->columns, job->strip_columns) / job->strip_columns;
  Strip strip = {.b = number / job->strips, .left = number % across * job->strip_columns,
                 .top = number % job->strips / across * job->strip_rows};
  strip.rows = smaller(job->strip_rows, job->rows - strip.top);
  strip.columns = smaller(job->strip_columns, job->columns - strip.left);
  strip.pixels = job->aligned ? strip.rows * strip.columns
                              : (strip.rows - 1) * job->pitch + strip.columns;
  return strip;
}

/* Pixels from row y and column x on, through norm and activation, to a place in the image. */
static void activate(const Job *job, const Work *work, int64_t b, int64_t y, int64_t x,
                     int64_t pixels, int64_t place) {
  CALL_KERNEL(job->op->activate, (int64_t)(job->x + (b * job->channels * job->h + y) * job->w + x),
              4 * job->h * job->w, (int64_t)(work->image + place), 4 * job->plane,
              (int64_t)(work->low + place), (int64_t)(work->high + place), pixels, job->channels,
              (int64_t)(job->gains + 2 * b * job->channels), job->op->slope);
}

/* An image whose rows are padded. */
static void fill_padded(const Job *job, const Work *work, const Strip *strip) {
  const Conv *op = job->op;
  int64_t top = strip->top - op->before[0], left = strip->left - op->before[1];
  int64_t rows = strip->rows + op->dilations[0] * (op->kernel[0] - 1);
  int64_t columns = strip->columns + op->dilations[1] * (op->kernel[1] - 1);
  int64_t before = smaller(larger(-left, 0), columns), from = left + before;
  int64_t known = larger(smaller(job->w - from, columns - before), 0);
  for (int64_t row = 0; row < rows; row++) {
    int64_t y = top + row, inside = y >= 0 && y < job->h ? known : 0;
    int64_t place = job->lead + row * job->pitch;
    for (int64_t c = 0; c < job->channels + 2; c++) { /* low and high follow the image */
      float *one = work->image + c * job->plane + place;
      for (int64_t i = 0; i < before; i++) one[i] = 0;
      for (int64_t i = before + inside; i < columns; i++) one[i] = 0;
    }
    if (inside) activate(job, work, strip->b, y, from, inside, place + before);
  }
}

/* An image for each column of the kernel, shifted by it, whose rows adjoin. */
static void fill_copies(const Job *job, const Work *work, const Strip *strip) {
  const Conv *op = job->op;
  int64_t top = strip->top - op->before[0], w = job->w;
  int64_t rows = strip->rows + op->dilations[0] * (op->kernel[0] - 1);
  int64_t above = smaller(larger(-top, 0), rows);
  int64_t inside = larger(smaller(job->h - top, rows) - above, 0), all = rows * w;
  int64_t here = op->before[1] / op->dilations[1] * job->copy; /* that which is not shifted */
  if (inside) activate(job, work, strip->b, top + above, 0, inside * w, here + above * w);
  for (int64_t c = 0; c < job->channels + 2; c++) { /* low and high follow the image */
    const float *from = work->image + c * job->plane + here;
    memset((float *)from, 0, (size_t)(above * w) * sizeof *from);
    memset((float *)from + (above + inside) * w, 0,
           (size_t)(all - (above + inside) * w) * sizeof *from);
    for (int64_t j = 0; j < job->copies; j++) {
      float *to = work->image + c * job->plane + j * job->copy;
      int64_t shift = j * op->dilations[1] - op->before[1], off = shift < 0 ? -shift : shift;
      if (!shift) continue;
      off = smaller(off, w);
      if (off < w)
        memcpy(shift < 0 ? to + off : to, shift < 0 ? from : from + off,
               (size_t)(all - off) * sizeof *to);
      for (float *row = shift < 0 ? to : to + w - off; row < to + all; row += w)
        for (int64_t i = 0; i < off; i++) row[i] = 0;
    }
  }
}

static void fill(const Job *job, const Work *work, const Strip *strip) {
  if (job->copies > 1)
    fill_copies(job, work, strip);
  else
    fill_padded(job, work, strip);
}

/* Patches of a tile, from pixel `at` of a strip; how many vectors they are. */
static int64_t pack(const Job *job, const Work *work, const Strip *strip, int64_t at,
                    char *patches, float *scales) {
  int64_t vectors = up_to(smaller(strip->pixels - at, TILE), LANES) / LANES;
  for (int64_t v = 0; v < vectors; v++) {
    int64_t first = at + LANES * v;
    if (job->aligned) first = first / strip->columns * job->pitch + first % strip->columns;
    first += job->lead;
    CALL_KERNEL(job->op->pack, (int64_t)(work->image + first), (int64_t)(work->low + first),
                (int64_t)(work->high + first), (int64_t)job->offsets, job->fours,
                (int64_t)job->taps, job->op->kernel[0] * job->op->kernel[1],
                (int64_t)(patches + 4 * LANES * v), 4 * LANES * vectors,
                (int64_t)(scales + 2 * LANES * v));
  }
  return vectors;
}

/* From a tile to y: past the pixels between rows, and each phase of a transposed convolution to its
 * place. The tile is `outputs` of `pixels` from place `at` of the strip's image. */
static void scatter(const Job *job, const float *tile, const Strip *strip, int64_t at,
                    int64_t output, int64_t outputs, int64_t pixels) {
  int64_t stride = job->op->stride, image = job->op->n * job->rows * job->y_w, b = strip->b;
  const float *residual = job->residual ? job->residual + b * (job->residual_step - image) : NULL;
  for (int64_t o = output; o < output + outputs; o++, tile += TILE) {
    int64_t first = (b * job->op->n + o / stride) * job->rows + strip->top;
    for (int64_t i = 0; i < pixels; i++) {
      int64_t row = (at + i) / job->pitch, column = (at + i) % job->pitch;
      int64_t to = (strip->left + column) * stride + o % stride - job->op->crop;
      if (column >= strip->columns || to < 0 || to >= job->y_w) continue;
      to += (first + row) * job->y_w;
      job->y[to] = tile[i] + (residual ? residual[to] : 0);
    }
  }
}

/* Outputs of the groups from `first` to `last` of a tile of patches. */
static void multiply(const Job *job, const Work *work, const Strip *strip, int64_t at,
                     const char *patches, const float *scales, int64_t first, int64_t last) {
  const Conv *op = job->op;
  int64_t pixels = smaller(strip->pixels - at, TILE), vectors = up_to(pixels, LANES) / LANES;
  int64_t output = OUTPUTS * first, outputs = smaller(OUTPUTS * last, job->n) - output;
  int64_t to = ((strip->b * job->n + output) * job->rows + strip->top) * job->y_w + strip->left + at;
  int direct = job->aligned && op->stride == 1;
  const float *residual = direct ? job->residual : NULL;
  if (residual) residual += strip->b * (job->residual_step - op->n * job->rows * job->y_w) + to;
  CALL_KERNEL(op->multiply[vectors - 1], (int64_t)patches, (int64_t)scales,
              (int64_t)(job->codes + first * job->fours * 4 * OUTPUTS),
              (int64_t)(job->numbers + first * (job->blocks + 1) * OUTPUTS), job->fours,
              op->block / 4, (int64_t)(direct ? job->y + to : work->tile),
              direct ? 4 * job->rows * job->y_w : 4 * TILE, pixels, outputs,
              (int64_t)(job->biases + output), (int64_t)residual);
  if (!direct) scatter(job, work->tile, strip, at, output, outputs, pixels);
}

/* All of one strip, a tile's patches being used at once. */
static void convolve(void *given, int64_t part, int64_t thread) {
  const Job *job = given;
  Strip strip = strip_at(job, part);
  Work work = work_at(job, thread);
  fill(job, &work, &strip);
  for (int64_t at = 0; at < strip.pixels; at += TILE) {
    pack(job, &work, &strip, at, work.patches, work.scales);
    multiply(job, &work, &strip, at, work.patches, work.scales, 0, job->groups);
  }
}

/* The patches of one strip, kept. */
static void pack_strip(void *given, int64_t part, int64_t thread) {
  const Job *job = given;
  Strip strip = strip_at(job, part);
  Work work = work_at(job, thread);
  fill(job, &work, &strip);
  for (int64_t at = 0, tile = part * job->tiles; at < strip.pixels; at += TILE, tile++)
    pack(job, &work, &strip, at, job->kept + tile * 4 * TILE * job->fours,
         job->kept_scales + tile * 2 * TILE);
}

/* Some outputs of one strip. */
static void multiply_strip(void *given, int64_t part, int64_t thread) {
  const Job *job = given;
  int64_t number = part / job->splits, split = part % job->splits;
  Strip strip = strip_at(job, number);
  Work work = work_at(job, thread);
  for (int64_t at = 0, tile = number * job->tiles; at < strip.pixels; at += TILE, tile++)
    multiply(job, &work, &strip, at, job->kept + tile * 4 * TILE * job->fours,
             job->kept_scales + tile * 2 * TILE, job->groups * split / job->splits,
             job->groups * (split + 1) / job->splits);
}

/* The rows of a strip's image. They are padded; but those that would leave lanes empty adjoin. */
static void lay_out(Job *job) {
  const Conv *op = job->op;
  int64_t along = op->dilations[1] * (op->kernel[1] - 1);
  int whole = job->rows == 1 || job->columns % LANES == 0;
  job->lead = 0, job->copies = 1, job->pitch = job->strip_columns + along;
  if (!whole && job->columns == job->w && op->before[1] % op->dilations[1] == 0 &&
      op->before[1] <= along) {
    job->copies = op->kernel[1], job->pitch = job->columns;
  } else if (whole && job->rows > 1) { /* rows begin a cache line where they are read most often */
    job->lead = (up_to(op->before[1], LANES) - op->before[1]) % LANES;
    job->pitch = up_to(job->pitch, LANES);
  }
  job->aligned = whole || job->pitch == job->columns;
}

/* How the work is cut up: by strips, and by outputs where there would be few. */
static void cut(Job *job) {
  const Conv *op = job->op;
  int64_t down = op->dilations[0] * (op->kernel[0] - 1);
  int64_t along = op->dilations[1] * (op->kernel[1] - 1), pixels = job->rows * job->columns;
  int64_t wanted = smaller(larger(job->n * job->fours * 4 * pixels / STRIP_WORK, 1), 8);
  int64_t held = IMAGE_BYTES / 4 / (job->channels + 2);
  int64_t strips = smaller(wanted, larger(pixels / STRIP_PIXELS, 2));
  job->strip_rows = job->rows, job->strip_columns = job->columns;
  if (job->rows == 1) {
    int64_t most = larger(held - along, TILE);
    strips = larger(strips, up_to(job->columns, most) / most);
    int64_t each = up_to(job->columns, strips) / strips;
    job->strip_columns = smaller(up_to(each, TILE), job->columns);
    job->strips = up_to(job->columns, job->strip_columns) / job->strip_columns;
    lay_out(job);
  } else {
    lay_out(job);
    int64_t most = larger(held / (job->copies * job->pitch) - down, 1);
    strips = larger(strips, up_to(job->rows, most) / most);
    job->strip_rows = up_to(job->rows, strips) / strips;
    job->strips = up_to(job->rows, job->strip_rows) / job->strip_rows;
  }
  job->splits = wanted / (job->strips * larger(job->batch, 1));
  job->splits = larger(smaller(job->groups / SPLIT_GROUPS, job->splits), 1);
  job->copy = up_to((job->strip_rows + down) * job->pitch + job->lead, LANES);
  /* An odd number of cache lines: channels do not fall on each other. What the last vector of a
   * strip reads past its end is in the line that is left over. */
  job->plane = job->copies * job->copy + LANES;
  if (job->plane / LANES % 2 == 0) job->plane += LANES;
  job->tiles = up_to(job->strip_rows * job->pitch, TILE) / TILE;
  job->work_bytes = 4 * ((job->channels + 2) * job->plane + 2 * TILE +
                         OUTPUTS * job->groups * TILE + TILE * job->fours);
  job->work_bytes = up_to(job->work_bytes + 64, 64);
}

static Status check(const Conv *op, const Tensor *in) {
  const Tensor *x = &in[X], *weights = &in[WEIGHTS], *bias = &in[BIAS], *gain = &in[GAIN];
  const Tensor *shift = &in[SHIFT], *film = &in[FILM];
  if (x->rank != (size_t)op->rank + 2)
    return fail("%s: x has rank %zu, expected %lld", op->name, x->rank, (long long)op->rank + 2);
  int64_t channels = x->dims[1];
  for (size_t i = 1; i < x->rank; i++)
    if (x->dims[i] < 1 || x->dims[i] > 1 << 28)
      return fail("%s: x has a dimension of %lld", op->name, (long long)x->dims[i]);
  int64_t k = channels * op->kernel[0] * op->kernel[1];
  if (k > 1 << 24) return fail("%s: %lld weights an output are too many", op->name, (long long)k);
  int64_t fours = up_to(k, 4) / 4, groups = up_to(op->n * op->stride, OUTPUTS) / OUTPUTS;
  int64_t bytes = up_to(groups * fours * 4 * OUTPUTS, UNIT) * op->bits / 8 +
                  groups * (up_to(4 * fours, op->block) / op->block + 1) * 4 * OUTPUTS;
  if (weights->count != bytes)
    return fail("%s: weights hold %lld bytes, expected %lld for n = %lld and %lld channels",
                op->name, (long long)weights->count, (long long)bytes, (long long)op->n,
                (long long)channels);
  if (bias->data && bias->count != op->n)
    return fail("%s: bias has %lld elements, expected n = %lld", op->name, (long long)bias->count,
                (long long)op->n);
  if ((gain->data || shift->data) && (gain->count != channels || shift->count != channels))
    return fail("%s: gain has %lld elements and shift %lld, expected %lld channels", op->name,
                (long long)gain->count, (long long)shift->count, (long long)channels);
  if (gain->data && (op->norm_groups < 1 || channels % op->norm_groups))
    return fail("%s: %lld channels do not make norm_groups = %lld", op->name, (long long)channels,
                (long long)op->norm_groups);
  if (film->data && film->count != x->dims[0] * 2 * channels)
    return fail("%s: film has %lld elements, expected %lld", op->name, (long long)film->count,
                (long long)(x->dims[0] * 2 * channels));
  return NULL;
}

static Status measure(Job *job, const Tensor *x, const Tensor *residual, int64_t *dims) {
  const Conv *op = job->op;
  job->batch = x->dims[0], job->channels = x->dims[1];
  job->h = op->rank == 2 ? x->dims[2] : 1, job->w = x->dims[x->rank - 1];
  int64_t size[2] = {job->h, job->w};
  for (int i = 0; i < 2; i++) {
    size[i] += op->before[i] + op->after[i] - op->dilations[i] * (op->kernel[i] - 1);
    if (size[i] < 1)
      return fail("%s: x of %lld by %lld is smaller than the kernel", op->name,
                  (long long)job->h, (long long)job->w);
  }
  job->rows = size[0], job->columns = job->y_w = size[1];
  if (op->full_kernel)
    job->y_w = (job->w - 1) * op->stride + op->full_kernel - op->crop - op->crop_after;
  if (job->y_w < 1) return fail("%s: pads leave no output of %lld samples", op->name,
                                (long long)job->w);
  dims[0] = job->batch, dims[1] = op->n, dims[2] = job->rows, dims[op->rank + 1] = job->y_w;
  job->n = op->n * op->stride;
  job->fours = up_to(job->channels * op->kernel[0] * op->kernel[1], 4) / 4;
  job->blocks = up_to(4 * job->fours, op->block) / op->block;
  job->groups = up_to(job->n, OUTPUTS) / OUTPUTS;
  job->units = up_to(job->groups * job->fours * 4 * OUTPUTS, UNIT) / UNIT;
  int same = residual->rank == x->rank;
  for (size_t i = 1; same && i < x->rank; i++) same = residual->dims[i] == dims[i];
  same = same && (residual->dims[0] == 1 || residual->dims[0] == dims[0]);
  job->residual_step = same && residual->dims[0] > 1 ? op->n * job->rows * job->y_w : 0;
  if (residual->rank && !same)
    return fail("%s: residual is not shaped as the output, [%lld, %lld, ...]", op->name,
                (long long)dims[0], (long long)dims[1]);
  cut(job);
  if (4 * (job->channels + 2) * job->plane > INT32_MAX ||
      job->batch * job->strips * job->splits > MOST_PARTS)
    return fail("%s: rows of %lld pixels of %lld channels are too long", op->name,
                (long long)job->columns, (long long)job->channels);
  return NULL;
}

/* Memory for what all strips share, and for what each thread works with. */
static Status allocate(Job *job) {
  const Conv *op = job->op;
  int64_t biases = up_to(4 * OUTPUTS * job->groups, 64);
  int64_t codes = op->bits == 4 ? job->units * UNIT : 0;
  int64_t moments = up_to(8 * norms_of(job), 64), gains = up_to(8 * job->batch * job->channels, 64);
  int64_t offsets = up_to(16 * job->fours, 64);
  int64_t taps = up_to(4 * op->kernel[0] * op->kernel[1], 64);
  int64_t tiles = job->splits > 1 ? job->batch * job->strips * job->tiles : 0;
  int64_t kept = tiles * 4 * TILE * job->fours, kept_scales = tiles * 8 * TILE;
  char *memory = scratch((size_t)(biases + codes + moments + gains + offsets + taps + kept +
                                  kept_scales + MOST_THREADS * job->work_bytes));
  if (!memory) return fail("%s: out of memory", op->name);
  job->biases = (float *)memory, memory += biases;
  if (codes) job->codes = job->unpacked = memory, memory += codes;
  job->moments = (float *)memory, memory += moments;
  job->gains = (float *)memory, memory += gains;
  job->offsets = (int32_t *)memory, memory += offsets;
  job->taps = (int32_t *)memory, memory += taps;
  job->kept = memory, memory += kept;
  job->kept_scales = (float *)memory, memory += kept_scales;
  job->work = memory;
  return NULL;
}

static Status compute(void *self, void *context) {
  const Conv *op = self;
  Tensor in[INPUTS];
  TRY(get_inputs(context, op->constants, INPUTS, in));
  TRY(check(op, in));
  Job job = {.op = op, .x = in[X].data, .bias = in[BIAS].data, .residual = in[RESIDUAL].data,
             .gain = in[GAIN].data, .shift = in[SHIFT].data, .film = in[FILM].data,
             .codes = in[WEIGHTS].data, .nibbles = in[WEIGHTS].data};
  int64_t dims[MAX_RANK];
  TRY(measure(&job, &in[X], &in[RESIDUAL], dims));
  TRY(get_output(context, 0, dims, in[X].rank, (void **)&job.y));
  if (!job.batch) return NULL;
  TRY(allocate(&job));
  job.numbers = (const float *)(job.nibbles + job.units * UNIT * op->bits / 8);
  for (int64_t i = 0; i < OUTPUTS * job.groups; i++)
    job.biases[i] = job.bias && i < job.n ? job.bias[i / op->stride] : 0;
  make_offsets(&job);
  int64_t strips = job.batch * job.strips, norms = job.gain ? norms_of(&job) : 1;
  job.norm_parts = larger(smaller(smaller(norms, 8), in[X].count / NORM_WORK), 1);
  job.unpack_parts = job.unpacked ? larger(smaller(job.units / UNPACK_WORK, 8), 1) : 0;
  Phase phases[] = {
      {.part = prepare, .job = &job, .parts = (int32_t)(job.norm_parts + job.unpack_parts)},
      {.part = convolve, .job = &job, .parts = (int32_t)strips},
      {.part = multiply_strip, .job = &job, .parts = (int32_t)(strips * job.splits)},
  };
  if (job.splits > 1) phases[1].part = pack_strip;
  return run_phases(context, phases, job.splits > 1 ? 3 : 2);
}

static Status infer(const CustomOp *self, void *context) {
  int64_t dims[MAX_RANK], shape[2], pads[4] = {0}, steps[2] = {1, 1};
  const char *names[MAX_RANK] = {0};
  size_t rank, kernel, padded, stepped;
  int transposed = !strcmp(self->name(self), "ConvTranspose");
  TRY(infer_input(context, 0, dims, names, &rank));
  TRY(infer_attribute_ints(context, "kernel_shape", shape, 2, &kernel));
  TRY(infer_attribute_ints(context, "pads", pads, 4, &padded));
  TRY(infer_attribute_ints(context, transposed ? "strides" : "dilations", steps, 2, &stepped));
  if (rank < 3 || rank != kernel + 2) return NULL; /* unknown here, checked when it runs */
  TRY(infer_attribute_int(context, "n", 0, &dims[1]));
  names[1] = "";
  for (size_t i = 0; i < kernel; i++) {
    int64_t more = pads[i] + pads[i + kernel] - steps[i] * (shape[i] - 1);
    if (!transposed && !more) continue; /* keeps its name */
    names[i + 2] = "";
    if (dims[i + 2] < 0) continue;
    if (transposed)
      dims[i + 2] = (dims[i + 2] - 1) * steps[i] + shape[i] - pads[i] - pads[i + kernel];
    else
      dims[i + 2] += more;
  }
  return infer_output(context, 0, dims, names, rank);
}

OPERATOR(conv_op, "Conv", INPUTS, 1, OP_ON_CPU, OP_WEIGHTED, .output_type = op_float,
         .infer_shape = infer);
OPERATOR(conv_transpose_op, "ConvTranspose", INPUTS, 1, OP_ON_CPU, OP_WEIGHTED,
         .output_type = op_float, .infer_shape = infer);
