"""Static loops for kernels: registers written as `total[row, token]`, loops over them unrolled.

Numba keeps a vector in a register only when it has a name of its own. `unrolled` rewrites a kernel
before Numba sees it:

- `for t in static(n)` is repeated n times with `t` a constant; `static(first, stop)` also works;
- `name[constant, ...]` becomes a variable of its own, `name_0_1`;
- `if` on a constant keeps only the branch taken, and `name[constant]` of a constant tuple is its
  element;
- a call of a function marked `inlined`, as a statement of its own, becomes that function's body.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

_Constant = int | float | tuple  # type: ignore[type-arg]
_Part = TypeVar("_Part", bound=Callable[..., None])


def static(*bounds: int) -> range:
    """A range that `unrolled` repeats when the kernel is compiled."""
    return range(*bounds)


def registers() -> Any:
    """Declares a family of registers for the reader and the type checker."""


def inlined(function: _Part) -> _Part:
    """Marks a part of a kernel: it changes registers that it is given, and returns nothing.

    A name means one thing in a kernel and all its parts, so what a part is given is called there
    as it is here, and other names that it sets are the kernel's too.
    """
    function.__dict__["inlined"] = True
    return function


def unrolled(function: Callable[..., Any], **given: Any) -> Callable[..., Any]:
    """`function` with its static loops unrolled and its free names in `given` fixed.

    A number or tuple of numbers becomes a constant, anything else what that name refers to. A
    subscript that is no constant, such as one of a GPU's shared memory, stays one.
    """
    definition = _definition(function)
    constants = {name: value for name, value in given.items() if isinstance(value, _Constant)}
    names: dict[str, Any] = {**function.__globals__, **given}
    parts = {
        name: _definition(value)
        for name, value in names.items()
        if getattr(value, "inlined", False)
    }
    definition.body = _Unroller(constants, parts).block(definition.body)
    tree = ast.Module([definition], [])
    ast.fix_missing_locations(tree)
    _, first_line = inspect.getsourcelines(function)
    ast.increment_lineno(tree, first_line - 1)
    exec(compile(tree, inspect.getfile(function), "exec"), names)
    result: Callable[..., Any] = names[definition.name]
    return result


def _definition(function: Callable[..., Any]) -> ast.FunctionDef:
    """A function as it is written, less its decorators and types."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise TypeError(f"{function!r} is not a plain function")
    definition.decorator_list = []
    definition.returns = None
    for argument in definition.args.args:
        argument.annotation = None
    return definition


class _Unroller(ast.NodeTransformer):
    def __init__(self, constants: dict[str, Any], parts: dict[str, ast.FunctionDef]) -> None:
        self.constants = constants
        self.parts = parts

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        # Nodes are parsed once and visited once per repetition, so each visit works on a copy.
        result: list[ast.stmt] = []
        for statement in statements:
            changed = self.visit(_copied(statement))
            result.extend(changed if isinstance(changed, list) else [changed] if changed else [])
        return result

    def visit_For(self, node: ast.For) -> Any:
        call = node.iter
        if not (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id == "static"
        ):
            node.iter = self.visit(node.iter)
            node.body = self.block(node.body)
            return node
        assert isinstance(node.target, ast.Name)
        bounds = [self._value(argument) for argument in call.args]
        repeated = []
        for index in range(*bounds):
            inner = _Unroller({**self.constants, node.target.id: index}, self.parts)
            repeated.extend(inner.block(node.body))
        return repeated

    def visit_While(self, node: ast.While) -> Any:
        node.test = self.visit(node.test)
        node.body = self.block(node.body)
        return node

    def visit_If(self, node: ast.If) -> Any:
        try:
            taken = node.body if self._value(node.test) else node.orelse
        except _NotConstant:
            node.test = self.visit(node.test)
            node.body = self.block(node.body)
            node.orelse = self.block(node.orelse)
            return node
        return self.block(taken)

    def visit_Assign(self, node: ast.Assign) -> Any:
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        if all(ast.unparse(value) == "registers()" for value in values):
            return None
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        match node.value:
            case ast.Call(func=ast.Name(id=name), args=given) if name in self.parts:
                part = self.parts[name]
                names = [argument.arg for argument in part.args.args]
                if [ast.unparse(argument) for argument in given] != names:
                    raise TypeError(f"{name} takes {names}: call them so in the kernel too")
                return self.block(part.body)
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        assert isinstance(node.value, ast.Name)
        if node.value.id in self.constants:
            return ast.Constant(self._value(node))
        index = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        try:
            parts = [node.value.id, *(str(self._value(part)) for part in index)]
        except _NotConstant:
            return self.generic_visit(node)
        return ast.Name("_".join(parts), node.ctx)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        # Folded here, Numba has less to type: most of a build's time.
        try:
            return ast.Constant(self._value(node))
        except _NotConstant:
            return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id in self.constants:
            return ast.Constant(self.constants[node.id])
        return node

    def _value(self, node: ast.expr) -> int:
        free = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        if not free <= self.constants.keys():
            raise _NotConstant
        expression = ast.fix_missing_locations(ast.Expression(_copied(node)))
        value: int = eval(compile(expression, "<static>", "eval"), {}, dict(self.constants))
        return value


class _NotConstant(Exception):
    pass


def _copied(node: Any) -> Any:
    """Like copy.deepcopy, several times faster."""
    if isinstance(node, ast.AST):
        return type(node)(**{name: _copied(value) for name, value in vars(node).items()})
    return [_copied(item) for item in node] if isinstance(node, list) else node
