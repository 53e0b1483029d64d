"""A PostgreSQL server of the tests' own, where one is installed: started once, on a socket."""

from __future__ import annotations

import atexit
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

_databases = itertools.count()


class Server:
    """A cluster in a folder of its own that may be stopped and started."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="lgpg-", dir="/tmp"))  # sockets: short paths
        self._user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        if os.geteuid() == 0:  # the server refuses to be root's
            shutil.chown(self.folder, self._user)
        self.run("initdb", "-D", self.folder / "data", "-U", "postgres", "-A", "trust", "-N")
        atexit.register(self.remove)
        self.start()

    def run(self, program, *arguments):
        """Run one of PostgreSQL's programs to its end."""
        return subprocess.run(
            [self._programs / program, *arguments],
            user=self._user if os.geteuid() == 0 else None,
            check=True,
            capture_output=True,
            cwd=self.folder,
        )

    def start(self):
        """Start it and wait until it answers."""
        options = f"-c listen_addresses='' -k {self.folder} -c fsync=off"
        log = self.folder / "log"
        # Its output goes to the log: a pipe would stay open as long as the server.
        self.run("pg_ctl", "-D", self.folder / "data", "-w", "-l", log, "-o", options, "start")

    def stop(self, mode="immediate"):
        """`immediate` is a crash: nothing is written any more."""
        self.run("pg_ctl", "-D", self.folder / "data", "-w", "-m", mode, "stop")

    def remove(self):
        """Stop it and remove its folder."""
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def database(self):
        """The address of a new, empty database."""
        name = f"ledger{next(_databases)}"
        self.run("createdb", "-h", self.folder, "-U", "postgres", name)
        return f"postgresql://postgres@/{name}?host={self.folder}"


@cache
def server():
    """The server; the test is skipped where PostgreSQL or psycopg is not installed."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    found = shutil.which("initdb")
    programs = [Path(found).resolve().parent] if found else []
    programs += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if not programs or not (programs[0] / "initdb").exists():
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    return Server(programs[0])
