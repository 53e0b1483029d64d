"""Tasks of EleutherAI's lm-evaluation-harness: multiple choice, generation and chat.

The harness makes the prompts and keeps the score, a bundle answers. Both models answer the same
documents, so that their difference has a spread of its own, smaller than either score's. What the
harness calls stderr is of one model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from leangen import families
from leangen.console import Progress
from leangen.errors import RequestError, needs
from leangen.families import language
from leangen.quality.language import log_softmax
from leangen.quality.measures import Measure, mean
from leangen.session import Session

MAX_NEW_TOKENS = 256
"""Of a reply whose task names no length."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the harness is to do."""

    tasks: Sequence[str]
    """Names that the harness knows, or YAML files of tasks."""
    limit: int | None = None
    """Documents of each task; None: all."""
    few_shot: int | None = None
    """Worked examples before each question; None: as the task says."""
    chat: bool = False
    """Ask through the model's chat template."""


def evaluate(
    candidate: Session, reference: Session, asked: Asked, progress: Progress
) -> list[Measure]:
    """Per task and metric: the candidate's score, the reference's, and their difference.

    Raises DependencyError without lm-eval, RequestError for a task that there is not and for a
    model of another family.
    """
    for session in (candidate, reference):
        if families.key(session.bundle) != "language":
            raise RequestError(
                f"{session.bundle.name} is {families.key(session.bundle)}, expected a language "
                "model to answer tasks"
            )
    harness = _harness(asked)
    scores = []
    for done, session in enumerate((candidate, reference)):
        progress(done, 2, f"{session.bundle.name}:{session.bundle.scheme}")
        scores.append(_scores(session, harness))
    progress(2, 2, "done")
    ours, theirs = scores
    found = []
    for name, values in ours.items():
        other = theirs[name]
        found += [
            mean(name, values, "questions"),
            mean(f"reference {name}", other, "questions"),
            mean(f"{name} change", np.subtract(values, other), "questions"),
        ]
    return found


def log_likelihood(
    session: Session, context: Sequence[int], continuation: Sequence[int]
) -> tuple[float, bool]:
    """Log-probability of `continuation` after `context` in nats; whether greedy text would be it.

    The context is cut on its left to what the model reads at once.
    """
    room = session.bundle.config["context_length"]
    tokens = [*context, *continuation][-(room + 1) :]
    count = min(len(continuation), len(tokens) - 1)
    logits = language.logits(session, tokens[:-1])[-count:]
    wanted = np.array(tokens[-count:])
    chosen = log_softmax(logits)[np.arange(count), wanted]
    return float(chosen.sum()), bool((logits.argmax(axis=-1) == wanted).all())


def _harness(asked: Asked) -> Callable[[Any], Any]:
    """What asks a model the tasks."""
    names, folders = _named(asked.tasks)
    with needs("lm_eval", message="tasks need lm-evaluation-harness: pip install 'leangen[eval]'"):
        import lm_eval
        from lm_eval.tasks import TaskManager
    # Its own are 14,000 files, which take it seconds to read.
    manager = TaskManager(include_path=folders or None, include_defaults=len(folders) < len(names))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise RequestError(
            f"the harness has no task {unknown[0]!r}: `lm_eval ls tasks` lists them; give a YAML "
            "file for one of your own"
        )
    return partial(
        lm_eval.simple_evaluate,
        tasks=names,
        num_fewshot=asked.few_shot,
        limit=asked.limit,
        apply_chat_template=asked.chat,
        task_manager=manager,
        bootstrap_iters=0,
    )


def _scores(session: Session, harness: Callable[[Any], Any]) -> dict[str, list[float]]:
    """The score of every document, by `TASK METRIC`."""
    found = harness(_answering(session))
    scores: dict[str, list[float]] = {}
    for task, documents in found["samples"].items():
        for document in sorted(documents, key=lambda one: one["doc_id"]):
            for metric in document["metrics"]:
                if isinstance(document[metric], (bool, int, float, np.number)):
                    scores.setdefault(f"{task} {metric}", []).append(float(document[metric]))
    if not scores:
        raise RequestError(
            f"{', '.join(found['samples'])} gives no score per question: choose other tasks"
        )
    return scores


def _named(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of tasks, and the folders of those that are files."""
    names, folders = [], []
    for task in tasks:
        path = Path(task)
        if path.suffix not in (".yaml", ".yml"):
            names.append(task)
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"cannot read {path} as a task: {error}") from error
        named = re.search(r"^task:\s*[\"']?([\w.-]+)", text, re.MULTILINE)
        if named is None:
            raise RequestError(
                f"{path} names no task: expected a line such as `task: my_questions`"
            )
        names.append(named[1])
        folders.append(str(path.parent))
    return names, folders


def _answering(session: Session) -> Any:
    """The bundle as the harness wants a model."""
    from lm_eval.api.model import TemplateLM

    tokenizer, config = language.tokenizer(session), session.bundle.config

    class Answering(TemplateLM):  # type: ignore[misc]
        tokenizer_name = f"{session.bundle.name}:{session.bundle.scheme}"

        @property
        def eot_token_id(self) -> int:
            return int(next(iter(config["eos_ids"]), 0))

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if config["bos_id"] is None else int(config["bos_id"])

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **unused: Any
        ) -> list[int]:
            # A chat template writes the special tokens itself.
            special = self._plain if add_special_tokens is None else add_special_tokens
            ids: list[int] = tokenizer.encode(string, add_special_tokens=special).ids
            return ids

        _plain = True

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
        ) -> list[tuple[float, bool]]:
            return [log_likelihood(session, before, after) for _, before, after in requests]

        def loglikelihood_rolling(self, requests: Sequence[Any], **unused: Any) -> list[float]:
            room, found = config["context_length"], []
            for request in requests:
                tokens = tokenizer.encode(request.args[0], add_special_tokens=False).ids
                parts = [tokens[i : i + room] for i in range(0, len(tokens), room)]
                start = [self.prefix_token_id]
                found.append(sum(log_likelihood(session, start, part)[0] for part in parts))
            return found

        def generate_until(self, requests: Sequence[Any], **unused: Any) -> list[str]:
            return [self._reply(*request.args) for request in requests]

        def _reply(self, context: str, options: Mapping[str, Any]) -> str:
            until = options.get("until") or []
            count = int(options.get("max_gen_toks") or MAX_NEW_TOKENS)
            room = config["context_length"] - count
            if room < 1:
                raise RequestError(
                    f"the task wants replies of {count} tokens, the model's context holds "
                    f"{config['context_length']}: choose another task"
                )
            request = language.Request(
                tokens=self.tok_encode(context)[-room:],
                max_new_tokens=count,
                stop=[until] if isinstance(until, str) else [stop for stop in until if stop],
                temperature=float(options.get("temperature") or 0.0),
            )
            return "".join(step.text for step in language.run(session, request))

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            self._plain = False
            text: str = language.chat_template(session)(chat_history, None)
            return text

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return self.tokenizer_name if chat_template else None

    return Answering()
