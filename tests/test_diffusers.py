"""Every kind of diffusers pipeline that leangen exports, against diffusers itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from diffusers_models import (
    PIPELINES,
    bare,
    change,
    diffusers,
    optimum,
    saved,
    stable,
    torch,
    unet,
    unet2d,
)

from leangen import exporters, lowering, quality
from leangen.bundle import Bundle
from leangen.engine import Engine
from leangen.errors import RequestError, SourceError, UnsupportedError
from leangen.exporters import diffusers_folder
from leangen.exporters import diffusers_schedulers as schedulers
from leangen.exporters.diffusers_pipelines import PIPELINES as KNOWN
from leangen.families import diffusion, step_choice
from leangen.files import default_home
from leangen.lowering.draft import DOMAIN
from leangen.quantize import quantize
from leangen.session import Session

ALIKE = {"ddpm", "turbo", "imagen"}
"""Kinds whose graphs are like another's: quantized only when there is time."""
pytestmark = pytest.mark.filterwarnings(
    *(f"ignore::{kind}" for kind in ("FutureWarning", "DeprecationWarning", "UserWarning")),
    "ignore::torch.jit.TracerWarning",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders and bundles by kind, each made once."""
    root = tmp_path_factory.mktemp("diffusers")
    found: dict[str, Bundle] = {}

    def of(kind: str) -> Bundle:
        if kind not in found:
            saved(kind, root / kind)
            found[kind] = exporters.export(root / kind, root / f"{kind}-fp32")
        return found[kind]

    of.root = root
    return of


def asked(bundle, **options):
    """A request that the bundle can carry out, in two steps."""
    first = diffusion.calibration_requests(Session(bundle, threads=1))[0]
    given = {"prompt": first.prompt, "conditions": first.conditions, "seed": 3}
    if {"upscale", "inpainting"} & set(bundle.config):
        given |= {"image": first.image, "mask": first.mask}
    return given | {"steps": min(bundle.config["steps"], 2)} | options


def drawn(bundle, threads=1, **options):
    """The pictures of a request."""
    run = diffusion.run(Session(bundle, threads=threads), diffusion.Request(**options))
    while True:
        try:
            next(run)
        except StopIteration as stop:
            return stop.value.array


@pytest.mark.parametrize("kind", PIPELINES)
def test_components_and_whole_trajectories_are_those_of_diffusers(made, kind):
    bundle = made(kind)
    found = exporters.check(made.root / kind, bundle)
    assert [str(each) for each in found if not each.passed] == []
    assert {each.part for each in found} == {*bundle.graphs, "trajectory"}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ALIKE)) for kind in PIPELINES],
)
def test_every_pipeline_quantizes_and_generates_with_a_receipt(made, kind, tmp_path):
    bundle = made(kind)
    options = asked(bundle)
    exact = drawn(bundle, **options)
    assert np.array_equal(exact, drawn(bundle, threads=2, **options))
    for scheme, threads in (("int8", 1), ("int4", 2)):
        low = quantize(bundle, scheme, tmp_path / scheme)
        result = Engine(Session(low, threads=threads), baseline_s=0).generate(**options)
        assert result.array.shape == exact.shape and np.isfinite(result.array).all()
        receipt = result.receipt
        assert receipt.scheme == scheme and receipt.units.count == 1
        kinds = {step.kind for step in receipt.energy.steps}
        assert "denoise" in kinds and ("decode" in kinds) == ("decoder" in bundle.graphs)
        assert ("encode" in kinds) == ("text_encoder" in bundle.graphs)
    assert np.array_equal(result.array, drawn(low, threads=1, **options))


def test_every_kind_of_pipeline_is_tried(made):
    alike = {
        "LatentConsistencyModelImg2ImgPipeline",
        "PixArtSigmaPipeline",
        *(kind for kind in KNOWN if kind.endswith(("Img2ImgPipeline", "InpaintPipeline"))),
    }
    assert {made(kind).source["pipeline"] for kind in PIPELINES} >= set(KNOWN) - alike


def test_what_cannot_be_exported_is_named(tmp_path):
    folder, out = saved("ddim", tmp_path / "saved"), tmp_path / "out"
    config, index = folder / "unet" / "config.json", folder / "model_index.json"

    def refused(error, text):
        with pytest.raises(error, match=text):
            exporters.export(folder, out)
        assert not out.exists()

    change(config, block_out_channels=[8, 24])
    refused(SourceError, r"conv_norm_out.*expected|expected \[24")
    change(config, block_out_channels=[8, 16], layers_per_block=2)
    refused(SourceError, r"down_blocks.0.resnets.1.norm1.weight is missing")
    change(config, layers_per_block=1)
    change(folder / "scheduler" / "scheduler_config.json", beta_schedule="laplace")
    refused(UnsupportedError, "noise schedule 'laplace' is unknown: expected one of linear")
    for steps in (0, "1000", None):
        change(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=steps)
        refused(SourceError, rf"num_train_timesteps {steps!r}, expected a number above 0")
    change(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMSchedulerX")
    refused(UnsupportedError, r"DDIMSchedulerX.*the nearest is DDIMScheduler")
    change(index, unet=["pipeline_of_mine", "MyUNet"])
    refused(UnsupportedError, r"unet .* is code of its own .*leangen never runs")
    change(index, unet=["diffusers", "UNet3DModel"])
    refused(UnsupportedError, r"UNet3DModel.*the nearest is UNet2DModel")
    change(index, unet=[None, None])
    refused(UnsupportedError, "has no unet")
    change(index, _class_name="StableDiffusion4Pipeline")
    refused(UnsupportedError, r"the nearest is StableDiffusion\w*Pipeline")


def test_a_component_of_another_kind_of_pipeline_is_named(tmp_path):
    unet2d(class_embed_type="timestep").save_pretrained(tmp_path / "labelled")
    with pytest.raises(UnsupportedError, match=r"unet of .* cannot be called .*class_labels"):
        exporters.export(tmp_path / "labelled", tmp_path / "out")
    options = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
    model = unet(addition_embed_type="text_time", cross_attention_dim=(32, 32), **options)
    stable(unet=model).save_pretrained(tmp_path / "sized")
    with pytest.raises(UnsupportedError, match=r"unet of .* takes pooled, which a StableDiff"):
        exporters.export(tmp_path / "sized", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_of_a_scheduler_that_are_not_followed_are_told(tmp_path):
    folder = saved("ddpm", tmp_path / "saved")
    change(folder / "scheduler" / "scheduler_config.json", variance_type="fixed_small_log")
    reasons = exporters.export(folder, tmp_path / "out").config["reasons"]
    assert reasons == {
        "variance_type": "variance_type 'fixed_small_log' of DDPMScheduler is not followed"
    }
    told = schedulers.describe({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3})
    assert list(told["reasons"]) == ["solver_order"]
    for kind in schedulers.SAMPLERS:  # of their own settings only stand-ins have a word to say
        told = schedulers.describe({"_class_name": kind})
        assert list(told["reasons"]) in ([], ["sampler"])


def test_pickles_are_read_as_weights_or_not_at_all(tmp_path):
    folder = bare(tmp_path / "unet")
    expected = exporters.export(folder, tmp_path / "a")
    weights = folder / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match="truncated or damaged"):
        exporters.export(folder, tmp_path / "b")
    weights.unlink()
    with pytest.raises(SourceError, match=r"holds no \*\.safetensors"):
        exporters.export(folder, tmp_path / "b")
    pickled = folder / "diffusion_pytorch_model.bin"
    state = diffusers.UNet2DModel.from_config(folder).state_dict()
    torch.save({"state": state, "print": print}, pickled)
    with pytest.raises(SourceError, match="pickled and torch refuses to load it as weights only"):
        exporters.export(folder, tmp_path / "b")
    torch.save({"state": state}, pickled)
    with pytest.raises(SourceError, match="holds more than tensors by name"):
        exporters.export(folder, tmp_path / "b")
    torch.save(state, pickled)
    bundle = exporters.export(folder, tmp_path / "b")
    assert bundle.config == expected.config
    assert "taken to be DDPM's" in bundle.config["reasons"]["noise_level"]


def test_conditions_prompts_and_images_that_do_not_fit_are_refused(made):
    dit, sd, lcm, upscaler = (made(kind) for kind in ("dit", "sd", "lcm", "upscaler"))
    for bundle, options, text in [
        (dit, {"conditions": {"class": "oter"}}, "'oter', .* such as otter"),
        (dit, {"conditions": {"class": 1000}}, "class is 1000, expected 0 to 999"),
        (dit, {"prompt": "a cat"}, "reads no text"),
        (sd, {"negative_prompt": "grey", "guidance": 1.0}, "without guidance"),
        (sd, {"steps": 1001}, "at most 999 of the 1000"),
        (lcm, {"negative_prompt": "grey"}, "distilled with its guidance"),
        (lcm, {"steps": 51}, "at most 50 of the 1000"),
        (upscaler, {}, "give the small image"),
        (upscaler, {"image": np.zeros((4, 4, 3))}, r"expected \[8, 8, 3\]"),
    ]:
        with pytest.raises(RequestError, match=text):
            drawn(bundle, **options)


def test_prompts_and_names_of_classes_change_the_picture(made):
    sd, dit = made("sd"), made("dit")
    grey = drawn(sd, prompt="a cat", steps=2)
    assert not np.allclose(grey, drawn(sd, prompt="a dog", steps=2))
    assert not np.allclose(grey, drawn(sd, prompt="a cat", negative_prompt="grey", steps=2))
    by_name, by_number = (
        drawn(dit, conditions={"class": value}, steps=2) for value in ("otter", 360)
    )
    assert np.array_equal(by_name, by_number)


def test_an_image_is_kept_the_more_the_weaker_the_strength_and_where_the_mask_is_black(made):
    sd = made("sd")
    image = np.clip(drawn(sd, prompt="a cat", steps=2, seed=1)[0], -1, 1)
    session = Session(sd, threads=1)
    from leangen.families import imaging, latents

    latent = latents.encoded(session, imaging.picture(image, (3, 16, 16), None))
    kept = latents.decoded(session, latent)
    near, far = (
        drawn(sd, prompt="a dog", steps=10, image=image, strength=strength, guidance=1.0)
        for strength in (0.1, 0.9)
    )
    kept = np.moveaxis(kept, 1, -1)
    assert np.abs(near - kept).mean() < np.abs(far - kept).mean()
    mask = np.zeros((16, 16), np.float32)
    mask[:, 8:] = 1
    request = diffusion.Request(prompt="a dog", steps=3, image=image, mask=mask)
    *states, _ = diffusion.trajectory(session, request)
    assert latents.shrunk(mask[None, None], (4, 8, 8)).sum() == 32
    assert len(states) == 2


def test_the_folder_names_the_bundle_and_its_components_are_graphs(made):
    bundle = made("xl")
    assert list(bundle.graphs) == ["text_encoder", "text_encoder_2", "model", "decoder", "encoder"]
    assert bundle.name == "xl" and bundle.source["pipeline"] == "StableDiffusionXLPipeline"
    assert diffusers_folder.accepts(made.root / "xl")
    low = {name.partition(":")[0] for name in bundle.files if name.endswith(".onnx")}
    assert low == {f"{role}.onnx" for role in bundle.graphs}


@pytest.mark.parametrize("kind", ["xl", "lcm"])
def test_pipelines_that_are_onnx_already_draw_what_their_weights_do(made, tmp_path, kind):
    exported = made(kind)
    folder = optimum(made.root / kind, tmp_path / kind)
    wrapped = exporters.export(folder, tmp_path / "wrapped")
    assert wrapped.config == exported.config and dict(wrapped.graphs) == dict(exported.graphs)
    options = asked(exported)
    np.testing.assert_allclose(drawn(wrapped, **options), drawn(exported, **options), atol=1e-4)
    picture = np.zeros((16, 16, 3), np.float32)
    options |= {"image": picture, "strength": 0.5}
    np.testing.assert_allclose(drawn(wrapped, **options), drawn(exported, **options), atol=1e-4)
    with pytest.raises(RequestError, match="holds ONNX graphs only"):
        exporters.check(folder, wrapped)
    (folder / "unet" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(SourceError, match="unet/model.onnx is damaged"):
        exporters.export(folder, tmp_path / "damaged")


def test_steps_auto_takes_the_cheapest_that_draws_the_same(made, monkeypatch):
    bundle = made("sd")
    monkeypatch.setattr(step_choice, "STEPS", (1, 2, 30))
    monkeypatch.setattr(step_choice, "TOLERANCE", 0.3)
    engine = Engine(Session(bundle, threads=1), baseline_s=0)
    result = engine.generate("a cat", steps="auto")
    curve = step_choice._read(next((default_home() / "steps").iterdir()))
    chosen = step_choice.best(curve)
    request = result.receipt.request
    assert (request["steps"], request["sampler"]) == (chosen.steps, chosen.sampler)
    near = [point for point in curve if point.error <= 0.3]
    assert near and chosen.joules == min(point.joules for point in near)
    assert f"{chosen.steps} of {chosen.sampler} by auto" in result.receipt.runtime.reasons["steps"]
    monkeypatch.setattr(step_choice, "_sampler", None)  # what was measured is not measured again
    assert engine.generate("a dog", steps="auto").receipt.request["steps"] == chosen.steps
    assert "steps" not in engine.generate("a dog", steps=1).receipt.runtime.reasons
    distilled = Engine(Session(made("lcm"), threads=1), baseline_s=0)
    with pytest.raises(RequestError, match="distilled to few steps"):
        distilled.generate("a cat", steps="auto")


@pytest.fixture(scope="module")
def reusing(made):
    """A UNet whose outer part is a graph of its own."""
    made("sd")
    return exporters.export(made.root / "sd", made.root / "sd-reuse", reuse=True)


def test_the_outer_part_on_its_own_features_is_the_whole(reusing, made):
    found = exporters.check(made.root / "sd", reusing)
    assert [str(each) for each in found if not each.passed] == []
    assert "shallow" in {each.part for each in found}
    share = reusing.files["shallow.onnx"]["bytes"] + reusing.size_bytes - made("sd").size_bytes
    assert share < 0.5 * made("sd").size_bytes  # the weights are there once


def test_reuse_runs_the_whole_every_so_many_steps(reusing):
    options = {"prompt": "a cat", "steps": 5}
    assert np.array_equal(drawn(reusing, **options), drawn(reusing, **options, reuse=1))
    session, seen = Session(reusing, threads=1), []
    run = session.run
    session.run = lambda role, *given: (seen.append(role), run(role, *given))[1]
    *_, picture = diffusion.trajectory(session, diffusion.Request(**options, reuse=3))
    ran = [role for role in seen if role in ("model", "shallow")]
    assert ran == ["model", "shallow", "shallow", "model", "shallow"]
    exact = drawn(reusing, **options)
    assert 0 < np.abs(np.moveaxis(picture, 1, -1) - exact).max()


def test_what_reuse_costs_in_quality_is_measured(reusing, tmp_path):
    session = Session(reusing, threads=1)
    task = quality.Task(seeds=2, steps=6, reuse=2)
    (found,) = quality.evaluate([session], session, task, lambda *_: None)
    assert found[0].name == "relative RMSE" and found[0].value > 0
    low = quantize(reusing, "int8", tmp_path / "int8")
    assert np.isfinite(drawn(low, prompt="a cat", steps=3, reuse=2)).all()


def test_reuse_where_there_is_nothing_to_reuse_is_refused(made, tmp_path):
    with pytest.raises(RequestError, match="reuse is 2, but sd was exported without it"):
        drawn(made("sd"), reuse=2)
    with pytest.raises(RequestError, match=r"reuse is 0, expected 1 \(at every step\) or more"):
        drawn(made("sd"), reuse=0)
    made("dit")
    with pytest.raises(UnsupportedError, match="reuse needs a UNet"):
        exporters.export(made.root / "dit", tmp_path / "dit", reuse=True)


def test_group_norm_silu_and_attention_are_nodes_that_are_fused(made, tmp_path):
    graph = onnx.load(made("sd").graph("model"), load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["MultiHeadAttention"] == 2 * 4 and "Softmax" not in kinds
    lowered, why = lowering.find(quantize(made("sd"), "int8", tmp_path / "int8"), "model")
    if lowered is None:
        pytest.skip(why)
    nodes = onnx.load(lowered.path, load_external_data=False).graph.node
    own = [node for node in nodes if node.domain == DOMAIN and node.op_type == "Conv"]
    normed = [node for node in own if any(a.name == "norm_groups" for a in node.attribute)]
    left = sum(node.op_type == "InstanceNormalization" for node in nodes)
    assert len(normed) >= 18 and left <= 1  # the last stands before a convolution that stays fp32
