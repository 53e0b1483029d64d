"""Tiny pipelines of diffusers with random weights, one of every kind that leangen exports."""

from __future__ import annotations

import json
import string

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the export extra is not installed")
transformers = pytest.importorskip("transformers", reason="the export extra is not installed")

torch.set_num_threads(1)  # these are too small to share, and the machine has others to serve
LETTERS = list(string.ascii_lowercase)
CLIP_VOCAB = {
    word: place
    for place, word in enumerate(
        [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    )
}
T5_VOCAB = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)] + [
    (letter, -3.0) for letter in LETTERS
]
WIDTH = 32


def randomized(model):
    """Every parameter drawn anew, so that nothing is zero or one by default."""
    generator = torch.Generator().manual_seed(len(list(model.parameters())))
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            spread = fan_in**-0.5 if parameter.dim() > 1 else 0.2
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def unet2d(**options):
    return randomized(
        diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **options,
        )
    )


def unet(**options):
    given = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "cross_attention_dim": WIDTH,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return randomized(diffusers.UNet2DConditionModel(**given | options))


def vae(**options):
    return randomized(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=16,
            **{"latent_channels": 4, "scaling_factor": 0.5} | options,
        )
    )


def clip(kind="CLIPTextModel"):
    config = transformers.CLIPTextConfig(
        vocab_size=len(CLIP_VOCAB),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=WIDTH,
        hidden_act="quick_gelu",
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return randomized(getattr(transformers, kind)(config))


def t5():
    config = transformers.T5Config(
        vocab_size=len(T5_VOCAB), d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return randomized(transformers.T5EncoderModel(config))


def clip_tokenizer():
    return transformers.CLIPTokenizer(vocab=CLIP_VOCAB, merges=[], model_max_length=77)


def t5_tokenizer():
    return transformers.T5Tokenizer(vocab=T5_VOCAB, extra_ids=0, model_max_length=77)


def stable(kind="StableDiffusionPipeline", scheduler=None, **parts):
    given = {
        "vae": vae(),
        "text_encoder": clip(),
        "tokenizer": clip_tokenizer(),
        "unet": unet(),
        "scheduler": scheduler
        or diffusers.PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
        ),
    }
    if kind not in ("StableDiffusionUpscalePipeline",):
        given |= {"safety_checker": None, "feature_extractor": None}
        parts.setdefault("requires_safety_checker", False)
    return getattr(diffusers, kind)(**given | parts)


def ddim():
    return diffusers.DDIMPipeline(unet2d(), diffusers.DDIMScheduler())


def ddpm():
    return diffusers.DDPMPipeline(unet2d(), diffusers.DDPMScheduler())


def consistency():
    model = unet2d(num_class_embeds=5)
    return diffusers.ConsistencyModelPipeline(model, diffusers.CMStochasticIterativeScheduler())


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return diffusers.DiTPipeline(
        randomized(model), vae(), diffusers.DDIMScheduler(clip_sample=False)
    )


def inpainting():
    model = unet(in_channels=9, attention_head_dim=(2, 4), use_linear_projection=True)
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    return stable("StableDiffusionInpaintPipeline", scheduler, unet=model)


def xl():
    model = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae(), clip(), clip("CLIPTextModelWithProjection"), clip_tokenizer(), clip_tokenizer(),
        model, diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    )  # fmt: skip


def turbo():
    scheduler = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    return stable(scheduler=scheduler)


def lcm():
    return stable(
        "LatentConsistencyModelPipeline",
        diffusers.LCMScheduler(),
        unet=unet(time_cond_proj_dim=16),
        requires_safety_checker=False,
    )


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, cross_attention_dim=32, caption_channels=WIDTH,
        use_additional_conditions=False,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtAlphaPipeline(t5_tokenizer(), t5(), vae(), randomized(model), scheduler)


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=WIDTH * 2,
        caption_projection_dim=32, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=16,
        qk_norm="rms_norm",
    )  # fmt: skip
    config = t5().config
    config.d_model = 2 * WIDTH
    return diffusers.StableDiffusion3Pipeline(
        randomized(model),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(shift_factor=0.1),
        *(clip("CLIPTextModelWithProjection"), clip_tokenizer()) * 2,
        randomized(transformers.T5EncoderModel(config)),
        t5_tokenizer(),
    )


def upscaler():
    return stable(
        "StableDiffusionUpscalePipeline",
        diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        unet=unet(in_channels=7, num_class_embeds=1000),
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear"),
    )


def imagen(kind="IFPipeline", **options):
    blocks = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "encoder_hid_dim": WIDTH,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
        "resnet_time_scale_shift": "scale_shift",
        "only_cross_attention": False,
        "in_channels": 3,
        "out_channels": 6,
    }
    parts = {"image_noising_scheduler": diffusers.DDPMScheduler()} if options else {}
    return getattr(diffusers, kind)(
        tokenizer=t5_tokenizer(), text_encoder=t5(), unet=unet(**blocks | options),
        scheduler=diffusers.DDPMScheduler(
            variance_type="learned_range", thresholding=True, sample_max_value=1.5,
            dynamic_thresholding_ratio=0.95, beta_schedule="squaredcos_cap_v2",
        ),
        safety_checker=None, feature_extractor=None, watermarker=None,
        requires_safety_checker=False, **parts,
    )  # fmt: skip


def super_resolution():
    return imagen("IFSuperResolutionPipeline", in_channels=6, class_embed_type="timestep")


PIPELINES = {
    "ddim": ddim,
    "ddpm": ddpm,
    "consistency": consistency,
    "dit": dit,
    "sd": stable,
    "inpainting": inpainting,
    "xl": xl,
    "turbo": turbo,
    "lcm": lcm,
    "pixart": pixart,
    "sd3": sd3,
    "upscaler": upscaler,
    "imagen": imagen,
    "imagen-sr": super_resolution,
}
"""A builder for each kind."""


def saved(kind, folder):
    """The folder of a tiny pipeline, the same whatever was drawn before."""
    torch.manual_seed(0)
    PIPELINES[kind]().save_pretrained(folder)
    if kind == "dit":  # as the published one has it
        change(folder / "model_index.json", id2label={"0": "tench, Tinca tinca", "360": "otter"})
    return folder


def bare(folder):
    """A UNet on its own, with its scheduler beside it."""
    unet2d().save_pretrained(folder)
    return folder


def change(path, **values):
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class Raw(torch.nn.Module):
    """A component called as optimum calls it, with all that it answers."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *values):
        return self.call(self.model, *values)


def _as_onnx(folder, model, call, inputs, outputs):
    folder.mkdir()
    model.config.to_json_file(folder / "config.json") if hasattr(
        model.config, "to_json_file"
    ) else model.save_config(folder)
    torch.onnx.export(
        Raw(model, call), tuple(inputs.values()), folder / "model.onnx", dynamo=False,
        input_names=list(inputs), output_names=outputs, opset_version=18,
        dynamic_axes={name: {0: "batch"} for name in (*inputs, *outputs)},
    )  # fmt: skip


def _said(encoder, tokens):
    said = encoder(tokens, output_hidden_states=True)
    pooled = said.text_embeds if hasattr(said, "text_embeds") else said.pooler_output
    return (said.last_hidden_state, pooled, *said.hidden_states)


def _unet(model, sample, timestep, text, *more):
    options = {}
    if len(more) == 2:
        options["added_cond_kwargs"] = {"text_embeds": more[0], "time_ids": more[1]}
    elif more:
        options["timestep_cond"] = more[0]
    return model(sample, timestep, text, return_dict=False, **options)[0]


def optimum(source, onnx):
    """A folder `onnx` of the ONNX graphs of the pipeline in `source`, as optimum lays it out."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(source)
    pipeline.scheduler.save_pretrained(onnx / "scheduler")
    for name in ("", "_2"):
        if encoder := getattr(pipeline, f"text_encoder{name}", None):
            getattr(pipeline, f"tokenizer{name}").save_pretrained(onnx / f"tokenizer{name}")
            pooled = "text_embeds" if hasattr(encoder, "text_projection") else "pooler_output"
            tokens = {"input_ids": torch.zeros(2, 77, dtype=torch.int32)}
            hidden = [f"hidden_states.{place}" for place in range(3)]
            outputs = ["last_hidden_state", pooled, *hidden]
            _as_onnx(onnx / f"text_encoder{name}", encoder, _said, tokens, outputs)
    model = pipeline.unet
    width = model.config.cross_attention_dim
    inputs = {
        "sample": torch.zeros(2, 4, 8, 8),
        "timestep": torch.zeros(1, dtype=torch.int64),
        "encoder_hidden_states": torch.zeros(2, 77, width),
    }
    if model.config.addition_embed_type:
        inputs |= {"text_embeds": torch.zeros(2, WIDTH), "time_ids": torch.zeros(2, 6)}
    if model.config.time_cond_proj_dim:
        inputs["timestep_cond"] = torch.zeros(2, model.config.time_cond_proj_dim)
    _as_onnx(onnx / "unet", model, _unet, inputs, ["out_sample"])
    vae = pipeline.vae
    _as_onnx(
        onnx / "vae_decoder", vae, lambda vae, z: vae.decode(z, return_dict=False)[0],
        {"latent_sample": torch.zeros(1, 4, 8, 8)}, ["sample"],
    )  # fmt: skip
    _as_onnx(
        onnx / "vae_encoder", vae, lambda vae, x: vae.encode(x).latent_dist.parameters,
        {"sample": torch.zeros(1, 3, 16, 16)}, ["latent_parameters"],
    )  # fmt: skip
    index = json.loads((source / "model_index.json").read_text())
    index["_class_name"] = "ORT" + index["_class_name"]
    (onnx / "model_index.json").write_text(json.dumps(index))
    return onnx
