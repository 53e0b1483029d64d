"""A language model's own text, many sequences at once: calibration data that nobody must supply.

Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models" (arXiv
2305.17888): text drawn from the model at temperature 1 has the statistics that the model works in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from leangen.families import key_values
from leangen.session import Session

Tokens = np.ndarray[Any, np.dtype[np.int64]]


def draw(session: Session, sequences: int, length: int, *, seed: int) -> Tokens:
    """Token ids [sequences, length], drawn from the model; same seed, same text.

    Each sequence begins with the model's first token, or one drawn from the whole vocabulary.
    """
    config, graph = session.bundle.config, session.graph("model")
    rng = np.random.default_rng(seed)
    tokens = np.empty((sequences, length), np.int64)
    start = config["bos_id"]
    tokens[:, 0] = (
        start if start is not None else rng.integers(config["vocab_size"], size=sequences)
    )
    logits = np.zeros((sequences, 1, config["vocab_size"]), np.float32)
    ids, last = np.zeros((sequences, 1), np.int64), np.zeros(sequences, np.int32)
    total, logits_from = np.zeros((), np.int32), np.array([-1], np.int64)
    binding = graph.io_binding()
    caches = key_values.allocate(session, sequences, length)
    caches.bind(binding)
    key_values.bind_inputs(
        binding,
        input_ids=ids,
        seqlens_k=last,
        total_sequence_length=total,
        logits_from=logits_from,
    )
    binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
    for place in range(length - 1):
        ids[:], last[:], total[...] = tokens[:, place : place + 1], place, place + 1
        graph.run_with_iobinding(binding)
        # The largest of logits with Gumbel noise is a draw from their softmax.
        noise = rng.gumbel(size=(sequences, config["vocab_size"]))
        tokens[:, place + 1] = (logits[:, 0] + noise).argmax(axis=-1)
    return tokens
