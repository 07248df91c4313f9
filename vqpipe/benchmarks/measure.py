"""How methods are timed: side by side, in one process, in turns.

All methods of a case are warmed up, then take a turn each per round, in another order each round, so that whatever else
the machine does falls on all alike. A quick method is called several times in its turn, and the first of these calls is
not counted: it pays for what the method before did to the caches. What is kept are medians of wall time and of CPU time
(user and system, all threads: what other processes disturb least), and the peak of memory above what was held before.
"""

import gc
import importlib
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from ctypes import CDLL
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vqpipe.device import available_bytes
from vqpipe.errors import ConfigError
from vqpipe.provenance import now

REST_SECONDS = 0.02
"""Before each turn: the OpenMP threads of the method before spin a little, on the bill of the next. Not between the
calls of a turn: a core that has slept takes 1 ms for a search of 64 vectors that takes it 0.07 ms when awake."""
TURN_SECONDS = 0.5
"""In each round of a method whose call takes less than half of that."""
TURN_CALLS = 20
"""In each round, at most."""
CALLS_BEFORE = 2
"""Of every method, not counted: one to warm up, one for memory and result."""
PROCESS = Path("/proc/self")
"""Linux tells, and resets, a process's peak memory here; elsewhere peaks stay unknown."""


class Unavailable(Exception):
    """A method cannot be measured here; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of doing what a case is about."""

    name: str
    call: Callable[..., Any]
    """Does it once. Whoever measures waits for the GPU."""
    version: str = ""
    """Of the library, "faiss 1.15.1"."""
    exact: bool = True
    """Whether it answers the question itself, or one nearby."""
    ours: bool = False
    baseline: str = ""
    """The method whose time is the unit of `ratio_*`; "": the first of ours."""
    probe: bool = False
    """No way of doing it, but a rate of the machine that is taken in the same rounds."""
    note: str = ""


@dataclass
class Samples:
    """What a call of one method took, in seconds, a number per round: the median of the calls in its turn."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    first: float = 0.0
    """Of the very first call, with whatever it compiles."""
    warm: float = 0.0
    """Of the second."""
    peak_mb: float | None = None
    result: Any = None
    """What the second call gave."""

    def minus(self, other: "Samples", steps: int) -> "Samples":
        """What a step took, where `other` made `steps` fewer of them in the same rounds."""
        wall, cpu = (
            [(long - short) / steps for long, short in zip(mine, its, strict=False)]
            for mine, its in ((self.wall, other.wall), (self.cpu, other.cpu))
        )
        return replace(self, wall=wall, cpu=cpu)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured method. Times are those of one call, in milliseconds."""

    name: str
    version: str
    exact: bool
    ours: bool
    note: str
    rounds: int
    wall_ms: float
    """Median over the rounds, as is `cpu_ms`."""
    wall_min_ms: float
    cpu_ms: float
    peak_mb: float | None
    """Peak of memory above what was held before, 10^6 bytes; None where the system does not tell."""
    rate: float | None
    """Of the case's unit, per second of wall time; None where a difference of two runs was lost in noise."""
    ratio_wall: float | None
    """Its wall time in units of ours: above 1, ours is faster. None where none of ours was measured."""
    ratio_cpu: float | None
    same_ids: float | None = None
    """Share of ids equal to those of a float64 search, 0..1; None where there are no ids."""
    extra: dict[str, float | str | None] = field(default_factory=dict)
    """What only this subject has, by name."""


@dataclass
class Case:
    """One question asked of several methods."""

    title: str
    unit: str
    """What `rate` counts."""
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    """Method -> why it was not measured."""
    facts: dict[str, Any] = field(default_factory=dict)
    load: float | None = None
    """Processes that wanted a CPU in the minute before, those of others included."""
    measured: str = field(default_factory=now)

    def to_table(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How benchmarks are run."""

    device: torch.device
    rounds: int = 5
    """Calls of each method that count."""
    patience: float = 10.0
    """Seconds that all rounds of one method may take; a slower one takes part in fewer, but in one."""
    memory: float = 8.0
    """10^9 bytes that a call may need; a method that needs more is left out, with that number."""
    quick: bool = False
    """Small sizes, for a look."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.memory <= 0:
            raise ConfigError(f"rounds = {self.rounds}, memory = {self.memory} GB", "Both are above 0")


@dataclass(frozen=True)
class Plan:
    """A case to measure: its title, how many methods it has at most, and what measures it."""

    title: str
    methods: int
    run: Callable[["Stopwatch"], Case]


class Stopwatch:
    """Times calls. `on_call` hears the name of each method before each of its turns; a test gives the clocks."""

    def __init__(
        self,
        settings: Settings,
        on_call: Callable[[str], None] = lambda name: None,
        wall: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = time.process_time,
        rest: float = REST_SECONDS,
    ) -> None:
        self.settings, self.on_call = settings, on_call
        self.wall, self.cpu, self.rest = wall, cpu, rest

    def measure(self, methods: Sequence[Method], case: Case, once: bool = False) -> dict[str, Samples]:
        """Time `methods` in turns; `once`: each in one call, cold, for what takes long.

        A peer that fails is left out, and `case.not_run` says why. What ours or a probe raises is raised.
        """
        case.load = os.getloadavg()[0]
        samples: dict[str, Samples] = {}
        for method in methods:
            try:
                samples[method.name] = self.cold(method) if once else self.warm_up(method)
            except Exception as error:  # peers raise what they like; the report says what it was
                if method.ours or method.probe:
                    raise
                case.not_run[method.name] = f"failed: {first_line(error)}"
        left = [method for method in methods if method.name in samples]
        for number in range(0 if once else self.settings.rounds):
            for method in random.Random(number).sample(left, len(left)):
                its = samples[method.name]
                if number < self.rounds_of(its):
                    wall, cpu = self.turn(method, its.warm)
                    its.wall.append(wall)
                    its.cpu.append(cpu)
        return samples

    def turn(self, method: Method, usual: float) -> tuple[float, float]:
        """One round's seconds of wall time and of CPU time, for a method whose call usually takes so many seconds."""
        self.begin(method)
        counted = int(min(TURN_SECONDS / max(usual, 1e-9), TURN_CALLS)) - 1
        if counted < 1:
            return self.time(method)[:2]
        self.time(method)
        wall, cpu, _ = zip(*(self.time(method) for _ in range(counted)), strict=True)
        return statistics.median(wall), statistics.median(cpu)

    def warm_up(self, method: Method) -> Samples:
        """The first call, then one whose memory is watched and whose result is kept."""
        self.begin(method)
        first, _, result = self.time(method)
        del result  # its memory is to be asked for again
        self.begin(method)
        with peak_memory(self.settings.device) as peak:
            warm, _, result = self.time(method)
        return Samples(first=first, warm=warm, peak_mb=peak(), result=result)

    def cold(self, method: Method) -> Samples:
        """One call, which is timed and watched."""
        self.begin(method)
        with peak_memory(self.settings.device) as peak:
            wall, cpu, result = self.time(method)
        return Samples([wall], [cpu], first=wall, warm=0.0, peak_mb=peak(), result=result)

    def rounds_of(self, samples: Samples) -> int:
        """How many rounds a method takes part in, by what its second call took."""
        return max(1, min(self.settings.rounds, int(self.settings.patience / max(samples.warm, 1e-9))))

    def begin(self, method: Method) -> None:
        self.on_call(method.name)
        time.sleep(self.rest)

    def time(self, method: Method) -> tuple[float, float, Any]:
        """One call: seconds of wall time, seconds of CPU time, and its result."""
        with warnings.catch_warnings():
            if not method.ours:
                warnings.simplefilter("ignore")  # what peers warn of, is not for whoever reads their times
            self.wait()
            cpu, wall = self.cpu(), self.wall()
            result = method.call()
            self.wait()
            return self.wall() - wall, self.cpu() - cpu, result

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if self.settings.device.type == "cuda":
            torch.cuda.synchronize(self.settings.device)

    def rows(
        self,
        methods: Sequence[Method],
        samples: Mapping[str, Samples],
        amount: float,
        same_ids: Callable[[Any], float] | None = None,
    ) -> list[Row]:
        """The rows of a case's methods, probes left out. `amount`: how much of the case's unit a call does."""
        done = [method for method in methods if method.name in samples and not method.probe]
        first_of_ours = next((method.name for method in done if method.ours), "")
        rows = []
        for method in done:
            its, base = samples[method.name], samples.get(method.baseline or first_of_ours)
            wall, cpu = statistics.median(its.wall), statistics.median(its.cpu)
            slower = self.rounds_of(its) < self.settings.rounds
            rows.append(
                Row(
                    name=method.name,
                    version=method.version,
                    exact=method.exact,
                    ours=method.ours,
                    note="; ".join(filter(None, (method.note, "slow: fewer rounds" if slower else ""))),
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


def offered(makers: Mapping[str, Callable[[], Method]], case: Case) -> list[Method]:
    """What the makers make, in order; one that cannot be measured here goes into `case.not_run` with its reason."""
    methods = []
    for name, make in makers.items():
        try:
            methods.append(make())
        except Unavailable as reason:
            case.not_run[name] = str(reason)
    return methods


def need(module: str) -> ModuleType:
    """Import a peer's module.

    Raises:
        Unavailable: it is not installed, or its import fails.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == name
        raise Unavailable(f"{name} is not installed" if absent else f"failed: {first_line(error)}") from None


def need_memory(gigabytes: float, settings: Settings, what: str) -> None:
    """Raise Unavailable where a call would need more than the budget; `what` fills so many 10^9 bytes."""
    if gigabytes > settings.memory:
        raise Unavailable(f"{what} take {gigabytes:.3g} GB, the budget is {settings.memory:.3g} GB")


def version_of(*packages: str) -> str:
    """ "torch 2.9.0": the first of these distributions that is installed."""
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            return f"{package} {metadata.version(package)}"
    return ""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """Inside, memory is watched; afterwards the callable tells the peak above the start, in 10^6 bytes, or None.

    On CUDA that of PyTorch's allocator; on Linux the kernel's own high-water mark of resident memory, which misses no
    short peak as samples would.
    """
    gc.collect(1)  # what calls just left behind; a look at every object of every library takes a second
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        peak: list[float | None] = [None]
        yield lambda: peak[0]
        peak[0] = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        return
    peak = [None]
    start = reset_high_water()
    yield lambda: peak[0]
    if start is not None:
        peak[0] = max(0.0, (high_water() - start) / 1e6)


def reset_high_water() -> float | None:
    """Set the high-water mark of resident memory back to what is resident now, and return that in bytes; else None.

    Free memory that the allocator holds back goes to the system first: a peak inside it would not show.
    """
    with suppress(OSError, AttributeError):
        CDLL(None).malloc_trim(0)  # of glibc; others keep little
    try:
        (PROCESS / "clear_refs").write_text("5", encoding="utf-8")
        return high_water()
    except OSError:
        return None


def high_water() -> float:
    """Bytes of resident memory at most so far."""
    lines = (PROCESS / "status").read_text(encoding="utf-8").splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def available_memory(device: torch.device) -> float:
    """10^9 bytes that a process may still take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    return available_bytes() / 1e9


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
    return found


def cpu_name() -> str:
    """The processor's model name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def quotient(a: float, b: float) -> float | None:
    """a / b, or None where one of them is no time at all."""
    return a / b if a > 0 and b > 0 else None


def first_line(error: BaseException) -> str:
    """An error for a table: its class, and the first line of what it says."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
