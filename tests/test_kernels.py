"""Every compiled kernel, in every variant that can run here, against its NumPy twin."""

import itertools
import math

import draws
import numpy as np
import pytest
from kernels_machines import Emulated, Here, here
from leangen_kernels import cache_layout, layout, reference, units

FORMS = list(layout.FORMS.values())


@pytest.fixture(params=here())
def machine(request):
    return Here(request.param)


@pytest.fixture
def rng():
    return draws.rng()


def activations(machine, kernel, x, tile, center, block=32):
    """Rows packed by the kernel `quantize` or `keep`, in tiles."""
    m, k = x.shape
    blocks = -(-k // block)
    each = block + 8 if kernel == "quantize" else 4 * block + 4
    kernel = kernel if block == 32 else f"{kernel}_{block}"
    packed = np.zeros((-(-m // tile), blocks, tile, each), np.uint8)
    for i, row in enumerate(x):
        out = np.zeros((blocks, each), np.uint8)
        machine.call(kernel, row.copy(), out, each, k, center)
        packed[i // tile, :, i % tile] = out
    return packed


def numbers(rng, form, n, k):
    """Scales or minima that the form can hold."""
    shape = (n, -(-k // form.block))
    if not form.split:
        return (rng.standard_normal(shape) / 16).astype(form.numbers).astype(np.float32)
    per = units.SUPER // form.block
    unit = (rng.random((n, -(-shape[1] // per))) / 1000).astype(np.float16).astype(np.float32)
    found = rng.integers(-127, 127, shape) * np.repeat(unit, per, axis=1)[:, : shape[1]]
    return found.astype(np.float32)


def weights(rng, form, n, k):
    codes = rng.integers(0, 1 << form.bits, (n, k), dtype=np.uint8)
    minima = 16 * numbers(rng, form, n, k) if form.minimum else None
    return layout.pack(form, codes, numbers(rng, form, n, k), minima)


def product(machine, form, packed, n, x, kind, tile):
    m, k = x.shape
    kernel = "quantize" if kind == "int8" else "keep"
    rows = activations(machine, kernel, x, tile, form.center, form.block)
    y = np.full((m, n), np.nan, np.float32)
    blocks, groups = -(-k // form.block), -(-n // layout.ROWS)
    machine.call(
        f"{kind}_{form.kernel}_{tile}",
        rows, packed, blocks, y, 4 * n, m, n, 0, groups, form.held,
    )  # fmt: skip
    return y


def tiles(machine, form, kind):
    sizes = [m for m in (1, 2, 4, 8) if machine.has(f"{kind}_{form.kernel}_{m}")]
    assert sizes or (form.table and kind == "int8")
    return sizes


def bound(form, packed, n, x):
    """Rounding of an fp32 sum: a few ulps of the sum of magnitudes, per output."""
    k = x.shape[1]
    codes, scales, minima = layout.unpack(form, packed, n, k)
    sizes = np.abs(form.table)[codes] if form.table else np.maximum(codes, form.center)
    largest = np.abs(np.repeat(scales, form.block, 1)[:, :k]) * sizes
    if minima is not None:
        largest = largest + np.abs(np.repeat(minima, form.block, 1)[:, :k])
    return (np.abs(x) @ largest.T + 1e-30) * 2e-7 * math.sqrt(k)


def check_linear(machine, form, rng, shapes):
    for m, n, k in shapes:
        packed = weights(rng, form, n, k)
        x = rng.standard_normal((m, k)).astype(np.float32)
        for kind in ("int8", "fp32"):
            expected = reference.linear(form, packed, n, x, activations=kind)
            for tile in tiles(machine, form, kind):
                y = product(machine, form, packed, n, x, kind, tile)
                error = np.abs(y - expected) / bound(form, packed, n, x)
                assert error.max() <= 1, (form.name, kind, tile, m, n, k)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_linear(machine, form, rng):
    shapes = [
        (1, 16, 32),
        (1, 1, 1),
        (3, 17, 33),
        (8, 50, 100),
        (11, 32, 576),
        (2, 5, 31),
        (5, 150, 16),
    ]
    check_linear(machine, form, rng, shapes)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_linear_at_the_extremes_of_codes_and_activations(machine, form):
    n, k = 16, 64
    blocks = k // form.block
    for code in {0, form.center, (1 << form.bits) - 1}:
        for sign in (-1, 1):
            codes = np.full((n, k), code, np.uint8)
            ones = np.ones((n, blocks), np.float32)
            packed = layout.pack(form, codes, ones, -ones if form.minimum else None)
            x = np.full((1, k), 127 * sign, np.float32)
            for kind in ("int8", "fp32"):
                expected = reference.linear(form, packed, n, x, activations=kind)
                for tile in tiles(machine, form, kind):
                    y = product(machine, form, packed, n, x, kind, tile)
                    assert np.array_equal(y, expected.astype(np.float32))


def test_activations_that_are_zero_tiny_or_huge(machine, rng):
    form = layout.FORMS["q4_min"]
    packed = weights(rng, form, 32, 96)
    x = np.zeros((4, 96), np.float32)
    x[1] = 1e-42 * rng.standard_normal(96)  # denormal: the block counts as zero
    x[2] = 1e30 * rng.standard_normal(96)
    x[3, 40] = 1e-20
    for tile in tiles(machine, form, "int8"):
        y = product(machine, form, packed, 32, x, "int8", tile)
        expected = reference.linear(form, packed, 32, x)
        assert not y[:2].any()
        assert np.allclose(y, expected, rtol=1e-4)


def test_not_a_number_is_not_hidden(machine, rng):
    form = layout.FORMS["q8"]
    packed = weights(rng, form, 16, 64)
    for bad in (np.nan, np.inf):
        x = rng.standard_normal((1, 64)).astype(np.float32)
        x[0, 50] = bad
        assert not np.isfinite(product(machine, form, packed, 16, x, "int8", 1)).any()


@pytest.mark.parametrize("name", ["q4_min", "q5", "q5_min", "q6_g16", "q8"])
def test_tiles_and_parts_give_the_same_bits(machine, name, rng):
    form = layout.FORMS[name]
    packed = weights(rng, form, 80, 160)
    x = rng.standard_normal((9, 160)).astype(np.float32)
    first = product(machine, form, packed, 80, x, "int8", 1)
    for tile in tiles(machine, form, "int8"):
        assert np.array_equal(product(machine, form, packed, 80, x, "int8", tile), first)


def check_quantize(machine, rng):
    for k, block in itertools.product((1, 31, 32, 33, 64, 100, 577), layout.BLOCKS):
        x = (rng.standard_normal((3, k)) * 10.0 ** rng.integers(-8, 8, (3, 1))).astype(np.float32)
        codes, scales = reference.quantize(x, block)
        padded = np.zeros((3, scales.shape[1] * block), np.int8)
        padded[:, :k] = codes
        sums = padded.reshape(3, -1, block).sum(-1, dtype=np.int32)
        for center in (0, 8, 16, 32, 128):
            rows = activations(machine, "quantize", x, 1, center, block)[:, :, 0]
            assert np.array_equal(rows[:, :, :block].copy().view(np.int8).reshape(3, -1), padded)
            found = rows[:, :, block : block + 4].copy().view(np.float32)[..., 0]
            assert np.array_equal(found, scales)
            last = rows[:, :, block + 4 :].copy()
            if center:
                assert np.array_equal(last.view(np.int32)[..., 0], -center * sums)
            else:
                assert np.allclose(last.view(np.float32)[..., 0], scales * sums, rtol=1e-6)


def test_quantize_gives_the_codes_and_scales_of_its_twin(machine, rng):
    check_quantize(machine, rng)


def check_rows(machine, rng):
    for n in (1, 15, 16, 33, 576):
        x, gain = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
        y = np.zeros(n, np.float32)
        machine.call("rms_norm", x, gain, y, n, 1e-5)
        assert np.allclose(y, reference.rms_norm(x[None], gain, 1e-5)[0], rtol=1e-5, atol=1e-9)
        shift = rng.standard_normal(n).astype(np.float32)
        machine.call("layer_norm", x + 3, gain, shift, y, n, 1e-5)
        expected = reference.layer_norm((x + 3)[None], gain, shift, 1e-5)[0]
        assert np.allclose(y, expected, rtol=1e-4, atol=1e-5)
        machine.call("add", x, y := gain.copy(), n)
        assert np.array_equal(y, gain + x)
        pairs, angles = rng.standard_normal(2 * n).astype(np.float32), rng.random(n)
        cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        machine.call("rotate", pairs, y := np.zeros(2 * n, np.float32), cosines, sines, n, 0.5)
        assert np.allclose(y, reference.rotate(pairs, cosines, sines) / 2, atol=1e-6)
    numbers = np.concatenate([np.linspace(-20, 20, 999), [0.0, -0.0, 1e-38, 1e4, -1e4]])
    activations = ("gelu", "gelu_tanh", "relu")
    for name, twin in ((name, getattr(reference, name)) for name in activations):
        machine.call(name, y := numbers.astype(np.float32), len(numbers))
        expected = twin(numbers.astype(np.float32))
        assert (np.abs(y - expected) <= 3e-7 * np.abs(numbers) + 1e-37).all()
    gate = np.concatenate([np.linspace(-120, 120, 1000), [0.0, -0.0, 1e-38, -1e30, 1e30, 88.8]])
    gate = np.resize(gate, 1008).astype(np.float32)
    up = rng.standard_normal(1008).astype(np.float32)
    both = layout.interleave_gate_up(gate[:, None], up[:, None])[:, 0]
    y = np.zeros(1008, np.float32)
    machine.call("silu_multiply", both, y, 1008)
    expected = reference.silu_multiply(both[None])[0]
    # exp(-gate) stops growing at exp(87) = 6e37; 3e-45 is two steps between denormals.
    allowed = 2e-6 * np.abs(expected) + 2e-38 * np.abs(gate.astype(np.float64) * up) + 3e-45
    assert (np.abs(y - expected) <= allowed).all()
    both[np.abs(both) > 1e4] = 1e4
    machine.call("gelu_tanh_multiply", both, y, 1008)
    expected = reference.gelu_tanh_multiply(both[None])[0]
    assert (np.abs(y - expected) <= 1e-6 * np.abs(expected) + 1e-5 * (np.abs(expected) < 1)).all()


def test_rows(machine, rng):
    check_rows(machine, rng)


def attention_tiles(machine):
    return [(q, c) for q, c in ((4, 1), (4, 4), (8, 2)) if machine.has(f"attend_fp32_{q}_{c}")]


def held(machine, cache, rows, *, keys):
    """A cache of one head from its rows, made by the kernels that narrow them."""
    room, width = rows.shape
    narrow = np.zeros((room, cache.columns(width)), cache.dtype)
    for row, out in zip(rows, narrow, strict=True):
        if cache.name == "fp32":
            out[:] = row
        else:
            machine.call(f"narrow_{cache.name}", row.copy(), target := out.copy(), width)
            out[:] = target
    blocks = narrow[:, :width].reshape(-1, 16, width)
    blocks = (blocks.swapaxes(1, 2) if keys else blocks).reshape(len(blocks), -1)
    scales = narrow[:, width:].reshape(len(blocks), -1)
    return np.ascontiguousarray(np.concatenate([blocks, scales], 1)).reshape(1, 1, room, -1)


def check_attend(machine, rng):
    shapes = ((16, 1, 0, 1, 0), (64, 3, 130, 3, 0), (32, 2, 3, 80, 7), (64, 7, 60, 5, 50))
    for cache in cache_layout.CACHES.values():
        for width, group, past, new, window in shapes:
            total = past + new
            room = -(-total // 16) * 16
            q = rng.standard_normal((new * group, width)).astype(np.float32) / math.sqrt(width)
            keys, values = (rng.standard_normal((room, width)).astype(np.float32) for _ in range(2))
            keys, values = (
                held(machine, cache, keys, keys=True),
                held(machine, cache, values, keys=False),
            )
            plain = [
                cache_layout.read(cache, given, keys=order)[0, 0]
                for given, order in ((keys, True), (values, False))
            ]
            results = []
            for queries, columns in attention_tiles(machine):
                if width % (16 * columns):
                    continue
                kernel = f"attend_{cache.name}_{queries}_{columns}"
                y = np.zeros_like(q)
                for row in range(0, len(q), queries):
                    state = None
                    rows = np.zeros((queries, width), np.float32)
                    rows[: len(q) - row] = q[row : row + queries]
                    token = min((row + queries - 1) // group, new - 1)
                    begin = max(0, past + row // group + 1 - window) if window else 0
                    for chunk in range(begin // 64 * 64, past + token + 1, 64):
                        more = np.full(queries * (width + 2), np.nan, np.float32)
                        machine.call(
                            kernel, np.ascontiguousarray(rows.T), keys, values,
                            np.zeros((64, queries), np.float32), more,
                            width, row, group, past, new, window, chunk,
                        )  # fmt: skip
                        if state is None:
                            state = more
                        else:
                            machine.call("merge", state, more, width, queries)
                    for t in range(min(queries, len(q) - row)):
                        out = np.zeros(width, np.float32)
                        machine.call("finish", state, out, width, queries, t)
                        y[row + t] = out
                for i in range(len(q)):
                    end = past + i // group + 1
                    seen = slice(max(0, end - window) if window else 0, end)
                    shares = np.exp(plain[0][seen] @ q[i])
                    assert np.allclose(y[i], shares / shares.sum() @ plain[1][seen], atol=1e-5)
                results.append(y)
            assert all(np.array_equal(y, results[0]) for y in results)


def check_narrow(machine, rng):
    numbers = [0.0, -0.0, 1.0, 65504.0, 65519.0, 65520.0, -1e6, 6e-8, 2.9e-8, 6.1e-5, 1 / 3, 1e-30]
    x = np.concatenate([numbers, rng.standard_normal(500) * 10.0 ** rng.integers(-9, 5, 500)])
    x = x.astype(np.float32)
    machine.call("narrow_fp16", x, y := np.zeros(512, np.float16), 512)
    with np.errstate(over="ignore"):
        assert np.array_equal(y.view(np.uint16), x.astype(np.float16).view(np.uint16))
    for scale in (1.0, 1e-38, 0.0, 1e30):
        x = (rng.standard_normal(64) * scale).astype(np.float32)
        machine.call("narrow_int8", x, y := np.zeros(68, np.int8), 64)
        codes, scales = reference.quantize_rows(x[None])
        assert np.array_equal(y[:64], codes[0])
        assert y[64:].copy().view(np.float32) == scales[0]


def test_narrow(machine, rng):
    check_narrow(machine, rng)


def test_attend(machine, rng):
    check_attend(machine, rng)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["neon", "portable"])
def test_aarch64_under_an_emulator(variant, tmp_path_factory, rng):
    with Emulated(variant, tmp_path_factory.getbasetemp()) as machine:
        check_quantize(machine, rng)
        check_rows(machine, rng)
        check_attend(machine, rng)
        check_narrow(machine, rng)
        for form in FORMS:
            check_linear(machine, form, rng, [(1, 16, 32), (3, 17, 33), (9, 40, 100)])


def test_forms_pack_and_unpack_without_loss(rng):
    for form in FORMS:
        for n, k in ((1, 1), (16, 32), (17, 33), (40, 96), (3, 520)):
            codes = rng.integers(0, 1 << form.bits, (n, k), dtype=np.uint8)
            scales = numbers(rng, form, n, k)
            minima = numbers(rng, form, n, k) if form.minimum else None
            packed = layout.pack(form, codes, scales, minima)
            assert packed.nbytes == form.packed_bytes(n, k)
            back = layout.unpack(form, packed, n, k)
            assert np.array_equal(back[0], codes)
            assert np.array_equal(back[1], scales)
            if form.split and form.minimum:  # they may have been rounded in a sum with the scales
                slack = 2.0**-23 * (np.abs(minima) + 16 * np.abs(scales))
                assert (np.abs(back[2] - minima) <= slack).all()
            else:
                assert back[2] is None if minima is None else np.array_equal(back[2], minima)


def test_what_is_no_byte_times_a_unit_is_not_split(rng):
    scales = (rng.integers(1, 64, (4, 8)) * np.float32(0.001)).astype(np.float32)
    halves = np.float32(np.float16(0.001)) * np.ones((4, 8), np.float32)
    codes = np.zeros((4, 256), np.uint8)
    form = layout.FORMS["q4_min_split"]
    for wrong in (scales + np.float32(1e-6), halves * [1, 2, 3, 4, 5, 6, 7, 200.3]):
        assert layout.form_for(4, wrong.astype(np.float32), halves / 3).name == "q4_min_wide"
        with pytest.raises(ValueError, match="needs bytes times an fp16"):
            layout.pack(form, codes, wrong.astype(np.float32), halves)


def test_a_larger_group_repeats_its_scale(rng):
    form = layout.FORMS["q4"]
    codes = rng.integers(0, 16, (16, 320), dtype=np.uint8)
    scales = rng.random((16, 3)).astype(np.float16).astype(np.float32)
    _, found, _ = layout.unpack(form, layout.pack(form, codes, scales), 16, 320)
    assert np.array_equal(found, np.repeat(scales, 4, 1)[:, :10])


def test_the_smallest_form_without_loss_is_chosen():
    half, not_half = np.float32([[0.5]]), np.float32([[1 / 3]])
    assert layout.form_for(4, half).name == "q4"
    assert layout.form_for(4, not_half).name == "q4_wide"
    thirds = np.float32([[1 / 3, 1 / 3 + 1e-3]])
    assert layout.form_for(4, thirds, thirds).name == "q4_min_wide"
    split = np.float32(np.float16(1 / 3)) * np.float32([[1, 63]])
    assert layout.form_for(4, split, split).name == "q4_min_split"
    assert layout.form_for(4, split).name == "q4_wide"
    assert layout.form_for(6, -split, block=16).name == "q6_g16_split"
    assert layout.form_for(8, half).name == "q8"
    assert layout.form_for(8, half, block=16).name == "q8_g16"
    assert layout.form_for(8, half, half).name == "q8_min"
    assert layout.form_for(5, half, half).name == "q5_min"
    assert layout.form_for(6, half, block=16).name == "q6_g16"
    with pytest.raises(ValueError, match="no layout holds 8 bits with minima for 16 weights"):
        layout.form_for(8, half, half, block=16)
    with pytest.raises(ValueError, match="no layout holds 6 bits without minima for 32 weights"):
        layout.form_for(6, half)
    with pytest.raises(ValueError, match="do not fit 16 rows"):
        layout.pack(layout.FORMS["q4"], np.zeros((16, 96), np.uint8), np.ones((16, 5), np.float32))
