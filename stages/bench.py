"""`vqpipe bench`: what this machine does, beside the peers it can import -> a report."""

import json
import os
import shlex
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console
from stages.console import Device, Out, Seed

if TYPE_CHECKING:
    from vqpipe.artifacts import Artifact, Draft
    from vqpipe.benchmarks.measure import Plan, Settings, Stopwatch

WHAT = ("search", "kmeans", "train", "tokenize", "data", "generate", "eval")
PACKAGES = (
    *("vqpipe", "torch", "torchvision", "numpy", "faiss-gpu", "faiss-cpu", "scikit-learn", "pillow", "simplejpeg"),
    *("opencv-python", "opencv-python-headless", "webdataset", "triton", "flash-kmeans"),
)
"""Whose versions the numbers depend on."""
TRAINED, TRAINED_ON_GPU = "smoke", "vqgan-lc-f16-100k"
"""Presets whose step is measured."""
EVALUATED = "small", "vqgan-lc-f16-100k"
"""Presets whose networks are evaluated: one for a CPU, one of the papers."""
MOST_MEMORY = 8.0
"""GB that a call on the CPU may need; less where less than twice that is free."""
BUSY = 0.5
"""Load per CPU before the start from which on a warning is due."""


def bench(
    out: Out,
    what: Annotated[
        str, typer.Option("--what", help="What to measure, with commas between.", metavar=",".join(WHAT))
    ] = ",".join(WHAT),
    rounds: Annotated[int, typer.Option("--rounds", help="Calls of each method that count.", metavar="N", min=1)] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: a look in seconds, no numbers to quote.")
    ] = False,
    memory: Annotated[
        float | None,
        typer.Option("--memory", help="Leave out methods that need more; default: half of what is free.", metavar="GB"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Measure this machine: each of the subjects of --what, beside the libraries installed here.

    All methods of a case run in turns in one process; medians of wall time and CPU time, peak memory and exactness are
    told. A method that is not installed, or would need too much memory, is named with its reason. The machine should
    have nothing else to do.

    Numbers belong to a machine and to versions: with another --what, --quick, machine or version the same --out is
    refused, and to measure again takes another --out.
    """
    with console.session(device, seed) as where:
        from vqpipe import artifacts, distributed
        from vqpipe.benchmarks import measure
        from vqpipe.errors import ConfigError
        from vqpipe.provenance import git_commit

        if distributed.world_size() > 1:
            raise ConfigError(
                f"vqpipe bench measures one process, not {distributed.world_size()}", "Leave out torchrun"
            )
        subjects = chosen(what)
        free = measure.available_memory(where)
        most = memory or (0.8 * free if where.type == "cuda" else min(MOST_MEMORY, 0.5 * free))
        settings = measure.Settings(device=where, rounds=rounds, quick=quick, seed=seed, memory=round(most, 1) or 0.1)
        request = {
            "bench": subjects,
            "quick": quick,
            "rounds": rounds,
            "seed": seed,
            "machine": measure.machine(where),
            "versions": measure.versions(PACKAGES) | ({"git": commit} if (commit := git_commit()) else {}),
        }
        draft = artifacts.start(out, "report", request | ({"memory": memory} if memory else {}), {})
        if isinstance(draft, artifacts.Artifact):
            console.say(f"measured {draft.manifest.provenance['finished']}; to measure again, choose another --out")
            return finished(draft, as_json, again=True)
        with draft:
            return finished(run(draft, subjects, settings, request), as_json)


def chosen(what: str) -> list[str]:
    """The subjects that `--what` names, each once, in our order."""
    from vqpipe.config import nearest_name
    from vqpipe.errors import ConfigError

    named = [name.strip() for name in what.split(",") if name.strip()]
    if not named:
        raise ConfigError("--what names nothing to measure", f"Known: {', '.join(WHAT)}")
    for name in named:
        if name not in WHAT:
            hint = nearest_name(name, WHAT)
            known = "" if hint.startswith("Known") else f" Known: {', '.join(WHAT)}"
            raise ConfigError(f"--what {name} is unknown", hint + known)
    return [name for name in WHAT if name in named]


def run(draft: "Draft", subjects: list[str], settings: "Settings", request: dict[str, Any]) -> "Artifact":
    """Measure case by case, each kept in the draft as soon as it is done, then write the report."""
    from vqpipe.benchmarks import measure
    from vqpipe.reports.benchmark import headlines

    warn_if_busy()
    work = {subject: plans(subject, settings) for subject in subjects}
    calls = measure.CALLS_BEFORE + settings.rounds
    everything = [plan for plans_of in work.values() for plan in plans_of]
    measured: dict[str, list[dict[str, Any]]] = {subject: [] for subject in subjects}
    with console.progress("bench", sum(plan.methods for plan in everything) * calls, "calls") as bar:

        def on_call(name: str) -> None:
            bar.note(f"{plan.title}: {name}")
            bar.advance()

        stopwatch, due = measure.Stopwatch(settings, on_call), 0
        for subject, its_plans in work.items():
            for number, plan in enumerate(its_plans):
                name, due = f"cases/{subject}-{number}.json", due + plan.methods * calls
                measured[subject].append(kept(draft, name, plan, stopwatch))
                bar.advance(due - bar.done)  # calls that were not made: of absent or slow methods, or of an earlier run
    metrics = {
        "settings": {
            **{key: request[key] for key in ("quick", "rounds", "seed")},
            "device": settings.device.type,
            "memory_gb": settings.memory,
            "patience_s": settings.patience,
        },
        "machine": request["machine"],
        "versions": request["versions"],
        "subjects": measured,
    }
    write_files(draft, metrics)
    show_tables(metrics)
    sizes = "quick" if settings.quick else "full"
    facts = {"measured": ", ".join(subjects), "sizes": sizes, "device": settings.device.type}
    return draft.publish(facts | headlines(metrics))


def plans(subject: str, settings: "Settings") -> "list[Plan]":
    """What there is to measure of one subject on this device."""
    from stages import recipe as recipes
    from vqpipe.benchmarks import clustering, evaluating, generating, loading, search, tokenizing, training

    if subject == "search":
        return search.plans(settings)
    if subject == "kmeans":
        return clustering.plans(settings)
    if subject == "data":
        return loading.plans(settings)
    if subject == "generate":
        return generating.plans(settings)
    if subject == "eval":
        return evaluating.plans(settings, *(recipes.load(name).model for name in EVALUATED))
    on_gpu = settings.device.type == "cuda" and not settings.quick
    if subject == "tokenize":
        return tokenizing.plans(settings, recipes.load(TRAINED).model)
    preset = TRAINED_ON_GPU if on_gpu else TRAINED
    recipe = recipes.load(preset)
    return training.plans(
        settings,
        training.Experiment(
            preset=preset,
            model=recipe.model,
            objective=recipe.objective,
            discriminator=recipe.discriminator,
            train=recipe.train,
            image_size=recipe.data.image_size,
        ),
    )


def kept(draft: "Draft", name: str, plan: "Plan", stopwatch: "Stopwatch") -> dict[str, Any]:
    """A case that an earlier run of this command measured, or measured now and kept."""
    if draft.record(name) is not None:
        console.say(f"{name}: measured by the run before")
        return json.loads((draft.path / name).read_text(encoding="utf-8"))
    case = plan.run(stopwatch).to_table()
    with draft.write(name) as path:
        path.write_text(to_json(case), encoding="utf-8")
    return case


def write_files(draft: "Draft", metrics: dict[str, Any]) -> None:
    """`metrics.json` and the page."""
    from vqpipe.reports import page
    from vqpipe.reports.benchmark import benchmark_page

    with draft.write("metrics.json") as path:
        path.write_text(to_json(metrics), encoding="utf-8")
    subjects, settings = ",".join(metrics["subjects"]), metrics["settings"]
    options = ["--quick"] if settings["quick"] else []
    command = ["vqpipe", "bench", "--what", subjects, "--rounds", str(settings["rounds"]), *options, "--out", "again"]
    footer = f"Made by vqpipe {metrics['versions']['vqpipe']}, {time.strftime('%Y-%m-%d')}."
    with draft.write("report.html") as path:
        path.write_text(page.render(benchmark_page(metrics, shlex.join(command), footer)), encoding="utf-8")


def show_tables(metrics: dict[str, Any]) -> None:
    """The numbers for the terminal, a table per case."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from vqpipe.reports.benchmark import case_rows, machine_line

    console.say(machine_line(metrics))
    for cases in metrics["subjects"].values():
        for case in cases:
            header, rows = case_rows(case, wide=False)
            table = Table(*header, title=case["title"], title_justify="left", box=box.SIMPLE, pad_edge=False)
            for row in rows:
                table.add_row(*(f"[bold green]{text}[/]" if best else escape(text) for text, best in row))
            table.columns[0].no_wrap = True
            for column in table.columns[1:]:
                column.justify = "right"
            console.show(table)
            for name, reason in case["not_run"].items():
                console.say(f"not measured: {name}: {reason}")


def finished(artifact: "Artifact", as_json: bool, again: bool = False) -> None:
    """The last words: the path on stdout, or with --json the numbers, and the path beside them on stderr."""
    if not as_json:
        console.finished(artifact, again)
        return
    console.say(f"{'already published' if again else 'published'}: {artifact.path}")
    print(artifact.file("metrics.json").read_text(encoding="utf-8"), end="")


def warn_if_busy() -> None:
    """Say so where this machine has other things to do."""
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY * cpus:
        console.say(f"this machine is busy (load {load:.1f} on {cpus} CPUs): trust CPU times more than wall times")


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
