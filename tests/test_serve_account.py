"""The account: shares are exact, whatever the schedule, and go to who computed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leangen import clock
from leangen.meters.meter import Meter, MeterFault, Selection, Tick
from leangen.records import Reading
from leangen.serve import account as accounts
from leangen.serve.account import Account


class World:
    """Time that passes when told, and counters that gain what is told."""

    def __init__(self, monkeypatch, meters=1):
        self.now_ns = 1_000_000_000
        self.counts = [0] * meters
        self.fault = None
        monkeypatch.setattr(clock, "monotonic_ns", lambda: self.now_ns)
        monkeypatch.setattr(clock, "boottime_ns", lambda: self.now_ns)
        monkeypatch.setattr(accounts, "STRETCH_S", 0.0)
        self.account = Account(
            Selection(meters=tuple(self._meter(index) for index in range(meters)), reason=None)
        )

    def _meter(self, index):
        def read():
            if self.fault == index:
                raise MeterFault("vanished")
            return Reading(self.counts[index], "uJ", self.now_ns)

        return Meter(
            name=f"sim:{index}",
            source="measured",
            scope=f"package-{index}",
            in_total=True,
            unit="uJ",
            tick=Tick(1e-6, "given"),
            u_systematic=0.05,
            max_power_w=1e9,
            wraps_at=None,
            coverage=1.0,
            read=read,
        )

    def passes(self, ms, *energies_uj):
        self.now_ns += int(ms * 1e6)
        for index, energy_uj in enumerate(energies_uj):
            self.counts[index] += energy_uj


@pytest.mark.parametrize("seed", range(20))
def test_shares_sum_to_the_total_over_random_schedules(monkeypatch, seed):
    rng = random.Random(seed)
    for _ in range(25):
        world = World(monkeypatch, meters=rng.choice([1, 2]))
        account = world.account
        workers = [account.worker() for _ in range(rng.choice([1, 1, 2, 3]))]
        open_tabs = {worker: [] for worker in workers}
        stepping = {}
        billed = 0
        for _ in range(rng.randrange(60)):
            worker = rng.choice(workers)
            world.passes(
                rng.choice([0, 0.01, 1, 7.3]), *(rng.randrange(100_000) for _ in world.counts)
            )
            if worker in stepping:
                tabs = stepping.pop(worker)
                account.end_step(worker, {tab: rng.randrange(5_000_000) for tab in tabs})
            elif open_tabs[worker] and rng.random() < 0.3:
                tab = open_tabs[worker].pop(rng.randrange(len(open_tabs[worker])))
                billed += sum(window.energy_uj or 0 for window in account.close(tab).windows)
            elif open_tabs[worker] and rng.random() < 0.7:
                account.begin_step(worker)
                stepping[worker] = list(open_tabs[worker])
            else:
                open_tabs[worker].append(account.open())
        for worker, tabs in open_tabs.items():
            if worker in stepping:
                account.end_step(worker, dict.fromkeys(tabs, 1))
            for tab in tabs:
                billed += sum(window.energy_uj or 0 for window in account.close(tab).windows)
        assert billed == account.billed_uj
        assert billed + account.unattributed_uj == account.total_uj
        assert account.unattributed_uj >= 0
        assert account.total_uj <= sum(world.counts)


@given(
    works=st.lists(st.integers(1, 10**9), min_size=1, max_size=8),
    energy_uj=st.integers(1, 10**12),
)
@settings(max_examples=50)
def test_a_stretch_goes_by_computing_time(works, energy_uj):
    with pytest.MonkeyPatch.context() as patch:
        world = World(patch)
        account = world.account
        worker = account.worker()
        tabs = [account.open() for _ in works]
        account.begin_step(worker)
        world.passes(10, energy_uj)
        account.end_step(worker, dict(zip(tabs, works, strict=True)))
        bills = [account.close(tab) for tab in tabs]
    assert sum(bill.windows[0].energy_uj for bill in bills) == energy_uj == account.total_uj
    assert account.unattributed_uj == 0
    for bill, work in zip(bills, works, strict=True):
        assert bill.windows[0].energy_uj == pytest.approx(energy_uj * work / sum(works), abs=1)
        assert bill.own_ns == pytest.approx(10e6 * work / sum(works), abs=1)
        assert bill.company == len(works) - 1


def test_two_models_share_by_the_time_that_each_computes(monkeypatch):
    """One worker's long step is still under way when the other's short ones are shared."""
    world = World(monkeypatch)
    account = world.account
    slow, quick = account.worker(), account.worker()
    picture, text = account.open(), account.open()
    account.begin_step(slow)
    for _ in range(10):
        account.begin_step(quick)
        world.passes(10, 1000)
        account.end_step(quick, {text: 10_000_000})
    account.end_step(slow, {picture: 100_000_000})
    assert account.close(text).windows[0].energy_uj == 5000
    assert account.close(picture).windows[0].energy_uj == 5000


def test_each_stretch_goes_by_its_own_work(monkeypatch):
    world = World(monkeypatch)
    account = world.account
    worker = account.worker()
    early, late = account.open(), account.open()
    for tab, energy_uj in ((early, 1000), (late, 3000)):
        account.begin_step(worker)
        world.passes(10, energy_uj)
        account.end_step(worker, {tab: 5})
    assert account.close(early).windows[0].energy_uj == 1000
    assert account.close(late).windows[0].energy_uj == 3000


def test_a_step_under_way_keeps_its_part_for_its_end(monkeypatch):
    world = World(monkeypatch)
    account = world.account
    monkeypatch.setattr(accounts, "STRETCH_S", 0.015)
    worker = account.worker()
    first, second = account.open(), account.open()
    account.begin_step(worker)
    world.passes(10, 1000)
    account.end_step(worker, {first: 10})  # too soon to look at the meters
    account.begin_step(worker)
    world.passes(10, 1000)
    third = account.open()  # looks, in the middle of the second step
    world.passes(10, 1000)
    account.end_step(worker, {second: 20})
    bills = [account.close(tab).windows[0].energy_uj or 0 for tab in (first, second, third)]
    assert bills == [1000, 2000, 0]


def test_a_request_alone_gets_all_and_idle_time_is_nobodys(monkeypatch):
    world = World(monkeypatch)
    account = world.account
    worker = account.worker()
    world.passes(1000, 999)
    tab = account.open()
    account.begin_step(worker)
    world.passes(10, 4000)
    account.end_step(worker, {tab: 1})
    world.passes(5, 500)  # waiting for the next step is the request's, too
    account.begin_step(worker)
    world.passes(10, 4000)
    account.end_step(worker, {tab: 1})
    bill = account.close(tab)
    assert bill.windows[0].energy_uj == 8500
    assert bill.company == 0
    assert bill.own_ns == bill.duration_ns == 25_000_000
    world.passes(1000, 999)
    assert account.total_uj == 8500
    assert account.power_w == 0


def test_uncertainty_is_shared_as_the_energy_is(monkeypatch):
    world = World(monkeypatch)
    account = world.account
    worker = account.worker()
    tabs = [account.open(), account.open()]
    account.begin_step(worker)
    world.passes(10, 1_000_000)
    account.end_step(worker, {tabs[0]: 3, tabs[1]: 1})
    most, least = (account.close(tab).windows[0] for tab in tabs)
    assert most.u_systematic_j == pytest.approx(0.05 * 0.75, rel=1e-3)
    assert least.u_systematic_j == pytest.approx(0.05 * 0.25, rel=1e-3)
    assert most.u_random_j == pytest.approx(3 * least.u_random_j)


def test_who_was_there_when_a_meter_failed_has_no_figure(monkeypatch):
    world = World(monkeypatch, meters=2)
    account = world.account
    worker = account.worker()
    first = account.open()
    account.begin_step(worker)
    world.passes(10, 100, 100)
    world.fault = 1
    account.end_step(worker, {first: 1})
    bill = account.close(first)
    assert bill.windows[0].energy_uj == 100
    assert bill.windows[1].energy_uj is None
    assert bill.windows[1].faults == ("vanished",)
    world.fault = None
    later = account.open()
    account.begin_step(worker)
    world.passes(10, 70, 80)
    account.end_step(worker, {later: 1})
    assert [window.energy_uj for window in account.close(later).windows] == [70, 80]
    assert account.unattributed_uj == 0
