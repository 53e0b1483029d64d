"""RAPL through perf events, with the system call replaced by pipes that hold counts."""

from __future__ import annotations

import os
import struct

import boards_at
import pytest

from leangen.meters import Meter, MeterFault, Unavailable, perf_event, rapl


class FakeKernel:
    """Opens events as pipes: what is pushed into one is what the next reads of it give."""

    def __init__(self, errors=None):
        self.opened = []
        self.errors = errors or {}
        self.writers = {}

    def __call__(self, attr, cpu):
        kind, size, config = struct.unpack_from("=IIQ", attr)
        assert size == len(attr) == 64
        assert not any(attr[16:])  # counting, nothing sampled, nothing excluded
        if config in self.errors:
            raise OSError(self.errors[config], os.strerror(self.errors[config]))
        self.opened.append((kind, config, cpu))
        reader, self.writers[config, cpu] = os.pipe()
        return reader

    def push(self, config, cpu, count):
        os.write(self.writers[config, cpu], struct.pack("=Q", count))

    def close(self):
        for fd in self.writers.values():
            os.close(fd)


@pytest.fixture
def kernel():
    fake = FakeKernel()
    yield fake
    fake.close()


def test_an_event_per_package_and_domain_with_the_kernels_scale(kernel):
    found = perf_event.open(boards_at.BOARDS / "server", opener=kernel)
    scopes = [meter.scope for meter in found]
    assert scopes == ["package-0", "package-1", "dram-0", "dram-1"]
    assert kernel.opened == [(9, 2, 0), (9, 2, 12), (9, 3, 0), (9, 3, 12)]
    package = found[1]
    kernel.push(2, 12, 0)
    kernel.push(2, 12, 3 << 32)  # the scale is 2^-32 J
    assert package.read().count == 0
    reading = package.read()
    assert (reading.count, reading.unit) == (3_000_000, "uJ")


def test_overlaps_and_classes_are_those_of_rapl(kernel):
    root = boards_at.BOARDS / "laptop"
    found = {meter.scope: meter for meter in perf_event.open(root, opener=kernel)}
    same = {meter.scope: meter for meter in rapl.open(root)}
    assert set(found) == set(same)
    for scope, meter in found.items():
        assert meter.in_total == same[scope].in_total
        assert meter.u_systematic == same[scope].u_systematic


def test_one_refused_event_is_named_with_its_remedy():
    kernel = FakeKernel(errors={3: 13})
    found = perf_event.open(boards_at.BOARDS / "server", opener=kernel)
    refused = [entry for entry in found if isinstance(entry, Unavailable)]
    assert [entry.sensor for entry in refused] == ["perf_event:dram-0", "perf_event:dram-1"]
    assert "Permission denied; perf_event_paranoid is 2" in refused[0].reason
    assert "kernel.perf_event_paranoid=0" in refused[0].remedy
    assert isinstance(found[0], Meter)
    kernel.close()


def test_an_event_that_ended_is_a_fault(kernel):
    meter = perf_event.open(boards_at.BOARDS / "amd-desktop", opener=kernel)[0]
    os.close(kernel.writers.pop((2, 0)))
    with pytest.raises(MeterFault, match="vanished"):
        meter.read()


def test_descriptors_are_closed_with_the_meter(kernel):
    found = perf_event.open(boards_at.BOARDS / "server", opener=kernel)
    writer = kernel.writers[2, 0]
    del found
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"x")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("energy-pkg", "umask=0x1"),
        ("energy-pkg", "event=zwei"),
        ("energy-pkg.scale", "0"),
        ("energy-pkg.scale", "a little"),
        ("energy-pkg.unit", "Watts"),
    ],
)
def test_an_event_that_is_not_understood_is_not_used(tmp_path, kernel, file, text):
    root = boards_at.copy("amd-desktop", tmp_path)
    boards_at.put(root, f"{perf_event.PMU}/events/{file}", text)
    [missing] = perf_event.open(root, opener=kernel)
    assert "cannot be understood" in missing.reason
    assert not kernel.opened


@pytest.mark.parametrize("mask", ["", "all", "0,,1"])
def test_a_strange_cpumask_opens_nothing(tmp_path, kernel, mask):
    root = boards_at.copy("amd-desktop", tmp_path)
    boards_at.put(root, f"{perf_event.PMU}/cpumask", mask)
    [missing] = perf_event.open(root, opener=kernel)
    assert isinstance(missing, Unavailable)
    assert not kernel.opened


def test_this_machine_answers():
    for entry in perf_event.open():
        if isinstance(entry, Meter):
            assert entry.read().count >= 0
        else:
            assert entry.reason
