"""The models of a server: which there are, which are in memory, and which must leave it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from leangen import families
from leangen.bundle import Bundle, open_bundle
from leangen.engine import Engine
from leangen.errors import RequestError, UnknownModelError
from leangen.home import Notify
from leangen.serve.account import Account
from leangen.serve.power import PowerCap
from leangen.serve.prometheus import Metrics
from leangen.serve.room import Room
from leangen.serve.worker import Limits, ModelWorker
from leangen.store import Store

FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Served:
    """A model that clients may name."""

    name: str
    bundle: Bundle
    family: families.Family
    worker: ModelWorker

    @property
    def key(self) -> str:
        """`language`, `flow/speech`, ..."""
        return families.key(self.bundle)


def find(refs: Sequence[str], store: Store, say: Notify) -> dict[str, Bundle]:
    """Bundles by the name that clients use: `NAME=REF` names one, else it is called as it is given.

    A folder is called `NAME:SCHEME`, after its manifest. What is missing is fetched. Raises what
    `Store.resolve` raises, RequestError for a name twice.
    """
    bundles: dict[str, Bundle] = {}
    for ref in refs:
        given, _, rest = ref.rpartition("=")
        bundle = store.resolve(rest, notify=say)
        folder = Path(rest).is_dir()
        name = given or (f"{bundle.name}:{bundle.scheme}" if folder else rest)
        if name in bundles:
            raise RequestError(f"two models are called {name!r}: give one as OTHERNAME={rest}")
        bundles[name] = bundle
    return bundles


class Models:
    """Workers by name. A model is loaded by its first job and leaves when others need the room."""

    def __init__(
        self,
        bundles: Mapping[str, Bundle],
        *,
        account: Account,
        metrics: Metrics,
        limits: Limits,
        build: Callable[[Bundle], Engine],
        memory_bytes: int | None = None,
        cap: PowerCap | None = None,
        allow: Callable[[], None] = lambda: None,
    ) -> None:
        room = Room(memory_bytes)
        self.by_name: dict[str, Served] = {}
        for name, bundle in bundles.items():
            need_bytes = bundle.size_bytes + cache_bytes(bundle, limits)
            worker = ModelWorker(
                name,
                partial(_load, build, bundle.path),
                room=room,
                memory_bytes=need_bytes,
                account=account,
                metrics=metrics,
                limits=limits,
                cap=cap,
                allow=allow,
            )
            self.by_name[name] = Served(name, bundle, families.of(bundle), worker)
            if memory_bytes is not None and need_bytes > memory_bytes:
                raise RequestError(
                    f"{name} may take {need_bytes / 1e6:.0f} MB and --memory is "
                    f"{memory_bytes / 1e6:.0f} MB: give more, or a smaller --max-batch or --context"
                )

    def get(self, name: str) -> Served:
        """The model of that name; UnknownModelError for another."""
        if name not in self.by_name:
            raise UnknownModelError(
                f"model {name[:80]!r} is not served here: expected one of {', '.join(self.by_name)}"
            )
        return self.by_name[name]

    def cheaper(self, served: Served) -> Served | None:
        """The smallest served precision of the same model, if it is smaller than this one."""
        same = [
            other
            for other in self.by_name.values()
            if other.bundle.name == served.bundle.name
            and other.key == served.key
            and other.bundle.size_bytes < served.bundle.size_bytes
        ]
        return min(same, key=lambda other: other.bundle.size_bytes, default=None)

    def figures(self) -> dict[str, dict[str, float]]:
        """For the metrics."""
        return {
            name: served.worker.load_figures | {"loaded": float(served.worker.loaded)}
            for name, served in self.by_name.items()
        }

    def start(self) -> None:
        """Start all workers' threads; the models are loaded when they are asked for."""
        for served in self.by_name.values():
            served.worker.start()

    def stop(self, grace_s: float) -> None:
        """Stop all workers, side by side."""
        threads = [
            threading.Thread(target=served.worker.stop, args=(grace_s,))
            for served in self.by_name.values()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _load(build: Callable[[Bundle], Engine], path: Path) -> Engine:
    """The engine of the bundle as it lies there now; BundleError when it is gone."""
    return build(open_bundle(path))


def cache_bytes(bundle: Bundle, limits: Limits) -> int:
    """What a full batch's keys and values take; 0 for other families."""
    if families.key(bundle) != "language" or "io" in bundle.config:
        return 0
    config = bundle.config
    per_token = 2 * config["layers"] * config["kv_heads"] * config["head_dim"] * FLOAT_BYTES
    tokens = min(limits.context, int(config["context_length"]))
    return int(per_token * tokens * max(2, limits.max_batch))
