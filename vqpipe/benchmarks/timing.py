"""Timing of several methods side by side in one process.

Each method is warmed up, then all are timed in interleaved rounds, in another order each round, so that other load of
the machine affects all alike. In a round `torch.utils.benchmark.Timer` repeats a method for ROUND_SECONDS, after calls
that are not counted: these refill the caches. Reported are the medians over the rounds of wall time and of CPU time
(user and system, all threads), and the peak of memory above what was allocated before.
"""

import gc
import importlib
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from ctypes import CDLL
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.benchmark import Timer

from vqpipe.errors import ConfigError
from vqpipe.progress import SILENT, Progress
from vqpipe.provenance import now, versions

ROUND_SECONDS = 0.5
"""A method is called for this long in each round, at least once."""
PROCESS = Path("/proc/self")
"""Linux reports, and resets, the peak memory of a process here; on other systems peaks are unknown."""


class Unavailable(Exception):
    """A method cannot be measured on this machine; the text is the reason."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How benchmarks are run."""

    device: torch.device
    rounds: int = 5
    method_seconds: float = 10.0
    """Seconds for all rounds of one method; a slower one takes part in fewer, at least in one."""
    memory: float = 8.0
    """10^9 bytes that a call may need; methods that need more are not measured."""
    quick: bool = False
    """Small sizes, for a first impression."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.memory <= 0:
            raise ConfigError(f"rounds = {self.rounds}, memory = {self.memory} GB", "Both are above 0")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One implementation of the task of a case."""

    name: str = ""
    """Empty until `available` sets it."""
    call: Callable[..., Any]
    version: str
    """Of the library, such as `faiss 1.15.1`."""
    exact: bool = True
    ours: bool = False
    baseline: str = ""
    """The method whose time is the unit of `ratio_wall` and `ratio_cpu`; empty: the first of ours."""
    note: str = ""


@dataclass
class Samples:
    """Seconds of a call of one method, a number per round, and the result of a call."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    seconds: float = 0.0
    """Seconds of the call whose memory was measured, after a first one."""
    peak_mb: float | None = None
    result: Any = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A measured method. Times are in milliseconds a call."""

    name: str
    version: str
    exact: bool
    """False for approximate methods."""
    ours: bool
    note: str
    rounds: int
    wall_ms: float
    """Median over the rounds, as `cpu_ms`."""
    wall_min_ms: float
    cpu_ms: float
    peak_mb: float | None
    """Peak of memory above what was allocated before, 10^6 bytes; None where the system does not report it."""
    rate: float | None
    """Units of the case per second of wall time; None where the time is lost in noise."""
    ratio_wall: float | None
    """Its wall time over that of the baseline: above 1, ours is faster. None without a baseline."""
    ratio_cpu: float | None
    same_ids: float | None = None
    """Share of the checked ids equal to those of a float64 search, 0..1; None where there are no ids."""
    extra: dict[str, float | None] = field(default_factory=dict)
    """Numbers of this subject alone, by name."""


@dataclass
class Case:
    """One task, timed for several methods."""

    title: str
    unit: str
    """Unit of `rate`."""
    settings: dict[str, Any]
    rows: list[Measurement] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    """Method -> the reason why it was not measured."""
    facts: dict[str, Any] = field(default_factory=dict)
    load: float | None = None
    """Load average of the machine before."""
    measured: str = field(default_factory=now)


class Clock:
    """A wall clock for `Timer` that waits for the GPU, and records the CPU time at each reading."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu: list[float] = []

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.cpu.append(self.cpu_time())
        return self.wall_time()

    def wall_time(self) -> float:
        return time.perf_counter()

    def cpu_time(self) -> float:
        return time.process_time()


def measure(
    methods: Sequence[Method],
    case: Case,
    settings: Settings,
    progress: Progress = SILENT,
    clock: type[Clock] = Clock,
) -> dict[str, Samples]:
    """Time `methods` in interleaved rounds.

    A peer that fails is left out, with the reason in `case.not_run`; an error of ours is raised.
    """
    case.load = os.getloadavg()[0]
    samples: dict[str, Samples] = {}
    for method in methods:
        progress.note(f"{case.title}: {method.name}")
        try:
            samples[method.name] = warm_up(method, clock(settings.device))
        except Exception as error:  # of any library
            if method.ours:
                raise
            case.not_run[method.name] = f"failed: {first_line(error)}"
    left = [method for method in methods if method.name in samples]
    for number in range(settings.rounds):
        for method in random.Random(number).sample(left, len(left)):
            its = samples[method.name]
            if number < num_rounds(its, settings):
                progress.note(f"{case.title}: {method.name}")
                wall, cpu = time_round(method, clock(settings.device))
                its.wall.append(wall)
                its.cpu.append(cpu)
    return samples


def warm_up(method: Method, clock: Clock) -> Samples:
    """A first call, then one whose time and peak memory are measured and whose result is kept."""
    with quiet(method):
        method.call()
        with peak_memory(clock.device) as peak:
            start = clock()
            result = method.call()
            seconds = clock() - start
    return Samples(seconds=seconds, peak_mb=peak(), result=result)


def time_round(method: Method, clock: Clock) -> tuple[float, float]:
    """Median seconds of wall time and of CPU time of a call in one round."""
    timer = Timer("call()", globals={"call": method.call}, timer=clock, num_threads=torch.get_num_threads())
    with quiet(method):
        measured = timer.blocked_autorange(min_run_time=ROUND_SECONDS)
    readings = clock.cpu[-2 * len(measured.raw_times) :]  # before and after each block
    cpu = statistics.median(end - start for start, end in zip(readings[::2], readings[1::2], strict=True))
    return measured.median, cpu / measured.number_per_run


def num_rounds(samples: Samples, settings: Settings) -> int:
    """The rounds of a method, by the time of its second call."""
    one_round = max(ROUND_SECONDS, 2 * samples.seconds)
    return max(1, min(settings.rounds, int(settings.method_seconds / one_round)))


@contextmanager
def quiet(method: Method) -> Iterator[None]:
    """Ignore warnings of peers."""
    with warnings.catch_warnings():
        if not method.ours:
            warnings.simplefilter("ignore")
        yield


def measurements(
    methods: Sequence[Method],
    samples: Mapping[str, Samples],
    settings: Settings,
    amount: float,
    same_ids: Callable[[Any], float] | None = None,
) -> list[Measurement]:
    """The rows of a case. `amount`: units of the case that a call does."""
    done = [method for method in methods if method.name in samples]
    ours = next((method.name for method in done if method.ours), "")
    rows = []
    for method in done:
        its, base = samples[method.name], samples.get(method.baseline or ours)
        wall, cpu = statistics.median(its.wall), statistics.median(its.cpu)
        slow = num_rounds(its, settings) < settings.rounds
        rows.append(
            Measurement(
                name=method.name,
                version=method.version,
                exact=method.exact,
                ours=method.ours,
                note="; ".join(filter(None, (method.note, "slow: fewer rounds" if slow else ""))),
                rounds=len(its.wall),
                wall_ms=1e3 * wall,
                wall_min_ms=1e3 * min(its.wall),
                cpu_ms=1e3 * cpu,
                peak_mb=its.peak_mb,
                rate=quotient(amount, wall),
                ratio_wall=quotient(wall, statistics.median(base.wall)) if base else None,
                ratio_cpu=quotient(cpu, statistics.median(base.cpu)) if base else None,
                same_ids=same_ids(its.result) if same_ids else None,
            )
        )
    return rows


def timed(
    ours: Sequence[Method],
    peers: Mapping[str, Callable[[], Method]],
    case: Case,
    settings: Settings,
    progress: Progress,
    amount: float,
    same_ids: Callable[[Any], float] | None = None,
) -> list[Measurement]:
    """The rows of a case: our methods, and the peers that can be measured here. For `amount` and `same_ids` see
    `measurements`."""
    methods = [*ours, *available(peers, case)]
    return measurements(methods, measure(methods, case, settings, progress), settings, amount, same_ids)


def available(makers: Mapping[str, Callable[[], Method]], case: Case) -> list[Method]:
    """The methods that can be measured on this machine, by their names here; the reasons of the others go into
    `case.not_run`."""
    methods = []
    for name, make in makers.items():
        try:
            methods.append(replace(make(), name=name))
        except Unavailable as reason:
            case.not_run[name] = str(reason)
    return methods


def need(module: str) -> ModuleType:
    """Import a module of a peer.

    Raises:
        Unavailable: it is not installed, or its import fails.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == name
        raise Unavailable(f"{name} is not installed" if absent else f"failed: {first_line(error)}") from None


def version_of(*packages: str) -> str:
    """`torch 2.9.0`: the first of these distributions that is installed."""
    return next((f"{package} {version}" for package, version in versions(packages).items()), "")


def quotient(a: float, b: float) -> float | None:
    """a / b; None unless both are above 0, as a difference of two times may not be."""
    return a / b if a > 0 and b > 0 else None


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of its message."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """Yield a callable that returns, after the block, its peak of memory above the start in 10^6 bytes, or None.

    On CUDA that of PyTorch's allocator; on Linux the kernel's high-water mark of resident memory.
    """
    peak: list[float | None] = [None]
    gc.collect(1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: peak[0]
        peak[0] = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        return
    start = reset_high_water()
    yield lambda: peak[0]
    if start is not None:
        peak[0] = max(0.0, (high_water() - start) / 1e6)


def reset_high_water() -> float | None:
    """Reset the high-water mark of resident memory to what is resident now, and return it in bytes; else None.

    Memory that the allocator keeps free is first returned to the system: a peak within it would not show.
    """
    with suppress(OSError, AttributeError):
        CDLL(None).malloc_trim(0)  # glibc
    try:
        (PROCESS / "clear_refs").write_text("5", encoding="utf-8")
        return high_water()
    except OSError:
        return None


def high_water() -> float:
    """Peak of resident memory in bytes."""
    lines = (PROCESS / "status").read_text(encoding="utf-8").splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
