"""A Ray cluster: connecting to it, and measuring on each of its machines. The extra is `ray`.

`leangen bench|compare|tune --ray` runs the command on every machine, as a task that takes all of
its processors, so that two measurements never disturb each other; several nodes of one machine take
turns. What each machine's ledger gained is merged into this one's, chains and all, unless all write
to one PostgreSQL database (`LEANGEN_LEDGER`). Files that the command writes stay where it ran;
`{node}` in an argument becomes the node's id, for nodes that share a folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leangen.console import print_json, say
from leangen.errors import RequestError, needs
from leangen.ledger import Ledger
from leangen.store import Store

TOLD = ("LEANGEN_HOME", "LEANGEN_LEDGER", "PYTHONPATH")
"""Environment variables that the nodes' processes get from this one."""

PATIENCE = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
"""A small board takes longer to start a process than the 5 s that Ray Serve waits."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the command said on one node."""

    code: int
    said: str
    complaints: str
    ledger: bytes
    """The SQLite file of its receipts; empty where they went elsewhere."""


def connect() -> Any:
    """Ray, connected to `RAY_ADDRESS` or this machine's cluster, else to one started here.

    Raises DependencyError without the extra, RequestError where no cluster answers.
    """
    with needs("ray", message="--ray needs Ray: pip install 'leangen[ray]'"):
        import ray
    if not ray.is_initialized():
        told = PATIENCE | {name: os.environ[name] for name in TOLD if name in os.environ}
        try:
            ray.init(runtime_env={"env_vars": told}, log_to_driver=False, configure_logging=False)
        except ConnectionError as error:
            address = os.environ.get("RAY_ADDRESS", "its usual place")
            raise RequestError(
                f"no Ray cluster answers at {address}: `ray start --head` makes one, RAY_ADDRESS "
                "says where it is, and RAY_AUTH_MODE=token is to be set where it wants a token"
            ) from error
    return ray


def on_every_machine(argv: Sequence[str]) -> int:
    """Run `leangen ARGV` on every machine and print what each said; the worst exit code."""
    ray = connect()
    command = [part for part in argv if part != "--ray"]
    ledger_path = Store().ledger_path
    found: list[tuple[Mapping[str, Any], Measured]] = []
    waiting = _by_machine(ray.nodes())
    running = dict(_start(ray, nodes.pop(0), command) for nodes in waiting.values())
    machines = f"{len(running)} machine{'s' * (len(running) > 1)}"
    say(f"measuring on {machines}, on each when nothing else of the cluster runs there")
    while running:
        [done], _ = ray.wait(list(running))
        node = running.pop(done)
        measured: Measured = ray.get(done)
        found.append((node, measured))
        if measured.ledger:
            _merge(ledger_path, measured.ledger)
        if rest := waiting[node["NodeManagerAddress"]]:
            running |= dict([_start(ray, rest.pop(0), command)])
    if "--json" in command:
        print_json({"machines": [_told(node, measured) for node, measured in found]})
    else:
        for node, measured in found:
            print(f"\n{node['NodeName']} ({_short(node)})\n{measured.said.rstrip()}")
            if measured.code:
                say(measured.complaints.rstrip())
    return max(measured.code for _, measured in found)


def _by_machine(nodes: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    machines: dict[str, list[Mapping[str, Any]]] = {}
    for node in nodes:
        if node["Alive"] and node["Resources"].get("CPU"):
            machines.setdefault(node["NodeManagerAddress"], []).append(node)
    return machines


def _start(ray: Any, node: Mapping[str, Any], command: Sequence[str]) -> tuple[Any, Any]:
    """The task of a node, which takes all its processors."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(max_retries=0)(_measure).options(
        num_cpus=node["Resources"]["CPU"],
        scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
    )
    return task.remote([part.replace("{node}", _short(node)) for part in command]), node


def _short(node: Mapping[str, Any]) -> str:
    """A node's id as it is shown."""
    return str(node["NodeID"])[:8]


def _measure(command: Sequence[str]) -> Measured:
    """What a node does: the command in a process of its own, with a ledger of its own."""
    with tempfile.TemporaryDirectory(prefix="leangen-") as folder:
        path = Path(folder) / "ledger.sqlite"
        shared = isinstance(Store().ledger_path, str)
        env = os.environ if shared else os.environ | {"LEANGEN_LEDGER": str(path)}
        done = subprocess.run(
            [sys.executable, "-m", "leangen", *command], capture_output=True, text=True, env=env
        )
        kept = b""
        if path.exists():
            with Ledger(path) as ledger:
                ledger.head()  # closing it brings all into the one file
            kept = path.read_bytes()
        return Measured(done.returncode, done.stdout, done.stderr, kept)


def _merge(into: Path | str, ledger: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="leangen-") as folder:
        path = Path(folder) / "ledger.sqlite"
        path.write_bytes(ledger)
        with Ledger(into) as own:
            own.merge(path)


def _told(node: Mapping[str, Any], measured: Measured) -> dict[str, Any]:
    told = {"machine": node["NodeName"], "node": node["NodeID"], "code": measured.code}
    if measured.code:
        return told | {"error": measured.complaints.strip()}
    return told | {"result": json.loads(measured.said)}
