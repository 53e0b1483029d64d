"""A card that is none: it runs the kernels' PTX, instruction by instruction, and watches.

What Numba's simulator cannot see is the compiler's work: registers of inline assembly, layouts of
the tensor core, what shares an address. Here the very text that a driver would be given runs, with
what `compute-sanitizer` checks on a card: memory that is not there or was never written, addresses
that are no multiple of their size, two threads at one place without a barrier between, lanes that
do not come to where all must, and reads past the caches (`ld.global.nc`) of what the same launch
writes. Beside that it counts what decides the speed: sectors of 32 bytes, shared memory's banks.

Where launches may overlap (`griddepcontrol`) it also watches that a kernel, before it has awaited
those ahead of it, writes nothing and reads nothing that any launch has written.

Float results are those of the ISA but for the last bit: ex2 is exact, a fused multiply-add rounds
twice. Threads run side by side, in arrays; a race is found by who touched what, not by luck.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import draws
import numpy as np
import ptx
from cuda_cases import Host, HostArray

Array = np.ndarray[Any, Any]
WARP = 32
BANKS = 32
SECTOR_BYTES = 32
MOST_SHARED_BYTES = 48 << 10
_AWAIT = ("griddepcontrol", "wait")
_NOBODY, _MANY = -1, -2
_THREADS = 4096
"""That run at a time: NumPy does many as fast as few."""


class Fault(Exception):
    """A kernel did what it may not; the message says which instruction, and what."""


@dataclass
class Counts:
    """What the first blocks of one kernel's launches have done."""

    instructions: int = 0
    """Of warps."""
    sectors: int = 0
    """Of global memory, that a warp's accesses touch."""
    sectors_needed: int = 0
    """Had their bytes lain side by side."""
    shared_passes: int = 0
    """Through shared memory: one where no two lanes want different words of a bank."""
    shared_accesses: int = 0


class _Touches:
    """For each byte: which thread of which block touched it, after how many barriers."""

    def __init__(self, size: int) -> None:
        self.who, self.block, self.epoch = (np.full(size, _NOBODY) for _ in range(3))

    def unordered(self, at: Array, by: tuple[Array, Array, Array]) -> bool:
        """Whether nothing orders one of these touches and what `by` does now."""
        me, block, epoch = by
        other = (self.block[at] != block) | ((self.epoch[at] == epoch) & (self.who[at] != me))
        return bool(((self.block[at] != _NOBODY) & other).any())

    def add(self, at: Array, by: tuple[Array, Array, Array]) -> bool:
        """Note them; whether two threads touch one byte at the same time."""
        me, block, epoch = by
        alone = (self.block[at] == _NOBODY) | (self.epoch[at] != epoch) | (self.who[at] == me)
        elsewhere = (self.block[at] != _NOBODY) & (self.block[at] != block)
        who, place = np.where(alone, me, _MANY), np.where(elsewhere, _MANY, block)
        self.who[at], self.block[at], self.epoch[at] = who, place, epoch
        twice = self.who[at] != who  # of lanes that meet, the last one stands there
        self.who[at[twice]] = _MANY
        self.block[at[self.block[at] != place]] = _MANY
        return bool(twice.any())


class Memory:
    """The bytes of one allocation, with what has happened to them."""

    def __init__(self, data: Array) -> None:
        self.data = data
        self.known = np.zeros(data.size, bool)
        """Which bytes have been written."""
        self._of_kernels = np.zeros(data.size, bool)
        self.forget()

    def forget(self) -> None:
        """A launch begins: all that came before is done."""
        self._reads, self._writes = _Touches(self.data.size), _Touches(self.data.size)

    def load(self, at: Array, by: tuple[Array, Array, Array], constant: bool, early: bool) -> Array:
        """The bytes at [threads, size]; nothing may write `constant` ones. Raises Fault.

        early: launches ahead may still run.
        """
        if early and self._of_kernels[at].any():
            raise Fault("reads what a launch ahead of it may not have written yet")
        if not self.known[at].all():
            raise Fault("reads what nothing has written")
        if constant and (self._writes.block[at] != _NOBODY).any():
            raise Fault("reads as constant what this launch has written")
        if self._writes.unordered(at, by):
            raise Fault("reads what another thread writes, no barrier between")
        self._reads.add(at, by)
        values: Array = self.data[at]
        return values

    def store(self, at: Array, by: tuple[Array, Array, Array], values: Array) -> None:
        """The bytes to [threads, size]. Raises Fault."""
        if self._writes.unordered(at, by):
            raise Fault("writes what another thread writes, no barrier between")
        if self._reads.unordered(at, by):
            raise Fault("writes what another thread reads, no barrier between")
        if self._writes.add(at, by):
            raise Fault("two threads write one place")
        self.data[at] = values
        self.known[at] = self._of_kernels[at] = True


class Card(Host):
    """Runs kernels over arrays in its memory."""

    def __init__(self, kernels: dict[str, ptx.Kernel]) -> None:
        self._kernels = kernels
        self.counts: dict[str, Counts] = defaultdict(Counts)
        """By kernel."""
        self._held: list[tuple[int, Memory]] = []

    def empty(self, count: int, kind: Any) -> HostArray:
        """Memory that nothing has written."""
        held = super().empty(count, kind)
        self._held.append((held.address, Memory(held.values.view(np.uint8))))
        return held

    def array(self, values: Any) -> HostArray:
        """A copy of an array."""
        held = super().array(values)
        self._held[-1][1].known[:] = True
        return held

    def launch(self, name: str, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """All blocks of one launch. Raises Fault, ptx.Unknown."""
        kernel = self._kernels[f"leangen_{name}"]
        if threads > kernel.most_threads or kernel.shared_bytes > MOST_SHARED_BYTES:
            raise Fault(
                f"{name}: {threads} threads and {kernel.shared_bytes} bytes of shared memory, "
                f"{kernel.most_threads} and {MOST_SHARED_BYTES} at most"
            )
        if threads % WARP:
            raise ptx.Unknown(f"{threads} threads, no multiple of {WARP}")
        if len(arguments) != len(kernel.parameters):
            raise Fault(f"{name}: {len(arguments)} arguments for {len(kernel.parameters)}")
        self._held.sort(key=lambda held: held[0])
        for _, memory in self._held:
            memory.forget()
        self._bases = np.array([base for base, _ in self._held], np.uint64)
        places = np.array(list(np.ndindex(*grid[::-1])))[:, ::-1]
        for first in range(0, len(places), max(1, _THREADS // threads)):
            some = places[first : first + max(1, _THREADS // threads)]
            counts = Counts() if first else self.counts[name]
            _Blocks(self, kernel, counts, first, some, threads).run(grid, arguments)

    def find(self, addresses: Array, size: int) -> Iterator[tuple[Memory, Array, Array]]:
        """Each allocation that some lie in, which of them, and where in it. Raises Fault."""
        which = np.searchsorted(self._bases, addresses, side="right") - 1
        for number in np.unique(which):
            if number < 0:
                raise Fault("an address below all memory")
            base, memory = self._held[int(number)]
            those = np.flatnonzero(which == number)
            at = (addresses[those] - np.uint64(base)).astype(np.int64)
            if at.max() + size > memory.data.size:
                raise Fault(f"{at.max() + size - memory.data.size} bytes past an array's end")
            yield memory, those, at


def _anything(kinds: dict[str, type], count: int) -> dict[str, Array]:
    """Registers that nobody has set."""
    rng = draws.rng()
    held = {}
    for kind in set(kinds.values()):
        names = [name for name, one in kinds.items() if one is kind]
        size = (len(names), count * np.dtype(kind).itemsize)
        values = np.frombuffer(rng.bytes(size[0] * size[1]), np.uint8).reshape(size).copy()
        values = values > 127 if kind is np.bool_ else values.view(kind)
        held.update(zip(names, values, strict=True))
    return held


class _Blocks:
    """The threads of some blocks: where each is, and the registers of all."""

    def __init__(
        self, card: Card, kernel: ptx.Kernel, counts: Counts, first: int, places: Array,
        threads: int,
    ) -> None:  # fmt: skip
        self._card, self._kernel, self._counts = card, kernel, counts
        self._threads, self._count = threads, threads * len(places)
        numbers = np.arange(self._count)
        self._block = first + numbers // threads
        self._epoch = np.zeros(self._count, np.int64)
        """How many barriers each has passed."""
        self._special = {"%tid.x": numbers % threads, "%ntid.x": np.full(self._count, threads)}
        for axis, at in zip("xyz", places.T, strict=True):
            self._special[f"%ctaid.{axis}"] = np.repeat(at, threads)
        self._awaits = any(one.parts == _AWAIT for one in kernel.code)
        self._awaited = np.zeros(self._count, bool)
        self._shared = Memory(np.zeros(kernel.shared_bytes * len(places), np.uint8))
        self._registers = _anything(kernel.registers, self._count)

    def run(self, grid: tuple[int, ...], arguments: Any) -> None:
        """Until all threads have returned. Raises Fault."""
        for axis, of in zip("xyz", grid, strict=True):
            self._special[f"%nctaid.{axis}"] = np.full(self._count, of)
        self._arguments = {
            name: np.array([value]).astype(ptx.DTYPES[kind])
            for (name, kind), value in zip(self._kernel.parameters.items(), arguments, strict=True)
        }
        self._at = np.zeros(self._count, np.int64)
        """Each thread's next instruction; past the last one when it has returned."""
        self._waits = np.zeros(self._count, bool)
        end = len(self._kernel.code)
        with np.errstate(all="ignore"):
            while (self._at < end).any():
                runs = ~self._waits & (self._at < end)
                if not runs.any():
                    self._pass_barriers()
                    continue
                # Who is behind goes on until it meets the others: where paths join, they join.
                here = self._at[runs].min()
                active = np.flatnonzero(runs & (self._at == here))
                others = self._at[runs & (self._at > here)]
                self._go(active, int(here), int(others.min()) if others.size else end)

    def _pass_barriers(self) -> None:
        """Where all threads of a block that have not returned wait at one."""
        at = self._at.reshape(-1, self._threads)
        end = len(self._kernel.code)
        first = at.min(1)
        together = ((at == first[:, None]) | (at == end)).all(1)
        code = self._kernel.code
        barrier = np.array([place < end and code[place].parts[0] == "bar" for place in first])
        if not (together & barrier).any():
            where = code[self._at[self._waits].min()].text
            count = self._waits.sum()
            raise Fault(
                f"{self._kernel.name}: {count} threads wait for others that never come: {where}"
            )
        released = np.repeat(together & barrier, self._threads) & (self._at < end)
        self._waits[released] = False
        self._at[released] += 1
        self._epoch[released] += 1

    def _go(self, active: Array, at: int, until: int) -> None:
        """From one instruction on while all `active` threads stay together and meet no other."""
        warps = len(np.unique(active[self._block[active] == 0] // WARP))
        while at < until:
            instruction = self._kernel.code[at]
            name = instruction.parts[0]
            if instruction.guard and name in ("ret", "bar", "shfl", "mma"):
                raise ptx.Unknown(instruction.text)
            if name == "bra":
                self._branch(instruction, active, at)
                return
            if name == "ret":
                if self._awaits and not self._awaited[active].all():
                    raise Fault(f"{self._kernel.name}: a thread returns and has awaited nothing")
                self._at[active] = len(self._kernel.code)
                return
            if name in ("bar", "shfl", "mma"):
                self._at[active] = at
                self._waits[active] = True
                whole = () if name == "bar" else self._whole_warps(at)
                if len(whole):
                    self._waits[whole] = False
                    self._meet(instruction, whole)
                    self._at[whole] = at + 1
                if len(whole) != len(active) or self._waits[active].any():
                    return
            else:
                lanes = active
                if instruction.guard:
                    lanes = active[self._chosen(instruction, active)]
                if lanes.size:
                    self._one(instruction, lanes)
            at += 1
            self._counts.instructions += warps
        self._at[active] = at

    def _branch(self, instruction: ptx.Instruction, active: Array, at: int) -> None:
        taken = np.ones(active.size, bool)
        if instruction.guard:
            taken = self._chosen(instruction, active)
        to = self._kernel.labels[str(instruction.operands[0])]
        self._at[active] = np.where(taken, to, at + 1)

    def _chosen(self, instruction: ptx.Instruction, lanes: Array) -> Array:
        held = self._registers[instruction.guard][lanes]
        return ~held if instruction.inverted else held

    def _whole_warps(self, at: int) -> Array:
        """The waiting threads here whose warps have all come."""
        here = (self._waits & (self._at == at)).reshape(-1, WARP)
        return np.flatnonzero(np.repeat(here.all(1), WARP))

    def _one(self, instruction: ptx.Instruction, lanes: Array) -> None:
        name = instruction.parts[0]
        try:
            if name == "griddepcontrol":
                self._awaited[lanes] |= instruction.parts == _AWAIT
            elif name == "ld" and instruction.parts[1] == "param":
                target, source = instruction.operands
                self._write(target, lanes, self._arguments[source.base])
            elif name in ("ld", "st"):
                self._touch(instruction, lanes)
            elif name == "mov" and any(isinstance(part, tuple) for part in instruction.operands):
                self._pack(instruction, lanes)
            else:
                self._compute(instruction, lanes)
        except Fault as fault:
            raise Fault(f"{self._kernel.name}: {instruction.text}: {fault}") from None

    def _compute(self, instruction: ptx.Instruction, lanes: Array) -> None:
        wide = instruction.parts[:2] == ("mul", "wide")
        f = ptx.COMPUTED.get("mul.wide" if wide else instruction.parts[0])
        if f is None or ptx.UNREAD & set(instruction.parts):
            raise ptx.Unknown(instruction.text)
        kinds = ptx.operand_kinds(instruction)
        values = [
            self._read(operand, lanes, kind)
            for operand, kind in zip(instruction.operands[1:], kinds, strict=True)
        ]
        self._write(instruction.operands[0], lanes, f(instruction, *values))

    def _read(self, operand: Any, lanes: Array, kind: np.dtype[Any]) -> Array:
        if isinstance(operand, ptx.Number):
            if operand.is_float:
                return np.full(lanes.size, operand.value, np.uint32).view(kind)
            return np.full(lanes.size, operand.value, np.int64).astype(kind)
        if operand in self._special:
            return self._special[operand][lanes].astype(kind)
        if operand in self._kernel.shared:
            return np.full(lanes.size, self._kernel.shared[operand], kind)
        return self._registers[operand][lanes].view(kind)

    def _write(self, operand: Any, lanes: Array, values: Array) -> None:
        held = self._registers[operand]
        if values.dtype.itemsize != held.dtype.itemsize:
            raise ptx.Unknown(f"{values.dtype} to {operand}, {held.dtype}")
        held[lanes] = values.view(held.dtype)

    def _pack(self, instruction: ptx.Instruction, lanes: Array) -> None:
        """Halves of a word to registers of their own, or back."""
        target, source = instruction.operands
        if isinstance(target, tuple):
            word = self._read(source, lanes, instruction.kind)
            for at, part in enumerate(target):
                self._write(part, lanes, (word >> np.uint32(16 * at)).astype(np.uint16))
        else:
            low, high = (
                self._read(part, lanes, np.dtype("u2")).astype(np.uint32) for part in source
            )
            self._write(target, lanes, low | high << np.uint32(16))

    def _touch(self, instruction: ptx.Instruction, lanes: Array) -> None:
        parts, operands = instruction.parts, instruction.operands
        loads = parts[0] == "ld"
        held, where = operands if loads else operands[::-1]
        registers = held if isinstance(held, tuple) else (held,)
        kind = instruction.kind
        size = kind.itemsize * len(registers)
        shared = parts[1] == "shared"
        addresses = self._addresses(where, lanes)
        if (addresses % np.uint64(size)).any():
            raise Fault(f"an address that is no multiple of {size}")
        if shared:
            places = self._in_shared(addresses, lanes, size)
        elif parts[1] == "global":
            places = self._card.find(addresses, size)
        else:
            raise ptx.Unknown(instruction.text)
        counted = self._block[lanes] == 0
        if counted.any():
            self._count_access(addresses[counted], lanes[counted], size, shared)
        me = self._block[0] * self._threads + lanes
        for memory, those, at in places:
            every = at[:, None] + np.arange(size)
            some = lanes[those]
            by = (me[those, None], self._block[some, None], self._epoch[some, None])
            early = not shared and self._awaits and not self._awaited[some].all()
            if loads:
                values = memory.load(every, by, constant="nc" in parts, early=early).view(kind)
                for number, register in enumerate(registers):
                    self._write(register, some, np.ascontiguousarray(values[:, number]))
            else:
                if early:
                    raise Fault("writes before the launches ahead of it are complete")
                columns = [self._stored(register, some, kind) for register in registers]
                memory.store(every, by, np.stack(columns, 1).view(np.uint8))

    def _in_shared(
        self, addresses: Array, lanes: Array, size: int
    ) -> Iterator[tuple[Memory, Array, Array]]:
        """As Card.find: each block has a part of its own."""
        each, at = self._kernel.shared_bytes, addresses.astype(np.int64)
        if at.max() + size > each:
            raise Fault("past the end of shared memory")
        yield self._shared, np.arange(lanes.size), at + lanes // self._threads * each

    def _addresses(self, where: ptx.Address, lanes: Array) -> Array:
        if where.base in self._kernel.shared:
            base = np.full(lanes.size, self._kernel.shared[where.base], np.uint64)
        else:
            base = self._registers[where.base][lanes].astype(np.uint64)
        return (base.view(np.int64) + where.offset).view(np.uint64)

    def _stored(self, operand: Any, lanes: Array, kind: np.dtype[Any]) -> Array:
        if isinstance(operand, ptx.Number):
            return self._read(operand, lanes, kind)
        held = self._registers[operand][lanes]
        return held.astype(f"u{kind.itemsize}")  # a byte of a word, say

    def _meet(self, instruction: ptx.Instruction, lanes: Array) -> None:
        """What takes all lanes of a warp, for whole warps."""
        warps = lanes.size // WARP
        operands = instruction.operands
        if instruction.parts[0] == "shfl":
            if instruction.parts[2:] != ("bfly", "b32") or operands[3:] != (
                ptx.Number(0x1F), ptx.Number(0xFFFFFFFF)
            ):  # fmt: skip
                raise ptx.Unknown(instruction.text)
            given = self._read(operands[1], lanes, np.dtype("u4")).reshape(warps, WARP)
            mask = self._read(operands[2], lanes, np.dtype("u4")).reshape(warps, WARP)
            source = np.arange(WARP) ^ mask.astype(np.int64)
            self._write(operands[0], lanes, np.take_along_axis(given, source, 1).ravel())
            return
        a, b, c = (
            np.stack([self._read(part, lanes, np.dtype("u4")) for part in many], 1)
            for many in operands[1:]
        )
        made = ptx.product(
            instruction, *(part.reshape(warps, WARP, -1) for part in (a, b, c))
        ).reshape(lanes.size, 4)
        for number, register in enumerate(operands[0]):
            self._write(register, lanes, np.ascontiguousarray(made[:, number]))

    def _count_access(self, addresses: Array, lanes: Array, size: int, shared: bool) -> None:
        warps = (lanes // WARP).astype(np.uint64)
        counts = self._counts
        if not shared:
            unit = np.uint64(SECTOR_BYTES)
            every = (addresses[:, None] + np.arange(size, dtype=np.uint64)) // unit
            key = (warps[:, None] << np.uint64(56)) | every
            counts.sectors += len(np.unique(key))
            for warp in np.unique(warps):
                asked = len(np.unique(addresses[warps == warp])) * size
                counts.sectors_needed += -(-asked // SECTOR_BYTES)
            return
        for warp in np.unique(warps):
            words = np.unique(addresses[warps == warp] // np.uint64(4))
            banks = np.bincount((words % np.uint64(BANKS)).astype(np.int64))
            counts.shared_passes += int(banks.max())
            counts.shared_accesses += 1
