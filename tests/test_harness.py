"""Questions of lm-evaluation-harness: likelihoods against sums by hand, a local task end to end."""

import json

import numpy as np
import pytest
from tiny_bundles import BUILDERS

from leangen.cli import main
from leangen.errors import DependencyError, RequestError
from leangen.families import language
from leangen.quality import harness
from leangen.session import Session

QUIET = lambda *_: None  # noqa: E731


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return BUILDERS["language"](tmp_path_factory.mktemp("lm"))


def test_likelihood_is_the_product_over_tokens(lm):
    session = Session(lm, kernels="ort")
    context, continuation = [1, 5, 9, 2], [3, 7, 4]
    total, greedy = 0.0, True
    for place, token in enumerate(continuation):
        last = language.logits(session, context + continuation[:place])[-1].astype(np.float64)
        total += last[token] - np.log(np.exp(last).sum())
        greedy &= int(last.argmax()) == token
    found = harness.log_likelihood(session, context, continuation)
    assert found == (pytest.approx(total, abs=1e-3), greedy)
    best = [int(language.logits(session, context)[-1].argmax())]
    assert harness.log_likelihood(session, context, best)[1]


def test_a_long_context_is_cut_on_its_left(lm):
    session, room = Session(lm, kernels="ort"), lm.config["context_length"]
    long = [index % 7 + 1 for index in range(room + 20)]
    kept = harness.log_likelihood(session, long[-(room - 1) :], [3, 4])
    assert harness.log_likelihood(session, long, [3, 4]) == kept


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.yaml", None, "cannot read"),
        ("nameless.yaml", "dataset_path: json\n", "names no task"),
    ],
)
def test_a_bad_task_file_is_named(lm, tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    session = Session(lm)
    with pytest.raises(RequestError, match=message):
        harness.evaluate(session, session, harness.Asked([str(tmp_path / name)]), QUIET)


def test_only_language_models_answer(tmp_path):
    session = Session(BUILDERS["flow/density"](tmp_path))
    with pytest.raises(RequestError, match="expected a language model"):
        harness.evaluate(session, session, harness.Asked(["piqa"]), QUIET)


def test_without_the_harness_its_extra_is_named(lm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    session = Session(lm)
    with pytest.raises(DependencyError, match=r"leangen\[eval\]"):
        harness.evaluate(session, session, harness.Asked(["piqa"]), QUIET)


def local_task(folder):
    """A YAML file of a multiple-choice task over a JSON file."""
    documents = [
        {"question": f"q{n}", "choices": ["a b", "c", "d e f"], "answer": n % 3} for n in range(6)
    ]
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / "docs.jsonl").write_text(lines)
    (folder / "mine.yaml").write_text(
        f"""task: leangen_mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "docs.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return folder / "mine.yaml"


def test_a_local_task_without_a_download(lm, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = ["eval", str(lm.path), "--reference", str(lm.path), "--tasks"]
    assert main([*command, str(local_task(tmp_path)), "--json", "--limit", "5"]) == 0
    score, other, change = json.loads(capsys.readouterr().out)["measures"]
    assert score["name"] == "leangen_mine acc" and score["n"] == other["n"] == 5
    assert score["value"] == other["value"] and change["value"] == 0
    assert main([*command, "no_such_task"]) == 2
    assert "has no task 'no_such_task'" in capsys.readouterr().err


def test_chat_tasks_are_asked_through_the_template(lm, tmp_path, monkeypatch, capsys):
    """Multiple choice and written replies, with a worked example as earlier turns."""
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    choice = local_task(tmp_path)
    choice.write_text(choice.read_text() + "fewshot_split: test\n")
    (tmp_path / "reply.yaml").write_text(
        choice.read_text()
        .replace("task: leangen_mine", "task: leangen_reply")
        .replace("output_type: multiple_choice", "output_type: generate_until")
        .replace('doc_to_choice: "{{choices}}"\n', "")
        .replace('doc_to_target: "{{answer}}"', 'doc_to_target: "{{choices[answer]}}"')
        .replace("metric: acc,", "metric: exact_match,")
        + 'generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}\n'
    )
    asked, likelihood = [], harness.log_likelihood

    def seen(session, context, continuation):
        tokenizer = language.tokenizer(session)
        asked.append(tokenizer.decode(context, skip_special_tokens=False))
        return likelihood(session, context, continuation)

    monkeypatch.setattr(harness, "log_likelihood", seen)
    tasks = f"{choice},{tmp_path / 'reply.yaml'}"
    command = ["eval", str(lm.path), "--reference", str(lm.path), "--tasks", tasks, "--chat"]
    assert main([*command, "--few-shot", "1", "--limit", "2", "--json"]) == 0
    measures = {one["name"]: one for one in json.loads(capsys.readouterr().out)["measures"]}
    for name in ("leangen_mine acc", "leangen_reply exact_match"):
        assert measures[name]["n"] == 2 and measures[f"{name} change"]["value"] == 0
    assert len(asked) == 2 * 2 * 3, "two models, two questions, three choices"
    for text in asked:
        # The harness counts white space at the end to what follows, as it does for other models.
        assert text.startswith("<|im_start|>user") and text.endswith("<|im_start|>assistant")
        assert text.count("<|im_end|>") == 3, "the example, its answer, and the question"
