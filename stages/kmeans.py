"""`vqpipe kmeans`: features -> codebook."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages import console
from stages.console import Device, Out, Preset, Seed, Set

if TYPE_CHECKING:
    from vqpipe.codebooks.clustering import Clustering
    from vqpipe.codebooks.watch import Watch


def kmeans(
    features: Annotated[
        list[Path],
        typer.Option(
            "--features", help="A features artifact, or .npy files of n x dim floats; repeatable.", metavar="PATH"
        ),
    ],
    out: Out,
    k: Annotated[int | None, typer.Option("--k", help="Codes.", metavar="CODES", min=1)] = None,
    iterations: Annotated[
        int | None, typer.Option("--iterations", help="Lloyd iterations, or epochs, at most.", metavar="N", min=0)
    ] = None,
    mini_batch: Annotated[
        int | None, typer.Option("--mini-batch", help="Vectors per step; 0: full Lloyd.", metavar="VECTORS", min=0)
    ] = None,
    init: Annotated[str | None, typer.Option("--init", help="First centres.", metavar="k-means++|random")] = None,
    per_class: Annotated[
        bool | None, typer.Option("--per-class/--all-classes", help="Cluster each class by itself.")
    ] = None,
    select: Annotated[
        str | None, typer.Option("--select", help="random: codes are vectors drawn.", metavar="kmeans|random")
    ] = None,
    preset: Preset = None,
    overrides: Set = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Cluster features into a codebook; every vector counts, every code is in use."""
    with console.session(device, seed) as where:
        from stages import recipe
        from vqpipe import artifacts
        from vqpipe.codebooks import kmeans as clustering
        from vqpipe.codebooks.feature_set import open_features
        from vqpipe.config import to_table

        flags = {
            "k": k,
            "iterations": iterations,
            "batch": mini_batch,
            "init": init,
            "per_class": per_class,
            "select": select,
        }
        config = recipe.load(preset, overrides, kmeans=flags).kmeans
        vectors = open_features(features)
        request = {**to_table(config), "seed": seed}
        del request["gpu_share"]  # the same codebook comes out, so a run may go on with another
        draft = artifacts.start(out, "codebook", request, {"features": vectors})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            with bars() as watch:
                result = clustering.kmeans(
                    vectors,
                    config,
                    seed=seed,
                    device=where,
                    checkpoints=draft.path / "checkpoints",
                    watch=watch,
                    on_note=console.say,
                )
            if console.is_main():
                with draft.write(clustering.CODEBOOK_FILE) as path:
                    result.save(path)
            artifact = draft.publish(result.facts())
            show_report(result)
            return console.finished(artifact)


@contextmanager
def bars() -> Iterator["Watch"]:
    """A bar for each phase of a clustering, one after another."""
    from vqpipe.codebooks.watch import Watch

    class Bars(Watch):
        def __init__(self, stack: ExitStack) -> None:
            self.stack = stack

        def phase(self, title: str, total: int) -> None:
            self.stack.close()
            self.bar = self.stack.enter_context(console.progress(title, total, "vectors"))

        def advance(self, vectors: int) -> None:
            self.bar.advance(vectors)

        def note(self, text: str) -> None:
            self.bar.note(text)

    with ExitStack() as stack:
        yield Bars(stack)


def show_report(result: "Clustering") -> None:
    """A table of what came out: inertia along the way, cluster sizes, codes that differ."""
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    sizes = result.sizes()
    ended = "converged" if result.converged else "as many as asked for"
    table.add_row("inertia, first and last", f"{result.history[0]:.6g}, {result.inertia:.6g}")
    table.add_row("iterations", f"{result.iterations} ({ended})")
    table.add_row("codes, all different", f"{len(result.codes):,}, {result.distinct():,}")
    table.add_row("vectors per code", "{smallest:,} to {largest:,}, median {median:,}".format(**sizes))
    table.add_row("in the largest 1 % of clusters", f"{sizes['share_in_largest_percent']:.1%} of the vectors")
    table.add_row("empty clusters re-seeded", f"{result.reseeded:,}")
    console.show(table)
