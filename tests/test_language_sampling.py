"""Sampling draws from the distribution that its options define; templates run in a sandbox."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leangen.errors import BundleError, RequestError
from leangen.families.chat import compile_template
from leangen.families.sampling import Chooser, Sampling, discourage, penalize, sample

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0.5}, np.array([0.16, 0.09, 0.0225, 0.01, 0.0025]) / 0.285),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.8}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0, 0]),
        ({"top_k": 99}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
        ({"temperature": 1e-300}, [1, 0, 0, 0, 0]),
        ({"temperature": 1e300}, [0.2] * 5),
    ],
)
def test_draws_follow_the_distribution(options, expected):
    rng = np.random.default_rng(7)
    n = 20000
    draws = np.bincount([sample(LOGITS, rng, **options) for _ in range(n)], minlength=5) / n
    np.testing.assert_allclose(draws, expected, atol=4 * np.sqrt(0.25 / n))
    assert not draws[np.array(expected) == 0].any()


def test_a_wide_nucleus_keeps_the_share_asked_for():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=2000).astype(np.float32)
    p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    order = np.argsort(-p)
    nucleus = set(order[: np.searchsorted(np.cumsum(p[order]), 0.7) + 1].tolist())
    drawn = {sample(logits, rng, top_p=0.7) for _ in range(8000)}
    assert len(nucleus) > 600  # more than the first two cuts take
    assert drawn <= nucleus
    assert len(drawn) > 0.95 * len(nucleus)


@given(st.integers(0, 2**32), st.floats(0.01, 5), st.integers(0, 60), st.floats(0.01, 1))
def test_a_draw_is_always_a_token(seed, temperature, top_k, top_p):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=50).astype(np.float32) * 30
    token = sample(logits, rng, temperature=temperature, top_k=top_k, top_p=top_p)
    assert 0 <= token < 50
    if top_k == 1:
        assert token == logits.argmax()


def test_penalty_lowers_what_was_seen_and_leaves_the_rest():
    logits = np.array([2.0, -2.0, 3.0, -3.0], np.float32)
    np.testing.assert_allclose(penalize(logits, {0, 1}, 2.0), [1, -4, 3, -3])
    np.testing.assert_allclose(penalize(logits, {0, 1}, 1.0), logits)
    np.testing.assert_allclose(logits, [2, -2, 3, -3])


def rows(n, vocab=20):
    return np.random.default_rng(3).normal(size=(n, vocab)).astype(np.float32)


def test_presence_and_frequency_count_the_reply_alone():
    logits = np.zeros(4, np.float32)
    logits[3] = 1.0
    options = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    chooser = Chooser(options, [3, 3, 3])
    # 3 falls to 0.25 once said, to exactly 0 with its second time, and then the first zero wins.
    assert [chooser.choose(logits).token for _ in range(3)] == [3, 3, 0]
    np.testing.assert_allclose(discourage(logits, {3: 2, 1: 1}, 0.5, 0.25), [0, -0.75, 0, 0])
    np.testing.assert_allclose(logits, [0, 0, 0, 1])


def test_a_bias_lifts_and_bans():
    logits = rows(1)[0]
    best = int(logits.argmax())
    banned = Chooser(Sampling(logit_bias={best: -np.inf, 5: -1.0}), [])
    lifted = Chooser(Sampling(logit_bias={7: 100.0}), [])
    second = int(np.argsort(-logits)[1])
    assert banned.choose(logits).token == second
    assert lifted.choose(logits).token == 7
    hot = Chooser(Sampling(logit_bias={best: -np.inf}, temperature=50.0), [])
    assert best not in {hot.choose(logits).token for _ in range(500)}


@pytest.mark.parametrize("n", [0, 1, 5, 20])
def test_log_probabilities_are_the_models_own(n):
    logits = rows(1)[0]
    options = Sampling(
        logprobs=n, temperature=0.5, top_k=2, logit_bias={4: 50.0}, repetition_penalty=2.0
    )
    choice = Chooser(options, [1, 2]).choose(logits)
    expected = np.log(np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum())
    assert choice.logprob == pytest.approx(expected[choice.token], abs=1e-5)
    assert [token for token, _ in choice.likeliest] == np.argsort(-expected)[:n].tolist()
    np.testing.assert_allclose(
        [logprob for _, logprob in choice.likeliest], np.sort(expected)[::-1][:n], atol=1e-5
    )
    assert Chooser(Sampling(), []).choose(logits).logprob is None


@given(
    st.integers(0, 2**32),
    st.sampled_from(
        [
            {},
            {"temperature": 1.0},
            {"temperature": 2.0, "min_p": 0.1, "presence_penalty": 1.0},
            {"repetition_penalty": 1.5, "frequency_penalty": -0.3, "logit_bias": {1: 2.0}},
        ]
    ),
)
def test_choosing_leaves_the_logits_and_repeats_itself(seed, options):
    logits = rows(12)
    before = logits.copy()
    twice = [
        [chooser.choose(row).token for row in logits]
        for chooser in (Chooser(Sampling(**options), [1, 2], seed=seed) for _ in range(2))
    ]
    assert twice[0] == twice[1]
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 1.5}, "min_p is 1.5, expected 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf"),
        ({"frequency_penalty": "x"}, "frequency_penalty is 'x'"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias is"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias is"),
        ({"logit_bias": [1]}, "logit_bias is"),
        ({"logit_bias": {1: 1e300}}, "logit_bias is .* -1e.06 to 1e.06"),
        ({"presence_penalty": -1e300}, "presence_penalty is -1e.300, expected -1e.06 to"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty is 1e-320, expected 1e-06 to"),
        ({"temperature": 10**400}, "temperature is 1000.*, expected 0"),
        ({"logprobs": 21}, "logprobs is 21, expected a whole number, 0 to 20"),
        ({"logprobs": -1}, "logprobs is -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        Sampling(**options)


TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b> é?"}]


def test_templates_have_the_helpers_of_transformers():
    template = (
        "{{ bos_token }}\n"
        "{%- for message in messages %}\n"
        "    {%- if loop.index > 2 %}{% break %}{% endif %}\n"
        "    {{- message.role ~ ': ' ~ message['content'] | tojson }}|\n"
        "{%- endfor %}\n"
        "{% if add_generation_prompt %}\n"
        "reply{{ eos_token }} {{ strftime_now('%Y')[:1] }}\n"
        "{% endif %}\n"
    )
    render = compile_template(template, bos_token="<s>", eos_token="</s>")
    transformers = pytest.importorskip("transformers", reason="the export extra is not installed")
    from transformers.utils.chat_template_utils import render_jinja_template

    assert transformers.__version__
    expected = render_jinja_template(
        conversations=[TALK],
        chat_template=template,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )[0][0]
    assert render(TALK) == expected


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town <now>",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
CALLS = [
    {"role": "user", "content": "Rain in Hull?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": {"town": "Hull"}}}],
    },
    {"role": "tool", "content": "yes é"},
]
TOOL_TEMPLATE = """\
{% if tools is not none %}Tools:
{% for tool in tools %}
{{ tool | tojson(indent=2) }}
{{ tool.function | tojson(sort_keys=true, separators=(",", ":")) }}
{% endfor %}
{% endif %}
{% if documents %}never{% endif %}
{% set ns = namespace(calls=0) %}
{% for m in messages %}
{% if m.tool_calls is defined %}
{% generation %}
{% for call in m.tool_calls %}
{% set ns.calls = ns.calls + 1 %}{{ call.function | tojson }}
{% endfor %}
{% endgeneration %}
{% else %}{{ m.role }}: {{ m.content | trim }}
{% endif %}
{% endfor %}
{{ ns.calls }}
{% if add_generation_prompt %}assistant:{% endif %}"""


@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_tools_and_calls_render_as_in_transformers(tools):
    pytest.importorskip("transformers", reason="the export extra is not installed")
    from transformers.utils.chat_template_utils import render_jinja_template

    expected = render_jinja_template(
        conversations=[CALLS],
        tools=tools,
        chat_template=TOOL_TEMPLATE,
        add_generation_prompt=True,
    )[0][0]
    assert compile_template(TOOL_TEMPLATE)(CALLS, tools) == expected
    assert "1" in expected and ("weather" in expected.split("user")[0]) == bool(tools)


def test_messages_of_no_json_are_refused():
    with pytest.raises(RequestError, match="refuses these messages"):
        compile_template("{{ messages }}")([{"role": "user", "content": object()}])


def test_a_template_may_refuse():
    render = compile_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        render(TALK)


def test_a_template_cannot_leave_the_sandbox():
    for escape in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(RequestError, match="refuses these messages"):
            compile_template(escape)(TALK)


def test_a_template_that_does_not_parse_is_a_damaged_bundle():
    with pytest.raises(BundleError, match="does not parse"):
        compile_template("{% for %}")
