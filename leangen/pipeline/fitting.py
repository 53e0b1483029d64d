"""Whether the parts of a pipeline fit together; the first misfit is named exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from leangen.errors import RequestError
from leangen.pipeline import ports, template
from leangen.pipeline.atoms import Runner
from leangen.pipeline.ports import TEXT
from leangen.pipeline.spec import Spec
from leangen.pipeline.template import INPUT, Reference


def check(spec: Spec, atoms: Mapping[str, Runner]) -> None:
    """RequestError where an option is unknown, or a part gives not what the next one takes."""
    for part in spec.parts:
        atom = atoms[part.name]
        digest = atom.engine.bundle.digest
        if part.bundle is not None and part.bundle != digest:
            raise RequestError(
                f"{spec.name}: parts.{part.name}: {part.model} is the bundle {digest[:19]}..., "
                f"the pipeline was written for {part.bundle[:19]}...: it was swapped or made anew"
            )
        for field, value in _fields(part.request):
            where = f"{spec.name}: parts.{part.name}.{field}"
            if field.partition(".")[0] not in atom.fields:
                raise RequestError(
                    f"{where}: {part.model} takes no such option: it takes {', '.join(atom.fields)}"
                )
            for reference, inside in template.references(value):
                if reference.part != INPUT:
                    _check(f"{where}: {reference}", reference, inside, field, atom, atoms)


def _fields(request: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A request's options, its conditions one by one: a part may give one of them."""
    for field, value in request.items():
        if field == "conditions" and isinstance(value, Mapping):
            yield from ((f"conditions.{name}", inner) for name, inner in value.items())
        else:
            yield field, value


def _check(
    where: str,
    reference: Reference,
    inside: bool,
    field: str,
    atom: Runner,
    atoms: Mapping[str, Runner],
) -> None:
    giver = atoms[reference.part]
    gives, takes = giver.ports.gives, atom.ports.takes
    if reference.output not in gives:
        raise RequestError(
            f"{where}: {reference.part} ({_title(giver)}) gives no {reference.output!r}: it gives "
            f"{', '.join(gives) or 'nothing that can be passed on'}"
        )
    if not inside and field not in takes:
        raise RequestError(
            f"{where}: {_title(atom)} takes no part's output as {field}: it takes "
            f"{', '.join(takes) or 'none'}"
        )
    given = template.through(reference.filters, gives[reference.output], where)
    why = ports.misfit(given, TEXT if inside else takes[field])
    if why is not None:
        raise RequestError(
            f"{where}: the {reference.output} of {reference.part} ({_title(giver)}) {why} "
            f"({_title(atom)})"
        )


def _title(atom: Runner) -> str:
    return f"{atom.engine.bundle.name}:{atom.engine.bundle.scheme}"
