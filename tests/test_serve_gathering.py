"""Jobs of one model run together by shape: same results, fewer runs, nobody harmed."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tiny_bundles

from leangen import families
from leangen.engine import Engine
from leangen.errors import RequestError
from leangen.serve.gathering import GatheringRunner
from leangen.serve.jobs import Job
from leangen.serve.runners import BY_SHAPE, SingleRunner, runner
from leangen.session import Session

REQUESTS = {
    "diffusion": [
        {"steps": 3, "seed": 1},
        {"steps": 3, "seed": 2, "conditions": {"wetness": 0.9}},
        {"steps": 2, "seed": 3, "count": 2},
        {"steps": 4, "seed": 4, "sampler": "heun"},
    ],
    "oneshot": [{"seed": 1}, {"seed": 2, "count": 3}, {"seed": 3}],
    "flow/density": [{"count": 5, "seed": 1}, {"count": 9, "seed": 2}, {"data": [[0.1, 0.2, 0.3]]}],
    "embedding": [{"prompt": "w1 w2"}, {"prompt": ["w3 w4", "w5"]}, {"prompt": "w6 w7 w8"}],
}


class Counting(Session):
    """Counts the runs of its graphs."""

    runs = 0

    def run(self, role, feeds, outputs=None):
        self.runs += 1
        return super().run(role, feeds, outputs)


@pytest.fixture(params=BY_SHAPE)
def engine(request, tmp_path):
    return Engine(Counting(tiny_bundles.BUILDERS[request.param](tmp_path), threads=1))


def job(engine, options):
    return Job(request=engine.family.Request(**options), tell=lambda event: None)


def outputs(running, jobs, steps=200):
    """Output or error of each job, and the steps that it was told of."""
    found, told = {}, {one: [] for one in jobs}
    for _ in range(steps):
        for gain in running.step():
            assert gain.busy_ns >= 0
            if gain.step is not None:
                told[gain.job].append(gain.step)
            if gain.output is not None or gain.error is not None:
                found[gain.job] = gain.output or gain.error
        if len(found) == len(jobs):
            break
    return [found[one] for one in jobs], [told[one] for one in jobs]


def test_together_they_give_what_each_gives_alone_in_fewer_runs(engine):
    options = REQUESTS[families.key(engine.bundle)]
    alone = []
    for each in options:
        single = SingleRunner(engine)
        single.add(one := job(engine, each))
        alone.append(outputs(single, [one]))
    runs_alone, engine.session.runs = engine.session.runs, 0
    running = runner(engine, rows=8, capacity=0)
    assert isinstance(running, GatheringRunner)
    jobs = [job(engine, each) for each in options]
    for one in jobs:
        running.add(one)
    assert running.room == 8 - len(jobs)
    together, told = outputs(running, jobs)
    for ([output], [steps]), ours, ours_told in zip(alone, together, told, strict=True):
        assert np.asarray(ours.array) == pytest.approx(np.asarray(output.array), abs=1e-5)
        assert [(s.kind, s.units) for s in ours_told] == [(s.kind, s.units) for s in steps]
    assert engine.session.runs < runs_alone
    assert running.room == 8
    assert not [t for t in threading.enumerate() if t.name == "leangen-strand"]


def test_a_request_that_is_refused_harms_no_other(tmp_path):
    engine = Engine(Counting(tiny_bundles.embedding(tmp_path), threads=1))
    jobs = [job(engine, {"prompt": text}) for text in ("w1 w2", "w1 " * 99, "w3 w4")]
    running = GatheringRunner(engine, rows=4)
    for one in jobs:
        running.add(one)
    (first, refused, last), _ = outputs(running, jobs)
    assert isinstance(refused, RequestError)
    assert first.array.shape == last.array.shape == (1, 64)


def test_a_job_may_leave_wherever_it_stands(tmp_path):
    engine = Engine(Counting(tiny_bundles.diffusion(tmp_path), threads=1))
    for after in range(6):
        stays, leaves = job(engine, {"steps": 3, "seed": 1}), job(engine, {"steps": 3, "seed": 2})
        running = GatheringRunner(engine, rows=4)
        running.add(stays)
        running.add(leaves)
        for _ in range(after):
            running.step()
        running.remove(leaves)
        running.remove(leaves)
        if running.room < 4:
            [output], _ = outputs(running, [stays])
            assert output.array.shape == (1, 8, 8, 1)
    assert not [t for t in threading.enumerate() if t.name == "leangen-strand"]


def test_a_graph_of_a_fixed_batch_is_run_for_each(tmp_path):
    text = """
    generator (float[1, 16] z) => (float[1, 1, 8, 8] y) {
        m = MatMul (z, w0)
        shape = Constant <value = int64[4] {1, 1, 8, 8}> ()
        y = Reshape (m, shape)
    }"""
    path = tiny_bundles._graph(text, tmp_path / "fixed.onnx", w0=(16, 64))
    bundle = tiny_bundles.onnx_file.export(path, tmp_path / "bundle", family="oneshot")
    engine = Engine(Counting(bundle, threads=1))
    running = GatheringRunner(engine, rows=4)
    jobs = [job(engine, {"seed": seed}) for seed in (1, 2)]
    for one in jobs:
        running.add(one)
    (first, second), _ = outputs(running, jobs)
    assert engine.session.runs == 2
    assert not np.array_equal(first.array, second.array)
