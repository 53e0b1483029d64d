"""Perceptual distances over an ONNX network that the user names; leangen ships none.

The network takes pictures [n, c, h, w] and returns feature vectors [n, d], or feature maps
[n, c, h, w], any number of outputs. Maps give a perceptual distance of each pair of pictures in the
manner of LPIPS (Zhang et al., 2018, without its learnt weights): channels normalised to unit length
at every place, squared differences, mean over places, sum over outputs. Vectors give the Fréchet
distance (Heusel et al., 2017) between two sets. A network of two picture inputs is taken to return
the distance of each pair itself, as an export of LPIPS does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from leangen.errors import RequestError, SourceError
from leangen.quality.measures import Array, Measure, mean

RESAMPLES = 32
"""Bootstrap resamples behind the spread of a Fréchet distance."""


class Network:
    """A feature network; pictures are fed as the model draws them, in float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise SourceError(f"there is no feature network at {path}: expected an ONNX file")
        try:
            self._session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # ORT raises many unrelated types from its C++ side
            detail = str(error).splitlines()[0]
            raise SourceError(f"ONNX Runtime cannot load {path}: {detail}") from error
        self._inputs = [entry.name for entry in self._session.get_inputs()]
        if len(self._inputs) not in (1, 2):
            raise SourceError(
                f"{path} has {len(self._inputs)} inputs, expected 1 (pictures) or 2 (pairs of them)"
            )

    def run(self, *pictures: Array) -> list[Array]:
        """The outputs for pictures [n, h, w, c], one argument per input."""
        feeds = {
            name: np.ascontiguousarray(np.moveaxis(part, -1, 1), np.float32)
            for name, part in zip(self._inputs, pictures, strict=True)
        }
        try:
            return [np.asarray(value, np.float64) for value in self._session.run(None, feeds)]
        except Exception as error:  # as above: a shape that the network does not take
            detail = str(error).splitlines()[0]
            raise RequestError(
                f"{self.path} does not take pictures of {list(pictures[0].shape[1:])} "
                f"(h, w, c): {detail}"
            ) from error

    def measures(self, reference: Array, candidate: Array, real: Array | None) -> list[Measure]:
        """Distances between pictures [n, h, w, c] of the same noise, and to real ones if given."""
        network = self.path.stem
        if len(self._inputs) == 2:
            (distance, *_) = self.run(reference, candidate)
            return [
                mean(f"{network} distance", distance.reshape(len(reference), -1)[:, 0], "seeds")
            ]
        before, after = self.run(reference), self.run(candidate)
        maps = [(a, b) for a, b in zip(before, after, strict=True) if a.ndim == 4]
        found = []
        if maps:
            distance = np.sum([perceptual(a, b) for a, b in maps], axis=0)
            found.append(mean(f"perceptual distance ({network})", distance, "seeds"))
        for a, b in zip(before, after, strict=True):
            if a.ndim == 2 and len(a) > 1:
                found.append(_frechet(f"Fréchet distance ({network})", a, b))
        if real is not None and len(real) > 1:
            for a, b, r in zip(before, after, self.run(real), strict=True):
                if a.ndim == 2 and len(a) > 1:
                    name = f"Fréchet distance to data ({network})"
                    found += [_frechet(name, r, b), _frechet(f"reference {name}", r, a)]
        if not found:
            raise RequestError(
                f"{self.path} returns shapes {[list(value.shape) for value in before]}: "
                "expected vectors [n, d] of 2 pictures or more (--seeds), or maps [n, c, h, w]"
            )
        return found


def perceptual(a: Array, b: Array) -> Array:
    """Per picture: squared distance of unit-length channel vectors, mean over places."""

    def unit(maps: Array) -> Array:
        return np.asarray(maps / (np.linalg.norm(maps, axis=1, keepdims=True) + 1e-10))

    return np.asarray(((unit(a) - unit(b)) ** 2).sum(axis=1).mean(axis=(1, 2)))


def frechet(a: Array, b: Array) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^1/2) of Gaussians fitted to rows [n, d]."""
    difference = a.mean(axis=0) - b.mean(axis=0)
    # tr (A B)^1/2 is the sum of singular values of sqrt(A) sqrt(B), and X^T X = A for centred X
    x, y = ((rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1) for rows in (a, b))
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(difference @ difference + (x**2).sum() + (y**2).sum() - 2 * cross)


def _frechet(name: str, a: Array, b: Array) -> Measure:
    """With two standard errors by resampling the second set; it is biased upwards for small n."""
    rng = np.random.default_rng(0)
    resampled = [frechet(a, b[rng.integers(0, len(b), len(b))]) for _ in range(RESAMPLES)]
    return Measure(name, frechet(a, b), float(2 * np.std(resampled, ddof=1)), len(b), "samples")
