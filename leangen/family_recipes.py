"""How the models of each family are quantized unless a recipe of their own says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

from leangen.bundle import Bundle


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a kind of model is quantized."""

    measured: bool = True
    """Plan from calibration runs; else every layer of a kind is treated alike."""
    activation_error: float = 0.04
    """Relative RMSE that rounding activations to 8 bits may add to a graph's output."""
    caution: float = 1.0
    """Divides the relative RMSE that the rounding of weights may add to a graph's output."""
    method: str = "rtn"
    """How linear layers of 4 bits or fewer are rounded unless something else is asked for."""
    tuned_method: str = "rtn"
    """The same while a model is tuned, where better rounding pays for its time."""
    keep_fp32: Mapping[str, str] = field(default_factory=dict)
    """Patterns of node names that stay fp32, with the reason."""
    fp32_activations: Mapping[str, str] = field(default_factory=dict)
    """Patterns of node names of which only the weights are quantized, with the reason."""

    def kept(self, node: str) -> str | None:
        """Why a node stays fp32, or None."""
        return next((why for glob, why in self.keep_fp32.items() if fnmatch(node, glob)), None)

    def weights_only(self, node: str) -> str | None:
        """Why a node's activations stay fp32, or None."""
        patterns = self.fp32_activations.items()
        return next((why for glob, why in patterns if fnmatch(node, glob)), None)


RECIPES = {
    "language": Recipe(measured=False, tuned_method="gptq"),
    "seq2seq/text": Recipe(measured=False),
    "seq2seq/transcription": Recipe(measured=False),
    "embedding": Recipe(measured=False),
    "autoregressive/image": Recipe(measured=False),
    "flow/density": Recipe(
        caution=2.0,
        keep_fp32={
            "/bijection/*": "a matrix that the other direction has the inverse of: rounded apart, "
            "they would no longer undo each other"
        },
        method="gptq",
        tuned_method="gptq",
        fp32_activations={"*": "rounded activations shift a log-density by tenths of a nat"},
    ),
    "flow/speech": Recipe(
        activation_error=0.1,
        keep_fp32={
            "/dp/*": "duration predictor: it sets how long each sound lasts, so an error moves "
            "everything after it"
        },
        fp32_activations={
            "/dec/*": "rounded activations put a hiss under silence (log-mel distance 6 dB)"
        },
    ),
    "diffusion/pipeline": Recipe(
        measured=False,
        keep_fp32={
            "*/conv_in/*": "first convolution: few weights, and all that follows sees its errors",
            "*/conv_out/*": "last convolution: few weights, and its errors are the picture's",
            "*/time_embedding/*": "noise level: few weights, and every layer sees its errors",
        },
    ),
}
"""Recipes by family or family/task; the rest take the default one."""


def of(bundle: Bundle) -> Recipe:
    """The recipe of a bundle's family and task.

    A diffusion pipeline of several graphs is too large to try its layers one by one.
    """
    task = bundle.config.get("task")
    if bundle.family == "diffusion" and len(bundle.graphs) > 1:
        task = "pipeline"
    key = bundle.family if task is None else f"{bundle.family}/{task}"
    return RECIPES.get(key, Recipe())
