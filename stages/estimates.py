"""What the commands say about a plan: `vqpipe plan`, --plan, and the first line of `vqpipe train`."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from stages import console, recipe
from vqpipe import distributed, presets
from vqpipe.device import bf16_is_faster
from vqpipe.errors import VqpipeError
from vqpipe.planning.devices import DEVICES, device_of
from vqpipe.planning.estimate import GIB, Plan, Training, generator_training, in_bytes, refusal, tokenizer_training
from vqpipe.progress import Progress
from vqpipe.words import counted

LEAST_SHOWN = 10_000
"""Bytes of the smallest part of the memory in the table."""
LEAST_STEPS = 1000
"""Shorter runs begin without an estimate, which takes a few seconds."""
LONG_HOURS, FIRST_LOOK_HOURS, LEAST_PROPOSED = 2.0, 0.5, 20
"""Hours of a run on a CPU from which on a shorter one is proposed, and the hours and the least steps of that."""
MACHINES = {"1 x 24 GB": ("rtx4090", 1), "1 x 80 GB": ("h100", 1), "8 x 80 GB": ("h100", 8)}
"""Columns of the table of presets: a device of DEVICES, and how many."""
TOKENIZERS = {"ldm-f8": "vqgan-lc-f8-100k", "ldm-ffhq-f16": "vqgan-lc-ffhq-f16-100k"} | dict.fromkeys(
    ("llamagen-b", "llamagen-l", "llamagen-xl", "llamagen-xxl"), "mgvq-f16-g4"
)
"""Preset of a generator -> that of its tokenizer, where it is not that of VQGAN-LC."""


def plan_here(training: Training, device: torch.device) -> Plan:
    """The plan of a run on the devices of this process group. The random numbers of the run stay the same."""
    with torch.random.fork_rng(devices=[]):
        return training.plan(device_of(device), distributed.world_size())


def training_of(preset: str) -> Training:
    """What a preset of a tokenizer or a generator trains."""
    if "model" in {section for table in presets.chain(preset) for section in table}:
        return tokenizer_training(recipe.load_tokenizer(preset))
    tokenizer = recipe.load_tokenizer(TOKENIZERS.get(preset, recipe.PAPER))
    return generator_training(recipe.load_generator(preset), tokenizer.model, tokenizer.data.image_size)


def preset_figures(preset: str) -> dict[str, dict[str, float] | None]:
    """Machine -> GiB of one device and hours of a preset, with settings that fit; None where none do."""
    figures: dict[str, dict[str, float] | None] = {}
    for machine, (device, count) in MACHINES.items():
        plan = training_of(preset).fitting(DEVICES[device], count)
        figures[machine] = (
            None
            if plan is None
            else {
                "memory_gib": round(plan.needed / GIB, 1),
                "hours": round(plan.hours, 1),
                "accumulate": plan.settings["accumulate"],
                "activation_checkpointing": plan.settings["activation checkpointing"],
            }
        )
    return figures


def show_presets(*, as_json: bool) -> None:
    """Print the figures of all presets of tokenizers and generators: as JSON, or as a table in Markdown."""
    found = {}
    for name in [*presets.names("model"), *presets.names("generator")]:
        console.say(name)
        found[name] = preset_figures(name)
    print(json.dumps(found, indent=1) if as_json else markdown(found), end="")


def markdown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of all presets for docs/planning.md."""
    head = ["preset", *MACHINES]
    rows = [[f"`{name}`", *(cell(figures[machine]) for machine in MACHINES)] for name, figures in found.items()]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(figures: Mapping[str, Any] | None) -> str:
    """`21.3 GiB, 160 h, accumulate 16, checkpointing`."""
    if figures is None:
        return "–"
    hours = figures["hours"]
    time = "under 0.1 h" if hours < 0.1 else f"{hours:,.2g} h" if hours < 100 else f"{hours:,.0f} h"
    words = [f"{figures['memory_gib']:.3g} GiB", time]
    words += [f"accumulate {figures['accumulate']}"] if figures["accumulate"] > 1 else []
    words += ["checkpointing"] if figures["activation_checkpointing"] else []
    return ", ".join(words)


def show(plan: Plan, *, as_json: bool = False) -> None:
    """Print a plan: as JSON on stdout, else as a table."""
    console.end_progress()
    if as_json:
        print(json.dumps(plan.to_table(), indent=2))
        return
    title = f"vqpipe {plan.stage} on {plan.devices} x {plan.device.name}: an estimate"
    table = Table(box=box.SIMPLE, pad_edge=False, show_header=False, title=title, title_justify="left")
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for name, value in plan.settings.items():
        table.add_row(name, f"{value:,}" if type(value) is int else str(value), "")
    if plan.images_per_step:
        table.add_row("images per step, all devices", f"{plan.images_per_step:,}", "")
    table.add_section()
    for part, size in sorted(plan.memory.items(), key=lambda item: -item[1]):
        if size >= LEAST_SHOWN:
            table.add_row(f"memory: {part}", in_bytes(size), "")
    if (assumed := plan.needed - sum(plan.memory.values())) >= LEAST_SHOWN:
        table.add_row("memory: libraries and fragmentation", in_bytes(assumed), "assumed")
    table.add_row("memory of a device", in_bytes(plan.needed), f"of {in_bytes(plan.device.memory)}: {verdict(plan)}")
    table.add_section()
    directions = {name: flops for name, flops in plan.flops.items() if name in ("forward", "backward") and flops}
    parts = {name: flops for name, flops in plan.flops.items() if name not in directions and flops}
    for name, flops in directions.items():
        table.add_row(f"operations of a step: {name}", in_flops(flops), "")
    for name, flops in parts.items() if len(parts) > 1 else ():
        table.add_row(f"the same by part: {name}", in_flops(flops), "")
    table.add_row("a step", duration(plan.seconds_per_step), counted(plan.steps, "steps"))
    table.add_row("time", duration(3600 * plan.hours), f"{plan.devices} x {plan.device.name}")
    if plan.images_per_step:
        rate = plan.images_per_second
        table.add_row("images per second", f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}", "from the loader")
    for name, size in plan.disk.items():
        table.add_row(f"disk: {name}", in_bytes(size), "")
    if console.prints():
        printed = Console(highlight=False)
        printed.print(table)
        for words in plan.advice:
            printed.print(f"advice: {words}", markup=False, soft_wrap=True)


def say_or_refuse(make: Callable[[], Plan]) -> None:
    """Print the plan in one line, and raise a ConfigError if the run does not fit. Every rank calls it.

    A network whose step cannot run on fake tensors, such as one of a plugin, has no estimate.
    """

    def action() -> None:
        try:
            plan = make()
        except VqpipeError:
            raise
        except Exception as error:  # whatever a step raises that reads numbers
            console.say(f"no estimate of memory and time: {type(error).__name__}")
            return
        if not plan.fits:
            raise refusal(plan)
        console.say(line(plan))
        fewer = round(plan.steps * FIRST_LOOK_HOURS / plan.hours)
        if not plan.device.is_gpu and plan.hours > LONG_HOURS and fewer >= LEAST_PROPOSED:
            console.say(f"for a first look, --steps {fewer} takes about {duration(3600 * FIRST_LOOK_HOURS)}")
        if plan.close:
            console.say("warning: close to out of memory. If it fails, see vqpipe plan for settings that need less")

    distributed.on_main(action)


def check_fits(training: Training, device: torch.device, out: Path, progress: Progress) -> None:
    """`say_or_refuse` for a run that is to publish `out`, unless it is published already, or the run is a short one."""
    if not out.exists() and training.config.steps >= LEAST_STEPS:
        progress.start("estimating memory and time", None, unit="")
        say_or_refuse(partial(plan_here, training, device))
        if training.config.precision == "fp32" and device.type == "cpu" and bf16_is_faster(device):
            console.say("faster on this processor: --precision bf16")


def line(plan: Plan) -> str:
    """`estimate: 31.2 GiB of 79.6 GiB of memory, 0.84 s a step, 23 hours in all (8 x h100)`."""
    many = f"{plan.devices} x " if plan.devices > 1 else ""
    return (
        f"estimate: {in_bytes(plan.needed)} of {in_bytes(plan.device.memory)} of memory, "
        f"{duration(plan.seconds_per_step)} a step, {duration(3600 * plan.hours)} in all ({many}{plan.device.name})"
    )


def verdict(plan: Plan) -> str:
    return "close" if plan.close else "fits" if plan.fits else "does not fit"


def in_flops(count: float) -> str:
    """`15.7 TFLOP`, `31.4 GFLOP`."""
    units = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
    unit, size = next((each for each in units if count >= each[1]), units[-1])
    return f"{count / size:,.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"


def duration(seconds: float) -> str:
    """`5.4 ms`, `0.84 s`, `12 minutes`, `23 hours`, `12 days`."""
    for unit, length in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 100 * length else f"{seconds / length:,.0f} {unit}"
    if seconds < 0.1:
        return f"{1e3 * seconds:.2g} ms"
    return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds:.0f} s"
