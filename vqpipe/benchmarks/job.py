"""The benchmark job: measures the cases of each subject, and publishes their report."""

import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vqpipe.artifacts import Artifact, Draft
from vqpipe.benchmarks import generation, kmeans, loading, quantizer, search, step_and_encode
from vqpipe.benchmarks.timing import Case, Settings
from vqpipe.config import nearest_name
from vqpipe.device import available_bytes
from vqpipe.errors import ConfigError
from vqpipe.generation.train import GeneratorRecipe
from vqpipe.progress import SILENT, Progress
from vqpipe.provenance import git_commit, versions
from vqpipe.reports import page
from vqpipe.reports.benchmark import SUBJECTS, benchmark_page, facts_of
from vqpipe.training.tokenizer_run import TokenizerRecipe

PACKAGES = (
    *("vqpipe", "torch", "numpy", "faiss-gpu", "faiss-cpu", "scikit-learn"),
    *("triton", "flash-kmeans", "vector-quantize-pytorch"),
)
"""Packages whose versions the numbers depend on."""
PRESET = "smoke"
CUDA_PRESETS = ("vqgan-lc-f16-100k", "mgvq-f16-g4")
"""Presets of tokenizers whose training step is measured; the first also encodes, and decodes a generator's samples."""
GENERATOR, CUDA_GENERATOR = "gpt-tiny", "gpt-404m"
"""Presets of the generator."""
MAX_MEMORY = 8.0
"""Default budget on a CPU, 10^9 bytes; less where less than twice that is free."""
BUSY = 0.5
"""Load per CPU from which a warning is given."""


def parse_subjects(what: str) -> list[str]:
    """The subjects of a list with commas, each once, in the order of SUBJECTS.

    Raises:
        ConfigError: an unknown subject, or none.
    """
    named = [name.strip() for name in what.split(",") if name.strip()]
    if not named:
        raise ConfigError("--what names nothing to measure", f"Known: {', '.join(SUBJECTS)}")
    for name in named:
        if name not in SUBJECTS:
            hint = nearest_name(name, SUBJECTS)
            known = "" if hint.startswith("Known") else f" Known: {', '.join(SUBJECTS)}"
            raise ConfigError(f"--what {name} is unknown", hint + known)
    return [name for name in SUBJECTS if name in named]


def free_memory(device: torch.device) -> float:
    """The default of `Settings.memory`: 10^9 bytes that a call may need on this device."""
    if device.type == "cuda":
        return round(0.8 * torch.cuda.mem_get_info(device)[0] / 1e9, 1)
    return round(min(MAX_MEMORY, 0.5 * available_bytes() / 1e9), 1) or 0.1


def presets_of(settings: Settings) -> tuple[tuple[str, ...], str]:
    """The presets of tokenizers to measure, and that of the generator."""
    full = settings.device.type == "cuda" and not settings.quick
    return (CUDA_PRESETS, CUDA_GENERATOR) if full else ((PRESET,), GENERATOR)


def request(subjects: Sequence[str], settings: Settings) -> dict[str, Any]:
    """The request of the report: numbers belong to a machine and to versions."""
    return {
        "bench": list(subjects),
        "quick": settings.quick,
        "rounds": settings.rounds,
        "seed": settings.seed,
        "machine": machine(settings.device),
        "versions": software(),
    }


def run(
    draft: Draft,
    subjects: Sequence[str],
    settings: Settings,
    tokenizers: Mapping[str, TokenizerRecipe],
    generator: GeneratorRecipe,
    progress: Progress = SILENT,
) -> Artifact:
    """Measure case by case, and publish `metrics.json` and the page. Finished cases are kept in the draft: a run that
    was interrupted continues at the next case.

    Args:
        tokenizers, generator: the presets of `presets_of(settings)`.
    """
    first, (_, preset) = next(iter(tokenizers.values())), presets_of(settings)
    cases: dict[str, list[Callable[[Progress], Case]]] = {
        "search": search.cases(settings),
        "kmeans": kmeans.cases(settings),
        "quantizer": quantizer.cases(settings),
        "train": step_and_encode.train_cases(settings, tokenizers),
        "tokenize": step_and_encode.tokenize_cases(settings, first),
        "generate": generation.cases(settings, preset, generator, first),
        "data": loading.cases(settings),
    }
    if warning := busy_warning():
        progress.message(warning)
    progress.start("bench", sum(len(cases[subject]) for subject in subjects), "cases")
    measured: dict[str, list[dict[str, Any]]] = {subject: [] for subject in subjects}
    for subject in subjects:
        for number, measure in enumerate(cases[subject]):
            name = f"cases/{subject}-{number}.json"
            if draft.record(name) is not None:
                progress.message(f"{name}: measured by an earlier run")
            else:
                draft.write_json(name, asdict(measure(progress)))
            measured[subject].append(json.loads((draft.path / name).read_text(encoding="utf-8")))
            progress.advance()
    metrics = {
        "settings": {
            "quick": settings.quick,
            "rounds": settings.rounds,
            "seed": settings.seed,
            "device": settings.device.type,
            "memory_gb": settings.memory,
            "patience_s": settings.method_seconds,
        },
        "machine": machine(settings.device),
        "versions": software(),
        "subjects": measured,
    }
    draft.write_json("metrics.json", metrics)
    options = ["--quick"] if settings.quick else []
    command = ["vqpipe", "bench", "--what", ",".join(subjects), "--rounds", str(settings.rounds), *options]
    footer = f"Measured on {time.strftime('%Y-%m-%d')}."
    report = benchmark_page(metrics, shlex.join([*command, "--out", "DIR"]), footer)
    draft.write_text("report.html", page.render(report))
    sizes = "quick" if settings.quick else "full"
    facts = {"measured": ", ".join(subjects), "sizes": sizes, "device": settings.device.type}
    return draft.publish(facts | facts_of(metrics))


def busy_warning() -> str:
    """A warning where other processes use the CPUs, else empty."""
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load <= BUSY * cpus:
        return ""
    return f"this machine is busy (load {load:.1f} on {cpus} CPUs): CPU times are more reliable than wall times"


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware, as far as the numbers depend on it."""
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
    """The model name of the processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def software() -> dict[str, str]:
    """The versions of the installed PACKAGES, and the git commit."""
    commit = git_commit()
    return versions(PACKAGES) | ({"git": commit} if commit else {})
