"""Static loops for kernels: registers written as `total[row, token]`, loops over them unrolled.

Numba keeps a vector in a register only when it has a name of its own. `unrolled` rewrites a kernel
before Numba sees it:

- `for t in static(n)` is repeated n times with `t` a constant; `static(first, stop)` also works;
- `name[constant, ...]` becomes a variable of its own, `name_0_1`;
- `if` on a constant keeps only the branch taken, and `name[constant]` of a constant tuple is its
  element.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

_Constant = int | float | tuple  # type: ignore[type-arg]


def static(*bounds: int) -> range:
    """A range that `unrolled` repeats when the kernel is compiled."""
    return range(*bounds)


def registers() -> Any:
    """Declares a family of registers for the reader and the type checker."""


def unrolled(function: Callable[..., Any], **given: Any) -> Callable[..., Any]:
    """`function` with its static loops unrolled and its free names in `given` fixed.

    A number or tuple of numbers becomes a constant, anything else what that name refers to. A
    subscript that is no constant, such as one of a GPU's shared memory, stays one.
    """
    source = textwrap.dedent(inspect.getsource(function))
    tree = ast.parse(source)
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise TypeError(f"{function!r} is not a plain function")
    definition.decorator_list = []
    definition.returns = None
    for argument in definition.args.args:
        argument.annotation = None
    constants = {name: value for name, value in given.items() if isinstance(value, _Constant)}
    definition.body = _Unroller(constants).block(definition.body)
    ast.fix_missing_locations(tree)
    _, first_line = inspect.getsourcelines(function)
    ast.increment_lineno(tree, first_line - 1)
    names: dict[str, Any] = dict(function.__globals__)
    names.update(given)
    exec(compile(tree, inspect.getfile(function), "exec"), names)
    result: Callable[..., Any] = names[definition.name]
    return result


class _Unroller(ast.NodeTransformer):
    def __init__(self, constants: dict[str, Any]) -> None:
        self.constants = constants

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
            inner = _Unroller({**self.constants, node.target.id: index})
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
