"""Every conversion of an ATen operator, against torch, at a batch that tracing did not see."""

import warnings

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
F = torch.nn.functional

from leangen.errors import UnsupportedError  # noqa: E402
from leangen.exporters.onnx_writer import GraphWriter  # noqa: E402
from leangen.exporters.torch_emitter import Emitter, conversions, value_info  # noqa: E402
from leangen.exporters.torch_trace import trace  # noqa: E402

generator = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=generator)


W, SQUARE = random(6, 5), random(6, 6) + 3 * torch.eye(6)
KERNEL, BIAS = random(4, 3, 3, 3), random(4)
PLACES = torch.tensor([4, 0, 2])
COLUMNS = torch.arange(6)
MASK = torch.tensor([True, False, True, True, False, False])

ALL = slice(None)
EDGES = torch.tensor([-1.0, 0, 1])
solved = torch.linalg.solve_triangular


def outer(x):
    return x[:, :, None] * x[:, None]


def guided(both, n):
    """Half of a batch against its other half."""
    return both[:n] + 2 * (both[n:] - both[:n])


def written(x, where, value):
    y = x.clone()
    y[where] = value(x) if callable(value) else value
    return y


ROWS = {
    "abs neg exp": lambda x: torch.exp(-torch.abs(x)),
    "log sqrt": lambda x: torch.log(x.abs() + 1) + torch.sqrt(x.abs()),
    "floor ceil round": lambda x: x.floor() + 2 * x.ceil() + 3 * (3 * x).round(),
    "sign erf": lambda x: torch.sign(x) + torch.sgn(x) + torch.erf(x),
    "sin cos tan": lambda x: torch.sin(x) + torch.cos(x) + torch.tan(x / 4),
    "asin acos atan": lambda x: sum(f(x.tanh() / 2) for f in (torch.asin, torch.acos, torch.atan)),
    "sinh cosh": lambda x: torch.sinh(x) + torch.cosh(x),
    "asinh acosh atanh": lambda x: torch.asinh(x) + (2 + x * x).acosh() + (x.tanh() / 2).atanh(),
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 1),
    "isnan isinf": lambda x: torch.where(torch.isnan(x) | torch.isinf(x), 0.0, x),
    "logical": lambda x: ((x > 0) & (x < 1)) | torch.logical_not(x > -1) | ((x > 1) ^ (x > 2)),
    "logical of numbers": lambda x: torch.logical_or(torch.logical_and(x, x > 0), x < -1),
    "logical xor": lambda x: torch.logical_xor(x > 0, x > 1) | ~(x > 0.5),
    "compare": lambda x: (x <= 0).float() + 2 * (x >= 1) + 4 * (x == x) + 8 * (x != 0),
    "mul of masks": lambda x: (x > 0) * (x < 1),
    "add sub rsub": lambda x: torch.add(x, 3, alpha=2) - torch.sub(x, W[:, 0], alpha=3) + (1 - x),
    "rsub alpha": lambda x: torch.rsub(x, 5, alpha=2),
    "div of whole numbers": lambda x: (x * 4).long() / 3,
    "div rounded": lambda x: x // 0.3 + torch.div(x, 0.7, rounding_mode="trunc"),
    "whole quotients of whole numbers": lambda x: (
        (x * 9).long() // 4 + 10 * torch.div((x * 9).long(), 4, rounding_mode="trunc")
    ),
    "bits": lambda x: ((x * 9).long() & 3) + 8 * ((x * 9).long() | 5) - ~((x * 9).long() ^ 6),
    "add of masks": lambda x: (x > 1) + (x < -1),
    "batch as a number": lambda x: x * x.shape[0] / x.numel(),
    "float64": lambda x: torch.addcmul(torch.sigmoid(x.double()), x.double(), x.double(), value=2),
    "overwritten": lambda x: x.add_(1).mul_(2),
    "rms norm": lambda x: F.rms_norm(x, (6,), W[:, 0]),
    "none of them": lambda x: torch.cat([x[:, torch.tensor([], dtype=torch.long)], x], 1),
    "guidance": lambda x: guided(W[:, 0] * torch.cat([x, x * x]), len(x)),
    "written constants": lambda x: written(x, (ALL, PLACES), lambda x: W[:3, 0].repeat(len(x), 1)),
    "sum of other types": lambda x: x.sum(1, dtype=torch.float64) + (x > 0).cumsum(1)[:, 5],
    "softplus with a threshold": lambda x: F.softplus(x, 2.0, 1.0),
    "pow": lambda x: x**2 + (x.abs() + 1) ** 1.5 + 2.0**x + (x.abs() + 1) ** x,
    "remainder": lambda x: torch.remainder(x, 0.75) + torch.fmod(x, 0.75),
    "remainder of whole numbers": lambda x: torch.remainder((x * 9).long(), 4),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1),
    "log1p expm1": lambda x: torch.log1p(1e-4 * x) * 1e4 + torch.expm1(1e-4 * x) * 1e4,
    "addcmul addcdiv": lambda x: torch.addcmul(x, x, x, value=2) + torch.addcdiv(x, x, x.abs() + 1),
    "lerp": lambda x: torch.lerp(x, W[:, 1], 0.3),
    "max min of two": lambda x: torch.maximum(x, -x) + torch.minimum(x, x * x),
    "masked_fill": lambda x: x.masked_fill(x > 0, -7.0),
    "clamp": lambda x: x.clamp(-1, 0.5) + x.clamp_min(0) + x.clamp_max(0) + F.hardtanh(x),
    "activations": lambda x: F.relu(x) + F.silu(x) + F.mish(x) + torch.sigmoid(x) + torch.tanh(x),
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "elu": lambda x: F.elu(x, 0.5) + F.selu(x) + F.celu(x, 0.7) + F.leaky_relu(x, 0.2),
    "hard": lambda x: F.hardsigmoid(x) + F.hardswish(x),
    "prelu": lambda x: F.prelu(x, W[:, 0].abs()),
    "softplus": lambda x: F.softplus(x) + F.softplus(x, beta=2.0) + F.logsigmoid(x),
    "softmax": lambda x: F.softmax(x, 1) + F.log_softmax(x, 1),
    "sum mean": lambda x: x.sum(1) + x.mean(1) + (x > 0).sum(1),
    "amax amin prod": lambda x: x.amax(1) + x.amin(1, keepdim=True)[:, 0] + x.prod(1),
    "logsumexp norm": lambda x: torch.logsumexp(x, 1) + torch.linalg.vector_norm(x, dim=1),
    "any all": lambda x: (x > 1).any(1).float() + 2 * (x > -1).all(1).float(),
    "max with places": lambda x: x.max(1)[0] + x.max(1)[1] + x.min(1)[0] - x.min(1)[1],
    "argmax argmin": lambda x: x.argmax(1) + x.argmin(1),
    "var std": lambda x: x.var(1) + x.std(1, correction=0) + torch.var_mean(x, 1)[1],
    "cumsum": lambda x: torch.cumsum(x, 1),
    "mm addmm": lambda x: F.linear(x, W.t(), W[0]) + x @ W,
    "addmm scaled": lambda x: torch.addmm(W[0], x, W, beta=2, alpha=3),
    "mv": lambda x: x @ W[:, 0],
    "constant times computed": lambda x: (SQUARE @ x.t()).t(),
    "solve": lambda x: solved(SQUARE.triu(), x.t(), upper=True).t(),
    "solve lower": lambda x: solved(SQUARE.tril(), x.t(), upper=False, unitriangular=True).t(),
    "solve whole": lambda x: torch.linalg.solve(SQUARE, x.t()).t(),
    "folded": lambda x: x @ torch.linalg.inv(SQUARE) + torch.linalg.slogdet(SQUARE)[1],
    "views": lambda x: x.view(-1, 3, 2).transpose(1, 2).reshape(len(x), 6).unsqueeze(1).squeeze(1),
    "flatten unflatten": lambda x: x.unflatten(1, (2, 3)).permute(0, 2, 1).flatten(1),
    "expand": lambda x: x[:, None].expand(-1, 3, -1) + W.t()[:3].expand(len(x), 3, 6),
    "types": lambda x: x.long().float() + x.double().float() + x.to(torch.int32),
    "cat": lambda x: torch.cat([x, torch.zeros(len(x), 2)], 1),
    "stack": lambda x: torch.stack([x, 2 * x], 2),
    "split": lambda x: x.chunk(2, 1)[0] * x.split([1, 2, 3], 1)[2] - x.unbind(1)[4][:, None],
    "slices": lambda x: x[:, ::2] + x[:, 1::2] + x[:, -3:] + x[:, 1:4],
    "written slice": lambda x: written(x, (ALL, slice(0, 6, 2)), lambda x: -x[:, ::2]),
    "written place": lambda x: written(x, (ALL, 3), 2.5),
    "written places": lambda x: written(x, (ALL, PLACES), lambda x: x[:, :3]),
    "written all": lambda x: written(torch.empty_like(x), (ALL, COLUMNS.flip(0)), x),
    "index": lambda x: x[:, PLACES] + x.index_select(1, PLACES) + x[:, MASK],
    "index by computed": lambda x: W[:, 0][(x > 0).long().sum(1) % 6],
    "gather scatter": lambda x: x.gather(1, (x > 0).long()) + x.max(1, keepdim=True)[0],
    "detached": lambda x: x.detach() + torch.ops.aten.alias(x),
    "scatter": lambda x: torch.zeros(len(x), 6).scatter(1, x.argmax(1, keepdim=True), x[:, :1]),
    "searchsorted": lambda x: torch.searchsorted(EDGES, x, right=True) + torch.bucketize(x, EDGES),
    "pad": lambda x: F.pad(x, (1, 2), value=3.0),
    "flip roll": lambda x: x.flip(1) + x.roll(2, 1),
    "repeat": lambda x: x.repeat(1, 2),
    "triangle": lambda x: torch.tril(outer(x)) + torch.triu(outer(x), 1),
    "bmm": lambda x: torch.bmm(outer(x), outer(x)),
    "baddbmm": lambda x: torch.baddbmm(outer(x), outer(x), outer(x), beta=2),
    "layer norm": lambda x: F.layer_norm(x, (6,), W[:, 0], W[:, 1]) + F.layer_norm(x, (6,)),
    "batch norm": lambda x: F.batch_norm(x, W[:, 0], W[:, 1].abs() + 1, W[:, 2], W[:, 3]),
    "embedding": lambda x: F.embedding((x > 0).long(), W),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(-1, 1, 3, 2)] * 3),
}  # fmt: skip
IMAGES = {
    "conv": lambda x: F.conv2d(x, KERNEL, BIAS, stride=2, padding=1),
    "conv grouped": lambda x: F.conv2d(x, KERNEL[:3, :1], dilation=2, groups=3),
    "conv transposed": lambda x: F.conv_transpose2d(x, KERNEL[:3], None, 2, 1, 1),
    "pools": lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 3),
    "adaptive pool to one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear to corners": lambda x: F.interpolate(x, (9, 8), mode="bilinear", align_corners=True),
    "by a broken factor": lambda x: (
        F.interpolate(x[..., :5, :5], scale_factor=1.5, mode="bilinear")
        + F.interpolate(x[..., :5, :5], scale_factor=1.5)
    ),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "group norm": lambda x: F.group_norm(x, 3, BIAS[:3], BIAS[1:]) + F.group_norm(x, 1),
    "batch norm": lambda x: F.batch_norm(x, BIAS[:3], BIAS[1:].abs() + 1),
    "pixels": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2).repeat(1, 2, 1, 1), 2),
    "reflected": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "replicated": lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"),
}  # fmt: skip
CASES = [(each, ROWS[each], (5, 6)) for each in ROWS]
CASES += [(each, IMAGES[each], (5, 3, 6, 6)) for each in IMAGES]


def example_of(shape):
    """Five samples, the same whatever ran before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def computed(function, example, tmp_path):
    """What the graph of a function makes of five samples."""
    traced = trace(function, [example], torch.nn.Module())
    with GraphWriter(tmp_path) as writer:
        made = Emitter(writer, "x").emit(traced, ["x"])[0]
        writer.node("Identity", "/end", [made], ["y"])
        value = traced.outputs[0]
        x = value_info("x", torch.float32, traced.inputs[0].shape)
        writer.save([x], [value_info("y", value.dtype, value.shape)])
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), options)
    return session.run(None, {"x": example.numpy()})[0]


@pytest.mark.parametrize(
    ("function", "shape"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_converts(function, shape, tmp_path):
    example = example_of(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = function(example.clone()).numpy()
        got = computed(function, example, tmp_path)
    assert got.dtype == wanted.dtype
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_every_conversion_has_a_case():
    seen = {"leangen.sequential", "triangular_solve"}  # by flows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _, function, shape in CASES:
            seen |= {op.name for op in trace(function, [example_of(shape)], torch.nn.Module()).ops}
    assert conversions().keys() - seen == set()


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: x * 2 if x.sum() > 0 else x, "branches on"),
        (lambda x: x[x > 0], "branches on, or selects by"),
        (lambda x: x + torch.rand_like(x), "random numbers"),
        (lambda x: x + torch.arange(len(x))[:, None], "differs from sample to sample"),
        (lambda x: torch.linalg.inv(x[:, :, None] * x[:, None] + SQUARE), "no counterpart here"),
        (lambda x: F.batch_norm(x, None, None, training=True), "samples depend on each other"),
        (lambda x: x.flip(0), "samples of a batch change places"),
        (lambda x: x.roll(1), "samples of a batch change places"),
        (lambda x: x.round(decimals=1), "aten.round with decimals=1 has no counterpart"),
        (lambda x: x.scatter(1, PLACES[None], 2.0, reduce="multiply"), "with reduce='multiply'"),
        (lambda x: F.pad(x[:, None], (1, 1), mode="circular"), "overwrites a view"),
    ],
)
def test_what_a_graph_cannot_say_is_refused(function, text, tmp_path):
    with pytest.raises(UnsupportedError, match=rf"^test_torch_ops\.py:\d+: .*{text}"):
        computed(function, example_of((5, 6)), tmp_path)
