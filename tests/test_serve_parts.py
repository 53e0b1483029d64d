"""The server's parts by themselves: the queue, holding back, settings."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leangen import clock
from leangen.errors import RequestError
from leangen.intensity import read_series
from leangen.serve import access, options, single
from leangen.serve.jobs import FairQueue, Job
from leangen.serve.options import Options
from leangen.serve.power import PowerCap, cleanest_delay_s
from leangen.serve.problems import OverloadError
from leangen.serve.room import TURN_S, Room


def job(client="a", priority=0, **more):
    return Job(request=None, tell=lambda event: None, client=client, priority=priority, **more)


def order(queue):
    taken = []
    while (next_job := queue.take(0)) is not None:
        taken.append(next_job)
    return taken


def test_clients_take_turns_and_priority_goes_first():
    queue = FairQueue(100)
    many = [job("many") for _ in range(4)]
    few = [job("few") for _ in range(2)]
    urgent = job("many", priority=-1)
    for entry in (*many, *few, urgent):
        queue.put(entry)
    assert order(queue) == [urgent, few[0], many[0], few[1], *many[1:]]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-2, 2)), max_size=30))
def test_every_job_is_served_once_in_the_order_of_priorities(entries):
    queue = FairQueue(100)
    jobs = [job(client, priority) for client, priority in entries]
    for entry in jobs:
        queue.put(entry)
    taken = order(queue)
    assert sorted(map(id, taken)) == sorted(map(id, jobs))
    assert [entry.priority for entry in taken] == sorted(entry.priority for entry in jobs)
    for client in "abc":
        for priority in range(-2, 3):
            mine = [j for j in taken if (j.client, j.priority) == (client, priority)]
            assert mine == [j for j in jobs if (j.client, j.priority) == (client, priority)]


def test_who_comes_later_does_not_take_all_turns():
    queue = FairQueue(100)
    for _ in range(5):
        queue.put(job("early"))
    for _ in range(3):
        queue.take(0)
    for _ in range(2):
        queue.put(job("late"))
    assert [entry.client for entry in order(queue)] == ["early", "late", "early", "late"]


def test_a_full_queue_and_what_waits_for_its_hour():
    queue = FairQueue(2)
    later = job(not_before_ns=500)
    queue.put(later)
    assert queue.take(499) is None
    assert queue.wakes_ns() == 500
    queue.put(job(deadline_ns=90))
    with pytest.raises(OverloadError, match="2 requests wait"):
        queue.put(job())
    assert queue.wakes_ns() == 0
    [gone] = queue.drop(100)
    assert gone.deadline_ns == 90
    assert queue.take(500) is later


class Guest:
    """A model with work to do, of 100 bytes."""

    memory_bytes, idle, last_used_ns = 100, False, 0

    def __init__(self):
        self.told = []

    def release(self):
        self.told.append("release")

    def nudge(self):
        self.told.append("nudge")


def test_a_model_whose_loading_outlasts_a_turn_has_its_turn_nevertheless(monkeypatch):
    now_ns = [0]
    monkeypatch.setattr(clock, "monotonic_ns", lambda: now_ns[0])
    first, second = Guest(), Guest()
    room = Room(150)
    assert room.enter(first)
    now_ns[0] += 60 * 10**9  # it is still being loaded
    assert not room.enter(second) and first.told == []
    room.loaded(first)
    assert not room.enter(second) and first.told == []
    now_ns[0] += int(TURN_S * 1e9)
    assert not room.enter(second) and first.told == ["release"]
    room.leave(first)
    assert second.told == ["nudge"] and room.enter(second)


def test_a_power_cap_holds_the_mean(monkeypatch):
    now_ns = [0]
    monkeypatch.setattr(clock, "monotonic_ns", lambda: now_ns[0])
    cap = PowerCap(10.0)
    energy_j = 0.0
    for _ in range(2000):  # steps of 10 ms at 40 W; 5 W while waiting
        now_ns[0] += 10_000_000
        energy_j += 0.4
        pause_s = cap.pause_s(int(energy_j * 1e6))
        assert 0 <= pause_s <= 1
        now_ns[0] += int(pause_s * 1e9)
        energy_j += 5 * pause_s
    seconds = now_ns[0] / 1e9
    assert energy_j / seconds == pytest.approx(10.0, rel=0.05)
    with pytest.raises(RequestError, match="expected more than 0"):
        PowerCap(0)


def test_what_can_wait_waits_for_the_cleanest_hour(tmp_path):
    path = tmp_path / "hours.csv"
    rows = [("00", 300), ("01", 200), ("02", 100), ("03", 250)]
    path.write_text("".join(f"2026-11-21T{hour}:00Z,{g}\n" for hour, g in rows))
    series = read_series(path)
    assert cleanest_delay_s(series, "2026-11-21T00:30:00Z", 86_400) == (5400, 100)
    assert cleanest_delay_s(series, "2026-11-21T00:30:00Z", 3600) == (1800, 200)
    assert cleanest_delay_s(series, "2026-11-21T02:10:00Z", 86_400) == (0, 100)
    with pytest.raises(RequestError, match="no carbon intensity"):
        cleanest_delay_s(series, "2026-11-21T09:00:00Z", 3600)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_an_answer_that_is_encoded_in_parts_is_json(content):
    assert json.loads(single._encoded(content)) == content


def test_settings_that_are_not_safe_are_refused(tmp_path):
    with pytest.raises(RequestError, match="give --api-key-file"):
        Options(models=["a"], host="0.0.0.0")
    with pytest.raises(RequestError, match="no model"):
        Options(models=[])
    with pytest.raises(RequestError, match="port is 70000"):
        Options(models=["a"], port=70000)
    assert Options(models=["a"], host="::1").local
    assert Options(models=["a"], host="0.0.0.0", api_key_file=tmp_path / "keys")
    for text in ("day", "day=5", "hour=5J", "day=-5J", "day=xJ"):
        with pytest.raises(RequestError, match="day=5000J or month=20g"):
            options.budget(text)
    assert options.budget("month=20g").unit == "gCO2e"
    for text in ("", "2TB", "x"):
        with pytest.raises(RequestError, match="2GB or 500MB"):
            options.size(text)


def test_a_key_file_must_hold_keys(tmp_path):
    path = tmp_path / "keys"
    with pytest.raises(RequestError, match="cannot read"):
        access.read_keys(path)
    path.write_text("# nothing\n")
    with pytest.raises(RequestError, match="holds no API key"):
        access.read_keys(path)
    path.write_text("ann:short\n")
    with pytest.raises(RequestError, match="line 1: a key has at least 16"):
        access.read_keys(path)
