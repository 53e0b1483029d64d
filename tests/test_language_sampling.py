"""Sampling draws from the distribution that its options define; templates run in a sandbox."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leangen.errors import BundleError, RequestError
from leangen.families.chat import compile_template
from leangen.families.sampling import penalize, sample

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
    logits = rng.normal(size=3000).astype(np.float32)
    p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    order = np.argsort(-p)
    nucleus = set(order[: np.searchsorted(np.cumsum(p[order]), 0.7) + 1].tolist())
    drawn = {sample(logits, rng, top_p=0.7) for _ in range(20000)}
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
