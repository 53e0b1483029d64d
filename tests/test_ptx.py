"""The compiled GPU kernels, run as PTX without a card; first, that what runs them can tell."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import draws
import fake_card
import numpy as np
import ptx
import pytest
from cuda_cases import CASES
from leangen_kernels.cuda import driver
from ptx_card import Card, Fault

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def kernel(body, parameters=("u64",), shared=0, most=64):
    """A kernel `k` of this body; parameters are p0, p1 ..."""
    listed = ", ".join(f".param .{kind} p{at}" for at, kind in enumerate(parameters))
    head = f".visible .shared .align 16 .b8 s[{shared}];\n" if shared else ""
    text = f"""{head}.visible .entry leangen_k({listed})
    .maxntid {most}, 1, 1
    {{
        .reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<16>; .reg .f32 %f<16>; .reg .b64 %d<16>;
        mov.u32 %r0, %tid.x;
        ld.param.u64 %d0, [p0];
        mul.wide.u32 %d1, %r0, 4;
        add.s64 %d1, %d0, %d1; // this thread's word
        {body}
        ret;
    }}"""
    return ptx.read(text)


def card(body, **more):
    """A card with one kernel, `k`."""
    return Card(kernel(body, **more))


def words(body, threads=32, **more):
    """What each thread leaves in %r1."""
    one = card(body + " st.global.u32 [%d1], %r1;", **more)
    y = one.empty(threads, np.uint32)
    one.launch("k", (1, 1, 1), threads, y.address)
    return y.get()


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("mov.u32 %r2, 33; shl.b32 %r1, %r2, %r2;", 0),
        ("mov.u32 %r2, 0x80000000; shr.s32 %r1, %r2, 40;", 0xFFFFFFFF),
        ("mov.u32 %r2, 0x80000000; shr.u32 %r1, %r2, 31;", 1),
        ("mov.s32 %r2, -7; div.s32 %r1, %r2, 2;", -3 & 0xFFFFFFFF),
        ("mov.s32 %r2, -7; rem.s32 %r1, %r2, 2;", 0xFFFFFFFF),
        ("mov.u32 %r2, 0xffffffff; mul.wide.s32 %d2, %r2, 3; cvt.u32.u64 %r1, %d2;",
         -3 & 0xFFFFFFFF),
        ("mov.u64 %d2, 0x100000001; mul.lo.s64 %d2, %d2, 5; shr.u64 %d2, %d2, 32;"
         " cvt.u32.u64 %r1, %d2;", 5),
        ("mov.f32 %f1, 0f40200000; cvt.rni.s32.f32 %r1, %f1;", 2),  # 2.5, to even
        ("mov.f32 %f1, 0f7f800000; cvt.rni.s32.f32 %r1, %f1;", 0x7FFFFFFF),
        ("mov.u32 %r2, 0x80; bfe.s32 %r1, %r2, 0, 8;", 0xFFFFFF80),
        ("mov.u32 %r2, 0x1f; mov.u32 %r3, 0xffff0000; bfi.b32 %r1, %r2, %r3, 12, 8;", 0xFFF1F000),
        ("mov.u32 %r2, 0xabcd00; bfe.u32 %r1, %r2, 8, 8;", 0xCD),
        ("mov.b32 %r2, 0x33221100; mov.b32 %r3, 0x77665544; prmt.b32 %r1, %r2, %r3, 0x7250;",
         0x77225500),
        ("mov.b32 %r2, 0xf0; mov.b32 %r3, 0xcc; mov.b32 %r4, 0xaa;"
         " lop3.b32 %r1, %r2, %r3, %r4, 0xea;", 0xEA),
        ("mov.b32 %r2, 0x3c004000; mov.b32 %r3, 0x3c003c00; sub.f16x2 %r1, %r2, %r3;", 0x3C00),
        ("mov.b32 {%h0, %h1}, 0x12345678; mov.b32 %r1, {%h1, %h0};", 0x56781234),
        ("mov.f32 %f1, 0f7fc00000; setp.ltu.f32 %p0, %f1, %f1; selp.u32 %r1, 1, 0, %p0;", 1),
        ("mov.f32 %f1, 0f7fc00000; setp.lt.f32 %p0, %f1, %f1; selp.u32 %r1, 1, 0, %p0;", 0),
        ("mov.f32 %f1, 0f7fc00000; mov.f32 %f2, 0f3f800000; max.f32 %f1, %f1, %f2;"
         " mov.b32 %r1, %f1;", 0x3F800000),
        ("mov.f32 %f1, 0f80000000; mov.f32 %f2, 0f3f800000; copysign.f32 %f1, %f1, %f2;"
         " mov.b32 %r1, %f1;", 0xBF800000),
        ("{ .reg .b32 t; mov.b32 t, 4; { .reg .b32 t; mov.b32 t, 5; } mov.b32 %r1, t; }", 4),
    ],
)  # fmt: skip
def test_instructions_do_what_the_manual_says(body, wanted):
    assert (words(body) == wanted).all()


def test_threads_part_and_meet_again():
    body = """
        mov.u32 %r1, 0;
        and.b32 %r2, %r0, 3;
    $again:
        setp.ge.u32 %p0, %r1, %r2;
        @%p0 bra $out;
        add.u32 %r1, %r1, 1;
        bra.uni $again;
    $out:
        setp.lt.u32 %p1, %r0, 8;
        @!%p1 add.u32 %r1, %r1, 100;
        shfl.sync.bfly.b32 %r3, %r1, 16, 0x1f, 0xffffffff;
        mov.u32 %r1, %r3;
    """
    lanes = np.arange(32)
    np.testing.assert_array_equal(words(body), (lanes % 4 + 100 * (lanes >= 8))[lanes ^ 16])


def test_lanes_meet_across_warps_that_come_at_different_times():
    """Lanes above 40 come late to the shuffle: the first warp has gone on, the second waits."""
    body = """
        mov.u32 %r2, 0;
        setp.lt.u32 %p0, %r0, 40;
        @!%p0 bra $late;
    $meet:
        add.u32 %r2, %r2, %r0;
        shfl.sync.bfly.b32 %r1, %r2, 31, 0x1f, 0xffffffff;
        bra $out;
    $late:
        mov.u32 %r2, 1000;
        bra $meet;
    $out:
    """
    threads = np.arange(64)
    wanted = (threads + 1000 * (threads >= 40))[threads ^ 31]
    np.testing.assert_array_equal(words(body, 64), wanted)


SHARED = "mov.u64 %d2, s; mul.wide.u32 %d3, %r0, 4; add.s64 %d2, %d2, %d3; "
OTHERS = "xor.b32 %r4, %r0, 63; mul.wide.u32 %d4, %r4, 4; mov.u64 %d5, s; add.s64 %d5, %d5, %d4; "


def test_a_barrier_orders_what_lies_on_its_sides():
    body = SHARED + OTHERS + "st.shared.u32 [%d2], %r0; bar.sync 0; ld.shared.u32 %r1, [%d5];"
    np.testing.assert_array_equal(words(body, 64, shared=256), np.arange(64)[::-1])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (SHARED + OTHERS + "st.shared.u32 [%d2], %r0; ld.shared.u32 %r1, [%d5];",
         "what nothing has written|what another thread writes, no barrier between"),
        (SHARED + OTHERS + "st.shared.u32 [%d2], %r0; bar.sync 0; ld.shared.u32 %r1, [%d5];"
         " st.shared.u32 [%d2], %r1;", "writes what another thread reads, no barrier between"),
        (SHARED + "st.shared.u32 [s], %r0;", "two threads write one place"),
        (SHARED + "ld.shared.u32 %r1, [%d2];", "reads what nothing has written"),
        (SHARED + "st.shared.u32 [%d2+4], %r0;", "past the end of shared memory"),
        ("ld.global.u32 %r1, [%d1];", "reads what nothing has written"),
        ("st.global.u32 [%d1+4], %r0;", "4 bytes past an array's end"),
        ("st.global.u32 [%d1+-4], %r0;", "below all memory|an array.s end"),
        ("st.global.u32 [%d1+2], %r0;", "no multiple of 4"),
        ("st.global.u32 [%d0], %r0;", "two threads write one place"),
        ("st.global.u32 [%d1], %r0; ld.global.nc.u32 %r1, [%d1];", "reads as constant what"),
        ("setp.eq.u32 %p0, %r0, 5; @%p0 bra $out;"
         " shfl.sync.bfly.b32 %r1, %r0, 1, 0x1f, 0xffffffff; $out:", "31 threads wait for others"),
        ("setp.lt.u32 %p0, %r0, 32; @%p0 bra $out; bar.sync 0; $out: bar.sync 0;",
         "64 threads wait for others"),
        ("setp.lt.u32 %p0, %r0, 5; @%p0 bra $out; bar.sync 0; $out:", None),
    ],
)  # fmt: skip
def test_a_fault_is_named(body, says):
    one = card(body, shared=256)
    arguments = ("k", (1, 1, 1), 64, one.empty(64, np.uint32).address)
    if says is None:  # who has returned is not waited for
        one.launch(*arguments)
        return
    with pytest.raises(Fault, match=says):
        one.launch(*arguments)


def test_blocks_have_no_order():
    body = """mov.u32 %r5, %ctaid.x; setp.eq.u32 %p0, %r5, 1; @%p0 bra $b;
        st.global.u32 [%d1], %r0; bra $out; $b: ld.global.u32 %r1, [%d1]; $out:"""
    one = card(body)
    y = one.array(np.zeros(32, np.uint32))
    with pytest.raises(Fault, match="reads what another thread writes"):
        one.launch("k", (2, 1, 1), 32, y.address)
    one.launch("k", (1, 1, 1), 32, y.address)  # what was before a launch is over
    one.launch("k", (1, 1, 1), 32, y.address)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("ld.global.u32 %r1, [%d1]; griddepcontrol.wait;", "may not have written yet"),
        ("st.global.u32 [%d1], %r0; griddepcontrol.wait;", "writes before the launches ahead"),
        ("setp.eq.u32 %p0, %r0, 5; @%p0 bra $out; griddepcontrol.wait; $out:", "awaited nothing"),
        ("griddepcontrol.launch_dependents; griddepcontrol.wait; ld.global.u32 %r1, [%d1];", None),
    ],
)
def test_launches_that_overlap_are_awaited(body, says):
    first = kernel("st.global.u32 [%d1], %r0;")
    one = Card({**first, "leangen_next": kernel(body)["leangen_k"]})
    y = one.empty(32, np.uint32)
    one.launch("k", (1, 1, 1), 32, y.address)
    if says is None:
        one.launch("next", (1, 1, 1), 32, y.address)
        return
    with pytest.raises(Fault, match=says):
        one.launch("next", (1, 1, 1), 32, y.address)


@pytest.mark.parametrize(
    ("threads", "arguments", "says"),
    [(96, 1, "96 threads .* 64 and"), (32, 2, "2 arguments for 1")],
)
def test_a_launch_that_no_card_takes_is_refused(threads, arguments, says):
    with pytest.raises(Fault, match=says):
        card("").launch("k", (1, 1, 1), threads, *[0] * arguments)


def test_what_is_not_known_is_not_guessed():
    for body in (
        "popc.b32 %r1, %r0;", "mul.hi.u32 %r1, %r0, %r0;", "atom.global.add.u32 %r1;",
        "add.rz.f32 %f1, %f1, %f1;", "cvt.rzi.s32.f32 %r1, %f1;", "@%p1 bar.sync 0;",
    ):  # fmt: skip
        with pytest.raises(ptx.Unknown):
            words(body)


@pytest.mark.parametrize("stride", [1, 2, 3, 32])
def test_banks_and_sectors_are_counted(stride):
    one = card(f"""
        mul.lo.u32 %r2, %r0, {4 * stride}; cvt.u64.u32 %d2, %r2;
        mov.u64 %d3, s; add.s64 %d3, %d3, %d2; st.shared.u32 [%d3], %r0;
        add.s64 %d4, %d0, %d2; st.global.u32 [%d4], %r0;
    """, shared=4096)  # fmt: skip
    one.launch("k", (1, 1, 1), 32, one.empty(1024, np.uint32).address)
    counts = one.counts["k"]
    assert counts.shared_accesses == 1
    assert counts.shared_passes == np.gcd(stride, 32)
    assert (counts.sectors, counts.sectors_needed) == (min(4 * stride, 32), 4)


@pytest.mark.parametrize(
    ("shape", "kinds", "made"),
    [
        ("m16n8k16", (np.float16, np.float16), "f32.f16.f16.f32"),
        ("m16n8k32", (np.uint8, np.int8), "s32.u8.s8.s32"),
    ],
)
def test_the_tensor_core_multiplies(shape, kinds, made):
    """Each lane's registers are filled as the manual's formulas for element i say."""
    rng = draws.rng()
    depth = int(shape.partition("k")[2])
    a, b = (
        rng.integers(0, 100, size).astype(kind)
        for size, kind in zip(((16, depth), (depth, 8)), kinds, strict=True)
    )
    c = rng.integers(-9, 9, (16, 8)).astype(np.float32 if "f32" in made else np.int32)
    registers = np.empty((32, 10), np.uint32)
    each = 32 // (16 if depth == 16 else 8)
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        of_a, of_b = np.empty(4 * each, kinds[0]), np.empty(2 * each, kinds[1])
        for i in range(4 * each):
            row = group if i < each or 2 * each <= i < 3 * each else group + 8
            of_a[i] = a[row, thread * each + i % each + (depth // 2 if i >= 2 * each else 0)]
        for i in range(2 * each):
            of_b[i] = b[thread * each + i % each + (depth // 2 if i >= each else 0), group]
        of_c = [c[group + (0 if i < 2 else 8), 2 * thread + i % 2] for i in range(4)]
        registers[lane] = np.concatenate(
            [of_a.view(np.uint32), of_b.view(np.uint32), np.array(of_c).view(np.uint32)]
        )
    body = (
        "ld.param.u64 %d2, [p1]; mul.wide.u32 %d3, %r0, 40; add.s64 %d2, %d2, %d3;"
        + "".join(f"ld.global.u32 %r{at + 1}, [%d2+{4 * at}];" for at in range(10))
        + f"mma.sync.aligned.{shape}.row.col.{made} {{%r7, %r8, %r9, %r10}}, {{%r1, %r2, %r3, %r4}}"
        ", {%r5, %r6}, {%r7, %r8, %r9, %r10};"
        + "mul.wide.u32 %d4, %r0, 16; add.s64 %d4, %d0, %d4;"
        + "st.global.v4.u32 [%d4], {%r7, %r8, %r9, %r10};"
    )
    one = card(body, parameters=("u64", "u64"))
    y = one.empty(128, c.dtype)
    one.launch("k", (1, 1, 1), 32, y.address, one.array(registers).address)
    found = np.empty((16, 8), c.dtype)
    for at, value in enumerate(y.get()):
        (group, thread), i = divmod(at // 4, 4), at % 4
        found[group + (0 if i < 2 else 8), 2 * thread + i % 2] = value
    np.testing.assert_array_equal(found, a.astype(np.float64) @ b + c)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the kernels, compiled: minutes where none is cached."""
    pytest.importorskip("numba")
    from leangen_kernels.cuda import build

    if reason := build.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("card")
    build.build(folder / "cuda", ROOT / "build" / "kernels", machine_code=False)
    return folder


@pytest.fixture(scope="module")
def kernels(built):
    """For 9.0 and newer: what 8.0 has, and launches that overlap."""
    return ptx.read((built / "cuda" / driver.PTX.format(90)).read_text())


@pytest.fixture(scope="module")
def counted():
    """What the kernels that have run have done, by name."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_was_compiled_is_its_twin(kernels, counted, case):
    one = Card(kernels)
    assert CASES[case](one, draws.rng()) is None
    for name, counts in one.counts.items():
        counted[name] = counts
        assert counts.shared_passes == counts.shared_accesses, f"{name}: banks"
        if not name.startswith("rows"):  # whose rows begin anywhere
            assert counts.sectors_needed >= 0.5 * counts.sectors, f"{name}: sectors"


@pytest.mark.slow
def test_every_compiled_kernel_ran(kernels, counted):
    assert {name.removeprefix("leangen_") for name in kernels} == set(counted)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["linear q4 a16", "linear nf4", "attention fp16", "group norm"])
def test_a_kernel_without_its_barriers_is_found_out(kernels, case):
    def without(kernel):
        code = [
            dataclasses.replace(one, parts=("mov", "b32"), operands=("%r0", "%r0"))
            if one.parts[0] == "bar" else one for one in kernel.code
        ]  # fmt: skip
        return dataclasses.replace(kernel, code=code)

    one = Card({name: without(kernel) for name, kernel in kernels.items()})
    with pytest.raises(Fault, match="what nothing has written|no barrier between"):
        CASES[case](one, draws.rng())


@pytest.mark.slow
def test_a_whole_model_runs_on_them(built):
    """What `pytest -m gpu` asks of a card, but for its counter of energy."""
    fake_card.driver(built)
    fake_card.operators(built)
    environment = {
        **os.environ, "LD_LIBRARY_PATH": str(built), "PTX_STAND_IN": str(built),
        "FAKE_CUDA_NAMES": str(built / "cuda" / driver.NAMES),
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "ptx_stand_in", "-m", "gpu", "-k", "not counter",
         TESTS / "test_on_card.py"],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
