"""How methods are timed, against clocks that the test sets."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from vqpipe.benchmarks import measure
from vqpipe.benchmarks.measure import Case, Method, Samples, Settings, Stopwatch, Unavailable
from vqpipe.errors import ConfigError

CPU = torch.device("cpu")


@dataclass
class FakeClock:
    """A clock that only the measured calls move; CPU time goes at twice the speed, as on two busy threads."""

    now: float = 0.0
    log: list[str] = field(default_factory=list)

    def method(self, name: str, *seconds: float, result: Any = None, **more: Any) -> Method:
        """A method whose calls take so long, one after another; the last number again once they are used up."""
        left = list(seconds)

        def call() -> Any:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return result

        return Method(name=name, call=call, **more)

    def stopwatch(self, **settings: Any) -> Stopwatch:
        return Stopwatch(Settings(device=CPU, **settings), wall=lambda: self.now, cpu=lambda: 2 * self.now, rest=0.0)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def case() -> Case:
    return Case(title="a case", unit="things", settings={})


def test_methods_take_turns_in_an_order_that_changes_from_round_to_round(clock: FakeClock, case: Case) -> None:
    methods = [clock.method(name, 1.0) for name in "abcd"]
    clock.stopwatch(rounds=8).measure(methods, case)
    rounds = ["".join(clock.log[first : first + 4]) for first in range(8, len(clock.log), 4)]
    assert clock.log[:8] == list("aabbccdd")
    assert [sorted(one) for one in rounds] == [list("abcd")] * 8
    assert len({one.index("a") for one in rounds}) > 2, "each method runs in several places, after several others"


def test_a_quick_method_is_called_several_times_in_its_turn_and_the_first_of_them_not_counted(
    clock: FakeClock, case: Case
) -> None:
    one_round = (9.0, 0.25, 0.125, 0.125)  # the first call after another method's is slow
    methods = [clock.method("quick", 1.0, 0.125, *one_round, *one_round, ours=True), clock.method("slow", 1.0)]
    samples = clock.stopwatch(rounds=2).measure(methods, case)
    assert samples["quick"].wall == [0.125, 0.125]
    assert clock.log[4:].count("quick") == 8
    assert clock.log[4:].count("slow") == 2


def test_medians_minima_ratios_and_rates_come_from_the_rounds_alone(clock: FakeClock, case: Case) -> None:
    ours = clock.method("ours", 50.0, 0.5, 2.0, 1.0, 9.0, ours=True)  # the first two calls are not counted
    peer = clock.method("peer", 99.0, 3.5, 4.0, 4.0, 6.0, exact=False, version="peer 1.0", note="a note")
    stopwatch = clock.stopwatch(rounds=3, patience=100.0)
    samples = stopwatch.measure([ours, peer], case)
    assert samples["ours"].wall == [2.0, 1.0, 9.0]
    assert (samples["peer"].first, samples["peer"].warm) == (99.0, 3.5)
    first, second = stopwatch.rows([ours, peer], samples, amount=10)
    assert (first.wall_ms, first.wall_min_ms, first.cpu_ms) == (2000.0, 1000.0, 4000.0)
    assert (first.rate, first.ratio_wall, first.rounds) == (5.0, 1.0, 3)
    assert (second.wall_ms, second.ratio_wall, second.ratio_cpu) == (4000.0, 2.0, 2.0)
    assert (second.exact, second.version, second.note, second.same_ids) == (False, "peer 1.0", "a note", None)


def test_a_slow_method_takes_part_in_fewer_rounds_and_says_so(clock: FakeClock, case: Case) -> None:
    methods = [clock.method("quick", 1.0, ours=True), clock.method("slow", 4.0), clock.method("endless", 30.0)]
    stopwatch = clock.stopwatch(rounds=5, patience=10.0)
    rows = stopwatch.rows(methods, stopwatch.measure(methods, case), 1)
    assert [row.rounds for row in rows] == [5, 2, 1]
    assert [row.note for row in rows] == ["", "slow: fewer rounds", "slow: fewer rounds"]


def test_what_is_measured_once_is_called_once(clock: FakeClock, case: Case) -> None:
    methods = [clock.method("a", 7.0, 1.0, ours=True), clock.method("b", 9.0, 1.0)]
    stopwatch = clock.stopwatch(rounds=5)
    rows = stopwatch.rows(methods, stopwatch.measure(methods, case, once=True), 1)
    assert clock.log == ["a", "b"]
    assert [(row.wall_ms, row.rounds, row.note) for row in rows] == [(7000.0, 1, ""), (9000.0, 1, "")]


def test_a_peer_that_fails_is_named_with_its_reason_and_ours_is_not_forgiven(clock: FakeClock, case: Case) -> None:
    def broken() -> None:
        raise RuntimeError("\nout of everything\nand more")

    good = clock.method("good", 1.0, ours=True)
    samples = clock.stopwatch(rounds=1).measure([good, Method(name="bad", call=broken)], case)
    assert list(samples) == ["good"]
    assert case.not_run == {"bad": "failed: RuntimeError: out of everything"}
    for kind in ({"ours": True}, {"probe": True}):
        with pytest.raises(RuntimeError, match="out of everything"):
            clock.stopwatch(rounds=1).measure([Method(name="bad", call=broken, **kind)], case)


def test_probes_have_no_row_and_a_baseline_can_be_named(clock: FakeClock, case: Case) -> None:
    methods = [
        clock.method("ours small", 1.0, ours=True),
        clock.method("ours large", 2.0, ours=True, baseline="ours large"),
        clock.method("peer large", 6.0, baseline="ours large"),
        clock.method("probe", 1.0, probe=True),
    ]
    stopwatch = clock.stopwatch(rounds=1)
    rows = stopwatch.rows(methods, stopwatch.measure(methods, case), 1)
    assert [(row.name, row.ratio_wall) for row in rows] == [
        ("ours small", 1.0),
        ("ours large", 1.0),
        ("peer large", 3.0),
    ]


def test_ids_are_judged_row_by_row_and_a_row_is_json(clock: FakeClock, case: Case) -> None:
    methods = [clock.method("right", 1.0, result=3, ours=True), clock.method("wrong", 1.0, result=4)]
    stopwatch = clock.stopwatch(rounds=1)
    case.rows = stopwatch.rows(methods, stopwatch.measure(methods, case), 1, lambda result: float(result == 3))
    assert [row.same_ids for row in case.rows] == [1.0, 0.0]
    assert json.loads(json.dumps(case.to_table(), allow_nan=False))["rows"][1]["name"] == "wrong"


def test_the_time_of_a_step_is_the_difference_of_two_runs() -> None:
    short, long = Samples(wall=[1.0, 2.0], cpu=[2.0, 2.0]), Samples(wall=[6.0, 12.0, 99.0], cpu=[12.0, 7.0], warm=3.0)
    step = long.minus(short, 5)
    assert (step.wall, step.cpu, step.warm) == ([1.0, 2.0], [2.0, 1.0], 3.0)
    assert measure.quotient(1.0, -0.1) is None  # a difference lost in noise is no ratio


def test_what_cannot_be_had_is_named_with_its_reason(case: Case) -> None:
    def absent() -> Method:
        measure.need("no_such_library_at_all.part")
        raise AssertionError

    def large() -> Method:
        measure.need_memory(26.2, Settings(device=CPU, memory=8.0), "N x K distances")
        raise AssertionError

    makers: dict[str, Callable[[], Method]] = {
        "absent": absent,
        "large": large,
        "here": lambda: Method(name="here", call=lambda: None),
    }
    assert [method.name for method in measure.offered(makers, case)] == ["here"]
    assert case.not_run == {
        "absent": "no_such_library_at_all is not installed",
        "large": "N x K distances take 26.2 GB, the budget is 8 GB",
    }


def test_a_library_that_is_there_and_broken_is_not_called_absent(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_a_library.py").write_text("import its_missing_part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match="failed: ModuleNotFoundError: No module named 'its_missing_part'"):
        measure.need("half_a_library")


@pytest.mark.skipif(measure.reset_high_water() is None, reason="this system does not tell a process's peak memory")
def test_peak_memory_sees_what_was_freed_again_and_not_what_was_held_before() -> None:
    held = np.ones(40_000_000, np.uint8)
    with measure.peak_memory(CPU) as peak:
        np.ones(100_000_000, np.uint8)
    assert 90 < (peak() or 0) < 130
    with measure.peak_memory(CPU) as nothing:
        held.sum()
    assert (nothing() or 0) < 20


def test_where_the_system_does_not_tell_the_peak_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(measure, "PROCESS", tmp_path / "absent")
    with measure.peak_memory(CPU) as peak:
        pass
    assert peak() is None


def test_settings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="rounds = 0"):
        Settings(device=CPU, rounds=0)


def test_the_machine_is_named() -> None:
    found = measure.machine(CPU)
    assert found["cpu"]
    assert found["threads"] == torch.get_num_threads()
    assert found["cpus"] >= 1
    assert "gpu" not in found
