"""Records what a torch function computes from its inputs, as a list of ATen operators.

Whatever does not depend on the inputs is computed while tracing and becomes a constant: masked
weights, the inverse and the log-determinant of a matrix, LU factors, weight norms. What ONNX has
no operator for often lies there. Mutation is taken out by `torch.func.functionalize`. The function
is traced with two batch sizes: a number that grows with the batch is the batch's, and Python that
branches on a value computed from the inputs is refused, as one branch alone would be recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from leangen.errors import UnsupportedError
from leangen.exporters.torch_module import running

BATCHES = (2, 3)


@dataclass(frozen=True, slots=True)
class Batch:
    """A size that is `times` the batch."""

    times: int


Size: TypeAlias = int | Batch


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A tensor that depends on the inputs: the `index`-th that was made, inputs first."""

    index: int
    shape: tuple[Size, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A tensor that does not."""

    tensor: torch.Tensor
    name: str | None = None
    """Of the parameter or buffer that it is, or is a view of."""
    repeats: tuple[Size, ...] | None = None
    """The shape while tracing, where it is the same for each sample of the batch: `tensor` then
    has one of them."""

    @property
    def shape(self) -> tuple[Size, ...]:
        """As the function sees it."""
        return self.repeats or tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.tensor.dtype


Tensor: TypeAlias = Value | Constant


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One operator: its arguments by the names of its schema, and what it makes."""

    name: str
    """As in `torch.ops.aten`, without overload."""
    arguments: Mapping[str, Any]
    outputs: tuple[Value | None, ...]
    common: torch.dtype | None
    """The type that a pair of operands is brought to."""
    where: str
    """The line of the user's or library's code."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a function computes."""

    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Tensor, ...]


def trace(
    function: Callable[..., Any], examples: Sequence[torch.Tensor], module: nn.Module
) -> Trace:
    """Trace `function(*tensors)`, whose weights are those of `module`, batch first everywhere.

    `examples` have one sample or more; they are repeated to the batches that tracing needs. Raises
    UnsupportedError for a branch on a computed value, for random numbers drawn inside, and where
    the batch enters in another way than as a factor of sizes.
    """
    tapes = [_record(function, [_batch(x, n) for x in examples], module) for n in BATCHES]
    return _merge(*tapes)


def _batch(example: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` samples, repeated as needed."""
    return example[torch.arange(count) % len(example)].clone()


_SHAPE_ONLY = frozenset(
    f"aten.{name}"
    for name in (
        *("zeros_like", "ones_like", "full_like", "empty_like"),
        *("new_zeros", "new_ones", "new_full", "new_empty"),
    )
)
_BRANCHING = frozenset({"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select"})
_REMEDY = "rewrite it without (torch.where), or export the module to ONNX yourself"


@dataclass(slots=True)
class _Recorded:
    """An operator as it ran, tensors and all."""

    name: str
    arguments: dict[str, Any]
    outputs: list[Any]
    index: dict[int, int]
    """By the id of a tensor: which one it was before and after, as it may be overwritten."""
    made: list[int]
    common: torch.dtype | None
    where: str


class _Tape(TorchDispatchMode):  # type: ignore[misc]
    """Runs operators, and records those that depend on the inputs."""

    def __init__(self, inputs: Sequence[torch.Tensor], names: Mapping[int, str]) -> None:
        super().__init__()
        self.inputs = list(inputs)
        self.names = names
        self.ops: list[_Recorded] = []
        self.outputs: list[torch.Tensor] = []
        self.index = {id(tensor): i for i, tensor in enumerate(inputs)}
        self._count = len(inputs)
        self._alive: list[Any] = list(inputs)  # ids stay unique as long as the tensors live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket)
        if name == "aten.copy_" and self._is_written_back(args[0]):
            return args[0]
        operands = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
        depends = any(id(a) in self.index for a in operands)
        if not depends or name in _SHAPE_ONLY:
            made = func(*args, **kwargs)
            if "empty" in name:
                made.zero_()  # what is overwritten later is the same in both traces
            self._alive.append(made)
            return made
        indices = args[1] if name in ("aten.index", "aten.index_put") else ()
        by_mask = any(
            index is not None and index.dtype == torch.bool and id(index) in self.index
            for index in indices
        )
        if by_mask or name in _BRANCHING:
            raise UnsupportedError(
                f"{_place()}: the code branches on, or selects by, a value computed from the "
                f"input, which a graph cannot record: {_REMEDY}"
            )
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UnsupportedError(
                f"{_place()}: random numbers are drawn inside the module ({name}): give them to it "
                "as an input"
            )
        if name.endswith("_"):
            self._check_alone(name, args[0])
        before = {id(a): self.index[id(a)] for a in operands if id(a) in self.index}
        made = func(*args, **kwargs)
        outputs = [o if isinstance(o, torch.Tensor) else None for o in tree_flatten(made)[0]]
        for tensor in outputs:
            if tensor is not None:
                self.index[id(tensor)] = self._count
                self._count += 1
                self._alive.append(tensor)
        self.ops.append(
            _Recorded(
                name.removeprefix("aten.").removesuffix("_"),
                _by_name(func, args, kwargs),
                outputs,
                before,
                [-1 if tensor is None else self.index[id(tensor)] for tensor in outputs],
                _common(func, args),
                _place(),
            )
        )
        return made

    def _is_written_back(self, target: torch.Tensor) -> bool:
        """Whether it is functionalize's last: what an input became, which no one asks for.

        UnsupportedError for what a part of the module became.
        """
        name = self.names.get(target.untyped_storage().data_ptr())
        if name is not None:
            raise UnsupportedError(
                f"the module changes its own {name!r} as it runs, which a graph cannot: keep what "
                "is remembered outside; where it sets itself from its first batch (ActNorm), call "
                "it on data before it is exported"
            )
        return any(target is given for given in self.inputs)

    def _check_alone(self, name: str, target: torch.Tensor) -> None:
        """UnsupportedError where an operator of torch's own overwrites what others look at."""
        storage = target.untyped_storage().data_ptr()
        others = (a for a in self._alive if isinstance(a, torch.Tensor) and a is not target)
        if any(other.untyped_storage().data_ptr() == storage for other in others):
            raise UnsupportedError(f"{_place()}: {name} overwrites a view: write it without")


def _record(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], module: nn.Module
) -> _Tape:
    class Call(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *values: torch.Tensor) -> Any:
            return function(*values)

    call = Call().eval()
    state = {**dict(call.named_parameters()), **dict(call.named_buffers())}
    names = {
        tensor.untyped_storage().data_ptr(): name.removeprefix("module.")
        for name, tensor in reversed(state.items())
    }
    tape = _Tape(inputs, names)

    def run(state: dict[str, torch.Tensor], values: tuple[torch.Tensor, ...]) -> Any:
        return torch.func.functional_call(call, state, values)

    # The other backends of attention are one operator that ONNX has not.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), running(module, inputs), tape:
        made = torch.func.functionalize(run, remove="mutations")(state, tuple(inputs))
    tape.outputs = [tensor for tensor in tree_flatten(made)[0] if isinstance(tensor, torch.Tensor)]
    return tape


def _merge(one: _Tape, two: _Tape) -> Trace:
    """One trace of the two, with what differs between them told in batches."""
    if [op.name for op in one.ops] != [op.name for op in two.ops]:
        raise UnsupportedError(
            "the module computes otherwise for two samples than for three: make it treat each "
            "sample of a batch alike"
        )
    constants: dict[tuple[int, int], Constant] = {}

    def tensor(a: torch.Tensor, b: torch.Tensor, where: str, index: Mapping[int, int]) -> Tensor:
        if id(a) in index:
            return Value(index[id(a)], _shape(a, b, where), a.dtype)
        if (id(a), id(b)) not in constants:
            constants[id(a), id(b)] = _constant(a, b, one.names, where)
        return constants[id(a), id(b)]

    def merged(a: Any, b: Any, where: str, index: Mapping[int, int]) -> Any:
        if isinstance(a, torch.Tensor):
            return tensor(a, b, where, index)
        if type(a) is int and a != b:
            return _size(a, b, where)
        if a != b and not (a != a and b != b):
            raise UnsupportedError(f"{where}: {a!r} depends on the batch: {_REMEDY}")
        return a

    inputs = tuple(
        Value(i, _shape(a, b, "input"), a.dtype)
        for i, (a, b) in enumerate(zip(one.inputs, two.inputs, strict=True))
    )
    ops = []
    for a, b in zip(one.ops, two.ops, strict=True):
        leaves, form = tree_flatten(a.arguments)
        others = tree_flatten(b.arguments)[0]
        arguments = tree_unflatten(
            [merged(x, y, a.where, a.index) for x, y in zip(leaves, others, strict=True)], form
        )
        outputs = tuple(
            None if x is None else Value(index, _shape(x, y, a.where), x.dtype)
            for index, x, y in zip(a.made, a.outputs, b.outputs, strict=True)
        )
        ops.append(Op(a.name, arguments, outputs, a.common, a.where))
    ends = [
        tensor(a, b, "output", one.index) for a, b in zip(one.outputs, two.outputs, strict=True)
    ]
    return Trace(inputs, tuple(ops), tuple(ends))


def _size(a: int, b: int, where: str) -> Size:
    if a == b:
        return a
    if a * BATCHES[1] == b * BATCHES[0]:
        return Batch(a // BATCHES[0])
    raise UnsupportedError(
        f"{where}: a size is {a} for {BATCHES[0]} samples and {b} for {BATCHES[1]}, which is no "
        f"multiple of the batch: {_REMEDY}"
    )


def _shape(a: torch.Tensor, b: torch.Tensor, where: str) -> tuple[Size, ...]:
    return tuple(_size(x, y, where) for x, y in zip(a.shape, b.shape, strict=True))


def _constant(a: torch.Tensor, b: torch.Tensor, names: Mapping[int, str], where: str) -> Constant:
    """A constant of both traces, with one sample where it has a batch of equal ones."""
    name = names.get(a.untyped_storage().data_ptr())
    shape = _shape(a, b, where)
    kept = a
    for axis, size in enumerate(shape):
        if isinstance(size, Batch):
            kept, b = kept.narrow(axis, 0, size.times), b.narrow(axis, 0, size.times)
            alike = kept.repeat(*(BATCHES[0] if i == axis else 1 for i in range(a.dim())))
            if size.times > 1 or not _alike(alike, a):
                raise UnsupportedError(
                    f"{where}: a constant of shape {list(a.shape)} differs from sample to sample: "
                    "make the module treat each sample of a batch alike"
                )
    if not _alike(kept, b):
        raise UnsupportedError(f"{where}: a constant changes from one run to the next: {_REMEDY}")
    moving = any(isinstance(size, Batch) for size in shape)
    return Constant(kept, None if moving else name, shape if moving else None)


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they are equal but for the rounding of sums in another order."""
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    return bool(torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True))


def _by_name(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the schema's names, defaults filled in."""
    found: dict[str, Any] = {}
    for place, argument in enumerate(func._schema.arguments):
        if place < len(args):
            found[argument.name] = args[place]
        else:
            default = argument.default_value if argument.has_default_value() else None
            found[argument.name] = kwargs.get(argument.name, default)
    return found


def _common(func: Any, args: Sequence[Any]) -> torch.dtype | None:
    """The type to which torch brings the first two operands, where they are a pair of numbers."""
    numbers = (torch.Tensor, int, float, bool)
    pair = [a for a in args[:2] if isinstance(a, numbers)]
    if len(pair) == 2 and isinstance(pair[0], torch.Tensor):
        return torch.result_type(*pair)
    return None


def _place() -> str:
    """The innermost line of code that is neither torch's nor this module's: `file.py:12`."""
    inside = (str(Path(torch.__file__).parent), __file__)
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(inside) and frame.f_back is not None:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
