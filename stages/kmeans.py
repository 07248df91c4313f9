"""`vqpipe kmeans`: features -> codebook."""

from pathlib import Path
from typing import Annotated

import typer

from stages import console
from stages.console import Device, Out, Preset, Seed, Set


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
        int | None, typer.Option("--iterations", help="Lloyd iterations at most.", metavar="N", min=0)
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
            "init": init,
            "per_class": per_class,
            "select": select,
        }
        config = recipe.load(preset, overrides, kmeans=flags).kmeans
        vectors = open_features(features)
        request = {**to_table(config), "seed": seed}
        draft = artifacts.start(out, "codebook", request, {"features": vectors})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            passes = 1 if config.select == "random" else config.iterations + 1
            total, unit = (vectors.num_classes, "classes") if config.per_class else (passes, "passes")
            with console.progress("k-means", total, unit) as bar:

                def on_step(inertia: float) -> None:
                    bar.note(f"inertia {inertia:.6g}")
                    bar.advance()

                result = clustering.kmeans(vectors, config, seed=seed, device=where, on_step=on_step)
            if console.is_main():
                with draft.write(clustering.CODEBOOK_FILE) as path:
                    result.save(path)
            return console.finished(draft.publish(result.facts()))
