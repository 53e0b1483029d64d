"""The engines that `peers.py` compares: how each loads a model and runs a round."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Round = Callable[[list[int], int], tuple[float, float]]
"""(prompt, new tokens) -> seconds of the prefill with the first token, seconds of the rest."""


class LeftOut(Exception):
    """An engine that is not installed, or does not take the model; the message says which."""


def leangen_engine(
    model: str, threads: int, context: int, kernels: str = "auto"
) -> tuple[Round, str]:
    """A round in leangen; `model` is a bundle's folder."""
    import onnxruntime

    from leangen.bundle import open_bundle
    from leangen.families.decoder import Decoder
    from leangen.session import Session

    session = Session(open_bundle(Path(model)), threads=threads, kernels=kernels)
    session.graph("model")

    def run(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        with Decoder(session, context) as decoder:
            start = time.perf_counter()
            token = int(decoder.feed(prompt).argmax())
            first = time.perf_counter()
            for _ in range(new_tokens - 1):
                token = int(decoder.feed([token]).argmax())
            return first - start, time.perf_counter() - first

    return run, f"onnxruntime {onnxruntime.__version__}, kernels {session.kernels}"


def imported(name: str, package: str, hint: str = "") -> Any:
    """The module of a peer; LeftOut says what to do where there is none."""
    try:
        return __import__(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise LeftOut(f"{package} is not installed: `pip install {package}`{hint}") from error


def import_llama() -> Any:
    """The module llama_cpp."""
    hint = " into it, or name an interpreter that has it with --llama-python"
    return imported("llama_cpp", "llama-cpp-python", hint)


def llama_engine(
    model: str, threads: int, context: int, *, flash: bool = False
) -> tuple[Round, str]:
    """A round in llama.cpp, by its C interface: no Python between its tokens but the argmax."""
    llama_cpp = import_llama()
    llama = llama_cpp.Llama(
        model,
        n_ctx=context,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=flash,
        verbose=False,
    )
    vocab = llama.n_vocab()

    def feed(tokens: list[int]) -> int:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(llama.ctx, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (vocab,)).argmax())

    def run(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        llama._ctx.kv_cache_clear()
        start = time.perf_counter()
        token = feed(prompt)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = feed([token])
        return first - start, time.perf_counter() - first

    return run, f"llama-cpp-python {llama_cpp.__version__}"


def openvino_engine(model: str, threads: int, context: int) -> tuple[Round, str]:
    """A round in OpenVINO GenAI, which reads the GGUF file itself."""
    genai = imported("openvino_genai", "openvino-genai")
    openvino = imported("openvino", "openvino")

    class Clock(genai.StreamerBase):  # type: ignore[misc]
        """When each token came."""

        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def write(self, token: Any) -> Any:
            self.times.append(time.perf_counter())
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    schedule = genai.SchedulerConfig()
    schedule.enable_prefix_caching = False  # every round has the same prompt
    try:
        pipeline = genai.LLMPipeline(
            model, "CPU", scheduler_config=schedule, INFERENCE_NUM_THREADS=threads
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise LeftOut(f"OpenVINO GenAI does not take this file: {reason}") from error

    def run(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        ids, clock = np.array([prompt], np.int64), Clock()
        given = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        start = time.perf_counter()
        pipeline.generate(given, config, clock)
        return clock.times[0] - start, clock.times[-1] - clock.times[0]

    return run, f"openvino-genai {genai.__version__}"


def genai_engine(model: str, threads: int, context: int) -> tuple[Round, str]:
    """A round in onnxruntime-genai, on the bundle's own graph; see `write_genai`."""
    genai = imported("onnxruntime_genai", "onnxruntime-genai")
    folder = write_genai(Path(model), threads)
    try:
        loaded = genai.Model(str(folder))
    except RuntimeError as error:
        raise LeftOut(f"onnxruntime-genai does not take this model: {error}") from error
    options = genai.GeneratorParams(loaded)
    options.set_search_options(max_length=context, min_length=context, do_sample=False)

    def run(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        generator = genai.Generator(loaded, options)
        start = time.perf_counter()
        generator.append_tokens(np.array([prompt], np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        return first - start, time.perf_counter() - first

    return run, f"onnxruntime-genai {genai.__version__}"


def write_genai(bundle: Path, threads: int) -> Path:
    """A folder inside the bundle's that onnxruntime-genai runs: the same graph and weights.

    Only how lengths come in differs: an attention mask, of which the graph takes the sum.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    config = json.loads((bundle / "leangen.json").read_bytes())["config"]
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    graph = model.graph
    heads = next(
        attribute.i
        for node in graph.node
        if node.op_type == "GroupQueryAttention"
        for attribute in node.attribute
        if attribute.name == "num_heads"
    )
    lengths = ("seqlens_k", "total_sequence_length", "logits_from")
    ids, *caches = [given for given in graph.input if given.name not in lengths]
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"])
    del graph.input[:]
    graph.input.extend([ids, mask, *caches])
    for name, value in (("logits_from", [-1]), ("mask/axis", [1]), ("mask/one", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    make, nodes = helper.make_node, list(graph.node)
    before = [
        make("ReduceSum", ["attention_mask", "mask/axis"], ["mask/sum"], keepdims=0),
        make("Sub", ["mask/sum", "mask/one"], ["mask/last"]),
        make("Cast", ["mask/last"], ["seqlens_k"], to=TensorProto.INT32),
        make("Shape", ["attention_mask"], ["mask/shape"], start=1, end=2),
        make("Squeeze", ["mask/shape"], ["mask/total"]),
        make("Cast", ["mask/total"], ["total_sequence_length"], to=TensorProto.INT32),
    ]
    del graph.node[:]
    graph.node.extend(before + nodes)
    logits = next(output for output in graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].Clear()
    logits.type.tensor_type.shape.dim[1].dim_value = 1

    folder = bundle / "genai"
    folder.mkdir()
    for data in bundle.glob("*.data"):  # it follows no link out of its folder
        try:
            os.link(data, folder / data.name)
        except OSError:
            shutil.copyfile(data, folder / data.name)
    onnx.save(model, folder / "model.onnx")
    of_layers = {f"{way}_{kind}_names": f"{way}_{kind}_%d" for way, kind in _CACHES}
    decoder = {
        "session_options": {"intra_op_num_threads": threads, "provider_options": []},
        "filename": "model.onnx",
        "head_size": config["head_dim"],
        "hidden_size": config["head_dim"] * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": config["layers"],
        "num_key_value_heads": config["kv_heads"],
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **{key: name for key, name in of_layers.items() if key.startswith("past")},
        },
        "outputs": {
            "logits": "logits",
            **{key: name for key, name in of_layers.items() if key.startswith("present")},
        },
    }
    ends = config["eos_ids"][0]
    described = {
        "type": "llama",
        "bos_token_id": config["bos_id"],
        "eos_token_id": ends,
        "pad_token_id": ends,
        "vocab_size": config["vocab_size"],
        "context_length": config["context_length"],
        "decoder": decoder,
    }
    search = {"past_present_share_buffer": True, "do_sample": False}
    text = json.dumps({"model": described, "search": search}, indent=1)
    (folder / "genai_config.json").write_text(text, encoding="utf-8")
    return folder


_CACHES = [(way, kind) for way in ("past", "present") for kind in ("key", "value")]

ENGINES: dict[str, Callable[[str, int, int], tuple[Round, str]]] = {
    "leangen": leangen_engine,
    "leangen on ORT": partial(leangen_engine, kernels="ort"),
    "llama.cpp": llama_engine,
    "llama.cpp flash": partial(llama_engine, flash=True),
    "OpenVINO GenAI": openvino_engine,
    "ORT GenAI": genai_engine,
}
"""What each is made by, from a model, threads and the length of the context."""

READS_GGUF = ("llama.cpp", "llama.cpp flash", "OpenVINO GenAI")
"""Those that take the GGUF file; the others take leangen's bundle of it."""
