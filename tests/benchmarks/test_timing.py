"""How methods are timed, with clocks that the test sets."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vqpipe.benchmarks import timing
from vqpipe.benchmarks.timing import Case, Clock, Method, Settings, Unavailable
from vqpipe.errors import ConfigError

CPU = torch.device("cpu")


@dataclass
class Script:
    """A clock that only the timed calls advance; CPU time runs at twice the speed, as on two busy threads."""

    now: float = 0.0
    log: list[str] = field(default_factory=list)

    def method(self, name: str, *seconds: float, result: Any = None, **more: Any) -> Method:
        """A method whose calls take so long, one after another; the last number is repeated."""
        left = list(seconds)

        def call() -> Any:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return result

        return Method(name=name, call=call, version="1", **more)

    def clock(self) -> type[Clock]:
        script = self

        class ScriptClock(Clock):
            def wall_time(self) -> float:
                return script.now

            def cpu_time(self) -> float:
                return 2 * script.now

        return ScriptClock

    def rows(self, methods: list[Method], case: Case, amount: float = 1, **settings: Any) -> list[timing.Measurement]:
        how = Settings(device=CPU, **settings)
        samples = timing.measure(methods, case, how, clock=self.clock())
        return timing.measurements(methods, samples, how, amount)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def case() -> Case:
    return Case(title="a case", unit="things", settings={})


def test_methods_are_interleaved_in_another_order_each_round(script: Script, case: Case) -> None:
    script.rows([script.method(name, 1.0) for name in "abcd"], case, rounds=8, method_seconds=100.0)
    assert script.log[:8] == list("aabbccdd")
    calls = script.log[8::2]  # in each round a call that is not counted, and one that is
    rounds = ["".join(calls[first : first + 4]) for first in range(0, len(calls), 4)]
    assert [sorted(one) for one in rounds] == [list("abcd")] * 8
    assert len({one.index("a") for one in rounds}) > 2


def test_a_fast_method_is_repeated_in_a_round_after_calls_that_are_not_counted(script: Script, case: Case) -> None:
    one_round = (9.0, 0.25, 0.125, 0.125)  # the first call after another method is slow
    methods = [script.method("fast", 1.0, 0.125, *one_round, *one_round, 0.125, ours=True), script.method("slow", 1.0)]
    samples = timing.measure(methods, case, Settings(device=CPU, rounds=2), clock=script.clock())
    assert samples["fast"].wall == [0.125, 0.125]
    assert script.log[4:].count("fast") == 8
    assert script.log[4:].count("slow") == 4


def test_medians_minima_ratios_and_rates_are_those_of_the_rounds(script: Script, case: Case) -> None:
    ours = script.method("ours", 50.0, 0.5, 7.0, 2.0, 7.0, 1.0, 7.0, 9.0, ours=True)  # every other call counts
    peer = script.method("peer", 99.0, 3.5, 7.0, 4.0, 7.0, 4.0, 7.0, 6.0, exact=False, note="a note")
    first, second = script.rows([ours, peer], case, amount=10, rounds=3, method_seconds=100.0)
    assert (first.wall_ms, first.wall_min_ms, first.cpu_ms) == (2000.0, 1000.0, 4000.0)
    assert (first.rate, first.ratio_wall, first.rounds) == (5.0, 1.0, 3)
    assert (second.wall_ms, second.ratio_wall, second.ratio_cpu) == (4000.0, 2.0, 2.0)
    assert (second.exact, second.version, second.note, second.same_ids) == (False, "1", "a note", None)


def test_a_slow_method_takes_part_in_fewer_rounds(script: Script, case: Case) -> None:
    methods = [script.method("fast", 1.0, ours=True), script.method("slow", 2.0), script.method("slowest", 30.0)]
    rows = script.rows(methods, case, rounds=5, method_seconds=10.0)
    assert [row.rounds for row in rows] == [5, 2, 1]
    assert [row.note for row in rows] == ["", "slow: fewer rounds", "slow: fewer rounds"]


def test_a_failing_peer_is_listed_with_its_reason_and_a_failure_of_ours_is_raised(script: Script, case: Case) -> None:
    def broken() -> None:
        raise RuntimeError("\nout of everything\nand more")

    good, bad = script.method("good", 1.0, ours=True), Method(name="bad", call=broken, version="1")
    assert [row.name for row in script.rows([good, bad], case, rounds=1)] == ["good"]
    assert case.not_run == {"bad": "failed: RuntimeError: out of everything"}
    with pytest.raises(RuntimeError, match="out of everything"):
        script.rows([Method(name="bad", call=broken, version="1", ours=True)], case, rounds=1)


def test_a_method_can_have_a_baseline_of_its_own(script: Script, case: Case) -> None:
    methods = [
        script.method("ours small", 1.0, ours=True),
        script.method("ours large", 2.0, ours=True, baseline="ours large"),
        script.method("peer large", 6.0, baseline="ours large"),
    ]
    rows = script.rows(methods, case, rounds=1)
    assert [(row.name, row.ratio_wall) for row in rows] == [
        ("ours small", 1.0),
        ("ours large", 1.0),
        ("peer large", 3.0),
    ]


def test_rows_hold_the_share_of_equal_ids_and_are_json(script: Script, case: Case) -> None:
    methods = [script.method("right", 1.0, result=3, ours=True), script.method("wrong", 1.0, result=4)]
    settings = Settings(device=CPU, rounds=1)
    samples = timing.measure(methods, case, settings, clock=script.clock())
    case.rows = timing.measurements(methods, samples, settings, 1, lambda result: float(result == 3))
    assert [row.same_ids for row in case.rows] == [1.0, 0.0]
    assert json.loads(json.dumps(asdict(case), allow_nan=False))["rows"][1]["name"] == "wrong"


def test_methods_that_are_unavailable_are_listed_with_the_reason(case: Case) -> None:
    def absent() -> Method:
        timing.need("no_such_library_at_all.part")
        raise AssertionError

    makers: dict[str, Callable[[], Method]] = {
        "absent": absent,
        "here": lambda: Method(call=lambda: None, version="1"),
    }
    assert [method.name for method in timing.available(makers, case)] == ["here"]
    assert case.not_run == {"absent": "no_such_library_at_all is not installed"}


def test_a_broken_library_is_not_reported_as_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_a_library.py").write_text("import its_missing_part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match="failed: ModuleNotFoundError: No module named 'its_missing_part'"):
        timing.need("half_a_library")


@pytest.mark.skipif(timing.reset_high_water() is None, reason="this system does not report peak memory")
def test_peak_memory_includes_what_was_freed_and_excludes_what_was_allocated_before() -> None:
    held = np.ones(40_000_000, np.uint8)
    with timing.peak_memory(CPU) as peak:
        np.ones(100_000_000, np.uint8)
    assert 90 < (peak() or 0) < 130
    with timing.peak_memory(CPU) as nothing:
        held.sum()
    assert (nothing() or 0) < 20


def test_peak_memory_is_none_where_the_system_does_not_report_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timing, "PROCESS", tmp_path / "absent")
    with timing.peak_memory(CPU) as peak:
        pass
    assert peak() is None


def test_settings_without_rounds_are_an_error() -> None:
    with pytest.raises(ConfigError, match="rounds = 0"):
        Settings(device=CPU, rounds=0)
