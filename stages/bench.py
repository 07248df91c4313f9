"""`vqpipe bench`: the speed of this machine, beside the other libraries installed here -> a report."""

from typing import TYPE_CHECKING, Annotated

import typer

from stages import console
from stages.options import Device, Out, Seed
from vqpipe.errors import ConfigError

if TYPE_CHECKING:
    from vqpipe.artifacts import Artifact

WHAT = "search,kmeans,quantizer,train,tokenize,generate,data"


def bench(
    out: Out,
    what: Annotated[str, typer.Option("--what", help="What to measure, separated by commas.", metavar=WHAT)] = WHAT,
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds of measurement.", metavar="N", min=1)] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: takes seconds, and its numbers are not for publication.")
    ] = False,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory", help="Skip methods that need more memory; default: half of the free memory.", metavar="GB"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Measure a GPU: an error where there is none, but with --quick the CPU.")
    ] = False,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Measure the speed of this machine.

    Each subject of --what is measured beside other installed libraries, and
    beside the estimates of vqpipe plan.

    All methods of a case run in interleaved rounds in one process. The report
    has medians of wall time and CPU time, peak memory and exactness. A method
    that is not installed, or needs too much memory, is listed with the reason.
    Nothing else should run on the machine.

    Numbers belong to a machine and to versions: with another --what, --quick,
    machine or version the same --out is refused. To measure again, choose
    another --out.
    """
    with console.session("cuda" if gpu and not quick else device, seed) as torch_device:
        from stages import recipe
        from vqpipe import artifacts, benchmarks, distributed

        if distributed.world_size() > 1:
            raise ConfigError(
                f"vqpipe bench measures one process, not {distributed.world_size()}", "Leave out torchrun"
            )
        subjects = benchmarks.parse_subjects(what)
        budget = benchmarks.free_memory(torch_device) if memory is None else memory
        settings = benchmarks.Settings(device=torch_device, rounds=rounds, quick=quick, seed=seed, memory=budget)
        request = benchmarks.request(subjects, settings) | ({"memory": memory} if memory else {})
        draft = artifacts.start(out, "report", request, {})
        if isinstance(draft, artifacts.Artifact):
            console.say(f"measured {draft.manifest.provenance['finished']}; to measure again, choose another --out")
            return finished(draft, as_json, again=True)
        presets, generator = benchmarks.presets_of(settings)
        tokenizers = {preset: recipe.load_tokenizer(preset) for preset in presets}
        with draft, console.ProgressBar() as progress:
            artifact = benchmarks.run(draft, subjects, settings, tokenizers, recipe.load_generator(generator), progress)
        show_tables(artifact)
        return finished(artifact, as_json)


def show_tables(artifact: "Artifact") -> None:
    """Print a table per case, and the reasons of what was not measured."""
    from vqpipe.reports.benchmark import case_table, estimate_table, machine_line

    metrics = artifact.read_json("metrics.json")
    console.say(machine_line(metrics))
    for cases in metrics["subjects"].values():
        for case in cases:
            table = case_table(case, wide=False)
            console.show_table(table)
            console.say(table.caption)
            for name, reason in case["not_run"].items():
                console.say(f"not measured: {name}: {reason}")
    if estimates := estimate_table(metrics):
        console.show_table(estimates)


def finished(artifact: "Artifact", as_json: bool, again: bool = False) -> None:
    """Print the path on stdout, or with --json the numbers, and the path on stderr."""
    if not as_json:
        console.finished(artifact, again)
        return
    console.say(f"{'already published' if again else 'published'}: {artifact.path}")
    console.say_next(artifact)
    print(artifact.verified_bytes("metrics.json").decode(), end="")
