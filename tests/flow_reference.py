"""pzflow's log-density in float64 NumPy, written from its published formulas, not from leangen."""

from __future__ import annotations

import math

import numpy as np


def log_prob(state, x):
    """Log-density [n] of rows x [n, d] under the state of a pzflow file."""
    u, log_det = _forward(state["bijector_info"], state["params"][1], np.asarray(x, np.float64))
    kind, arguments = state["latent_info"]
    if kind == "Normal":
        return log_det - 0.5 * (u**2).sum(axis=1) - 0.5 * u.shape[1] * math.log(2 * math.pi)
    inside = (np.abs(u) <= arguments[1]).all(axis=1)
    return np.where(inside, log_det - u.shape[1] * math.log(2 * arguments[1]), -np.inf)


def _forward(info, params, x):
    kind, arguments = info
    if kind == "Chain":
        total = np.zeros(len(x))
        for part, part_params in zip(arguments, params, strict=True):
            x, log_det = _forward(part, part_params, x)
            total += log_det
        return x, total
    if kind == "ShiftBounds":
        low, high, bound = arguments
        middle = ((low + high) / 2).astype(np.float64)
        half = ((high - low) / 2).astype(np.float64)
        return bound * (x - middle) / half, np.full(len(x), np.log(bound / half).sum())
    if kind == "StandardScaler":
        means, stds = (np.asarray(a, np.float64) for a in arguments)
        return (x - means) / stds, np.full(len(x), -np.log(stds).sum())
    if kind == "Scale":
        return x * arguments[0], np.full(len(x), x.shape[1] * math.log(arguments[0]))
    if kind == "Roll":
        return np.roll(x, arguments[0], axis=1), np.zeros(len(x))
    if kind == "Reverse":
        return x[:, ::-1], np.zeros(len(x))
    assert kind == "NeuralSplineCoupling"
    return _coupling(arguments, params, x)


def _coupling(arguments, params, x):
    bins, bound, _, _, transformed, _, _ = arguments
    upper = x.shape[1] // 2 if transformed is None else x.shape[1] - transformed
    hidden = x[:, :upper]
    for layer in params:
        if layer:
            hidden = hidden @ layer[0].astype(np.float64) + layer[1].astype(np.float64)
        else:
            hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
    out = hidden.reshape(len(x), -1, 3 * bins - 1)
    widths, heights, inner = np.split(out, [bins, 2 * bins], axis=2)
    widths, heights = (
        2 * bound * np.exp(a) / np.exp(a).sum(axis=2, keepdims=True) for a in (widths, heights)
    )
    ones = np.ones((*inner.shape[:2], 1))
    derivatives = np.concatenate([ones, np.log1p(np.exp(inner)), ones], axis=2)

    y, log_slopes = x.copy(), np.zeros(len(x))
    for row in range(out.shape[1]):
        value = x[:, upper + row]
        inside = np.abs(value) < bound
        right = np.cumsum(widths[:, row], axis=1) - bound
        k = np.minimum((right <= value[:, None]).sum(axis=1), bins - 1)
        at = np.arange(len(x)), k
        width, height = widths[:, row][at], heights[:, row][at]
        bottom = np.cumsum(heights[:, row], axis=1)[at] - bound - height
        xi = (value - (right[at] - width)) / width
        slope, d0 = height / width, derivatives[:, row][at]
        d1 = derivatives[:, row][at[0], k + 1]
        below = slope + (d1 + d0 - 2 * slope) * xi * (1 - xi)
        result = bottom + height * (slope * xi**2 + d0 * xi * (1 - xi)) / below
        above = slope**2 * (d1 * xi**2 + 2 * slope * xi * (1 - xi) + d0 * (1 - xi) ** 2)
        y[:, upper + row] = np.where(inside, result, value)
        with np.errstate(invalid="ignore"):
            log_slopes += np.where(inside, np.log(above) - 2 * np.log(np.abs(below)), 0.0)
    return y, log_slopes
