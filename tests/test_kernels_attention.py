"""The operator `Attention` against its twin and against ONNX Runtime's GroupQueryAttention."""

import draws
import leangen_kernels
import numpy as np
import onnxruntime as ort
import pytest
from leangen_kernels import cache_layout, reference
from onnx import TensorProto, helper

pytestmark = pytest.mark.skipif(
    leangen_kernels.library() is None, reason="no kernels: " + leangen_kernels.status()[1]
)
CAPACITY = 192
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "int8": TensorProto.INT8}


GAINS = ("query_gain", "key_gain")


def session(own, heads, kv_heads, threads=2, *, norm=False, rotated=True, **attributes):
    info, floats = helper.make_tensor_value_info, TensorProto.FLOAT
    cache = ["batch", kv_heads, "capacity", "columns"]
    kind = TYPES.get(attributes.get("cache", "fp32"), TensorProto.FLOAT)
    shared = ["past_key", "past_value", "seqlens_k"]
    rotation = ["cos", "sin"] if rotated else []
    if own:
        node = helper.make_node(
            "Attention", ["qkv", *shared, *(rotation or ["", ""]), *GAINS[: 2 * norm]],
            ["y", "key", "value"],
            domain="leangen", heads=heads, kv_heads=kv_heads, **attributes,
        )  # fmt: skip
    else:
        window = {"local_window_size": attributes["window"]} if "window" in attributes else {}
        node = helper.make_node(
            "GroupQueryAttention", ["qkv", "", "", *shared, "total", "cos", "sin"],
            ["y", "key", "value"], domain="com.microsoft",
            num_heads=heads, kv_num_heads=kv_heads, do_rotary=1, **window,
        )  # fmt: skip
    inputs = [
        info("qkv", floats, ["batch", "new", None]),
        info("past_key", kind, cache),
        info("past_value", kind, cache),
        info("seqlens_k", TensorProto.INT32, ["batch"]),
        *(info(name, floats, [None, None]) for name in rotation),
        *(info(name, floats, [None]) for name in GAINS[: 2 * norm]),
    ]
    if not own:
        inputs.append(info("total", TensorProto.INT32, []))
    outputs = [info("y", floats, None), info("key", kind, None), info("value", kind, None)]
    graph = helper.make_graph([node], "one", inputs, outputs)
    domains = [("", 21), ("com.microsoft", 1), ("leangen", 1)]
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid(*domain) for domain in domains], ir_version=10
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(leangen_kernels.library()))
    return ort.InferenceSession(proto.SerializeToString(), options)


def inputs(rng, batch, new, heads, kv_heads, width, lengths, cache="fp32"):
    angles = np.outer(np.arange(CAPACITY), 1e4 ** (-np.arange(width // 2) / (width // 2)))
    held = cache_layout.CACHES[cache]
    shape = (batch, kv_heads, CAPACITY, held.columns(width))
    return {
        "qkv": rng.standard_normal((batch, new, (heads + 2 * kv_heads) * width)).astype("f4"),
        "past_key": np.zeros(shape, held.dtype),
        "past_value": np.zeros(shape, held.dtype),
        "seqlens_k": np.array(lengths, np.int32) - 1,
        "cos": np.cos(angles).astype("f4"),
        "sin": np.sin(angles).astype("f4"),
    }


def plain_order(keys, cache="fp32"):
    """Keys by position from keys by blocks of 16 positions."""
    return cache_layout.read(cache_layout.CACHES[cache], keys, keys=True)


@pytest.fixture
def rng():
    return draws.rng()


@pytest.mark.parametrize("cache", cache_layout.CACHES)
@pytest.mark.parametrize("window", [0, 5, 70])
@pytest.mark.parametrize("shape", [(1, 1, 16), (9, 3, 64), (4, 4, 32), (8, 1, 80)])
def test_prompt_then_tokens(shape, window, cache, rng):
    heads, kv_heads, width = shape
    run = session(True, heads, kv_heads, window=window, cache=cache)
    held = cache_layout.CACHES[cache]
    # A number that is rounded from another side of a tie moves the result by a step of the cache.
    places = {"fp32": 2e-5, "fp16": 2e-3, "int8": 3e-2}[cache]
    for batch, prompt in ((1, 1), (1, 23), (2, 17), (1, 130)):
        feeds = inputs(rng, batch, prompt, heads, kv_heads, width, [prompt] * batch, cache)
        plain = (batch, kv_heads, CAPACITY, width)
        keys, values = np.zeros(plain), np.zeros(plain)
        for step in range(3):
            new = prompt if step == 0 else 1
            lengths = np.full(batch, prompt + step)
            columns = (heads + 2 * kv_heads) * width
            feeds["qkv"] = rng.standard_normal((batch, new, columns)).astype("f4")
            feeds["seqlens_k"] = (lengths - 1).astype(np.int32)
            y, feeds["past_key"], feeds["past_value"] = run.run(None, feeds)
            expected, keys, values = reference.attention(
                feeds["qkv"], keys, values, lengths, feeds["cos"], feeds["sin"],
                heads=heads, window=window, cache=held,
            )  # fmt: skip
            assert np.abs(y - expected).max() < places
            used = slice(0, prompt + step)
            found = plain_order(feeds["past_key"], cache)[:, :, used]
            assert np.allclose(found, keys[:, :, used], atol=places)
            found = cache_layout.read(held, feeds["past_value"], keys=False)[:, :, used]
            assert np.array_equal(found, values[:, :, used])


@pytest.mark.parametrize("cache", cache_layout.CACHES)
def test_a_row_has_the_same_bits_alone_and_among_others(cache, rng):
    """What speculative decoding asks of attention: one token at a time, or all at once."""
    for window in (0, 40):
        run = session(True, 9, 3, window=window, cache=cache)
        feeds = inputs(rng, 1, 150, 9, 3, 64, [150], cache)
        at_once = run.run(None, feeds)[0]
        _, key, value = run.run(
            None, {**feeds, "qkv": feeds["qkv"][:, :140], "seqlens_k": np.array([139], np.int32)}
        )
        for token in range(140, 150):
            y, key, value = run.run(
                None,
                {
                    **feeds, "qkv": feeds["qkv"][:, token : token + 1], "past_key": key,
                    "past_value": value, "seqlens_k": np.array([token], np.int32),
                },
            )  # fmt: skip
            assert np.array_equal(y[:, 0], at_once[:, token])


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("normed", ["", "heads", "all"])
def test_norms_of_queries_and_keys_and_positions_that_do_not_turn(normed, rotated, rng):
    heads, kv_heads, width = 6, 2, 48
    run = session(True, heads, kv_heads, norm=bool(normed), rotated=rotated, epsilon=1e-3)
    feeds = inputs(rng, 2, 21, heads, kv_heads, width, [21, 30])
    feeds["past_value"] = rng.standard_normal(feeds["past_value"].shape).astype("f4")
    feeds["past_key"] = rng.standard_normal(feeds["past_key"].shape).astype("f4")
    if not rotated:
        del feeds["cos"], feeds["sin"]
    if normed:
        sizes = (width, width) if normed == "heads" else (heads * width, kv_heads * width)
        for name, size in zip(GAINS, sizes, strict=True):
            feeds[name] = rng.standard_normal(size).astype("f4")
    expected, keys, _ = reference.attention(
        feeds["qkv"], plain_order(feeds["past_key"]), feeds["past_value"], [21, 30],
        *(feeds.get(name) for name in ("cos", "sin", *GAINS)), heads=heads, epsilon=1e-3,
    )  # fmt: skip
    y, found, _ = run.run(None, feeds)
    assert np.abs(y - expected).max() < 2e-5
    assert np.allclose(plain_order(found), keys, atol=2e-5)


def test_agrees_with_group_query_attention(rng):
    feeds = inputs(rng, 1, 40, 9, 3, 64, [40])
    ours = session(True, 9, 3).run(None, feeds)[0]
    total = np.array(40, np.int32)
    assert np.abs(ours - session(False, 9, 3).run(None, {**feeds, "total": total})[0]).max() < 2e-5


def test_sequences_of_different_lengths_decode_together(rng):
    run = session(True, 4, 2)
    feeds = inputs(rng, 3, 1, 4, 2, 32, [7, 30, 1])
    feeds["past_value"] = rng.standard_normal(feeds["past_value"].shape).astype("f4")
    feeds["past_key"] = rng.standard_normal(feeds["past_key"].shape).astype("f4")
    keys = plain_order(feeds["past_key"])
    expected, _, _ = reference.attention(
        feeds["qkv"], keys, feeds["past_value"], [7, 30, 1], feeds["cos"], feeds["sin"], heads=4
    )
    assert np.abs(run.run(None, feeds)[0] - expected).max() < 2e-5


def test_large_scores_do_not_overflow(rng):
    feeds = inputs(rng, 1, 20, 2, 1, 16, [20])
    feeds["qkv"] *= 1e3
    y = session(True, 2, 1).run(None, feeds)[0]
    caches = feeds["past_key"], feeds["past_value"]
    expected, _, _ = reference.attention(
        feeds["qkv"], *caches, [20], feeds["cos"], feeds["sin"], heads=2
    )
    assert np.abs(y - expected).max() < 1e-2 * np.abs(expected).max()


def test_what_was_never_written_is_never_used(rng):
    feeds = inputs(rng, 1, 3, 2, 1, 16, [3])
    clean = session(True, 2, 1).run(None, feeds)[0]
    for name in ("past_key", "past_value"):
        feeds[name] = np.full_like(feeds[name], np.nan)
    assert np.array_equal(session(True, 2, 1).run(None, feeds)[0], clean)
    feeds = inputs(rng, 1, 3, 2, 1, 16, [3], "int8")
    clean = session(True, 2, 1, cache="int8").run(None, feeds)[0]
    for name in ("past_key", "past_value"):
        feeds[name] = np.full_like(feeds[name], -1)  # scales become NaN
    assert np.array_equal(session(True, 2, 1, cache="int8").run(None, feeds)[0], clean)


def test_any_number_of_threads_gives_the_same_bits(rng):
    for new in (1, 150):
        feeds = inputs(rng, 2, new, 9, 3, 64, [150, 150])
        feeds["past_key"] = rng.standard_normal(feeds["past_key"].shape).astype("f4")
        results = [session(True, 9, 3, threads).run(None, feeds)[0] for threads in (1, 2, 4)]
        assert np.array_equal(results[0], results[1])
        assert np.array_equal(results[0], results[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seqlens_k": [192]}, "193 positions, expected at most 192"),
        ({"seqlens_k": [-1]}, "positions, expected at most"),
        ({"seqlens_k": [2, 2]}, "seqlens_k has 2 elements, expected 1"),
        ({"qkv": (1, 3, 63)}, "qkv has 63 columns, expected 64"),
        ({"cos": (192, 7)}, "cosines has 7 columns, expected 8"),
        ({"past_key": (1, 1, 63, 16)}, "capacity 63 and width 16, expected multiples of 16"),
        ({"past_value": (1, 1, 48, 16)}, "past_key and past_value must be"),
        ({"query_gain": (17,)}, "query_gain has 17 elements, expected 16 or 32"),
        ({"key_gain": (32,)}, "key_gain has 32 elements, expected 16 or 16"),
    ],
)
def test_a_bad_shape_is_an_error(changes, message, rng):
    feeds = inputs(rng, 1, 3, 2, 1, 16, [3])
    for name, value in changes.items():
        feeds[name] = (
            np.array(value, np.int32) if name == "seqlens_k" else np.zeros(value, np.float32)
        )
    norm = bool(feeds.keys() & set(GAINS))
    feeds |= {name: np.ones(16, np.float32) for name in GAINS[: 2 * norm] if name not in feeds}
    with pytest.raises(Exception, match=message):
        session(True, 2, 1, norm=norm).run(None, feeds)


def test_bad_attributes_are_an_error():
    with pytest.raises(Exception, match="heads 3, kv_heads 2"):
        session(True, 3, 2)
    with pytest.raises(Exception, match="cache 'int4', expected one of fp32, fp16, int8"):
        session(True, 4, 2, cache="int4")


def test_a_cache_of_another_type_is_an_error(monkeypatch, rng):
    monkeypatch.setitem(TYPES, "fp32", TensorProto.FLOAT16)
    feeds = inputs(rng, 1, 3, 2, 1, 16, [3], "fp16")
    with pytest.raises(Exception, match="past_key and past_value are not of the type"):
        session(True, 2, 1, cache="fp32").run(None, feeds)
