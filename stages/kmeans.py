"""`vqpipe kmeans`: features -> codebook."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stages import console, options
from stages.options import Device, Out, Preset, Seed, Set
from vqpipe.errors import ConfigError
from vqpipe.words import percent

if TYPE_CHECKING:
    from vqpipe.codebooks.codebook import Clustering
    from vqpipe.codebooks.features import FeatureSet

VECTORS_PER_CODE = 256
"""For the number of codes that an error suggests; VQGAN-LC has 208: 20.8 million vectors for 100,000 codes."""


def kmeans(
    features: Annotated[
        list[Path],
        typer.Option(
            "--features", help="A features artifact, or .npy files of n x dim floats; repeatable.", metavar="PATH"
        ),
    ],
    out: Out,
    k: Annotated[
        int | None, typer.Option("--k", help="Number of codes; default: the preset's.", metavar="CODES", min=1)
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations",
            help="Maximum number of Lloyd iterations, or of mini-batch epochs; default: the preset's.",
            metavar="N",
            min=0,
        ),
    ] = None,
    mini_batch: Annotated[
        int | None,
        typer.Option(
            "--mini-batch", help="Vectors per step of mini-batch k-means; 0: all (Lloyd).", metavar="VECTORS", min=0
        ),
    ] = None,
    init: Annotated[
        Literal["k-means++", "random"] | None,
        typer.Option("--init", help="Initialization of the centers; default: the preset's."),
    ] = None,
    per_class: Annotated[
        bool | None, typer.Option("--per-class/--all-classes", help="Cluster each class separately.")
    ] = None,
    select: Annotated[
        Literal["kmeans", "random"] | None,
        typer.Option("--select", help="Codes are cluster centers, or random vectors (a baseline)."),
    ] = None,
    plan: options.Plan = False,
    preset: Preset = None,
    overrides: Set = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Cluster features into a codebook.

    All vectors are used, and every code is the nearest code of at least one
    vector. The number of codes is --k, or kmeans.k of the preset.
    """
    with console.session(device, seed) as torch_device:
        from stages import estimates, recipe
        from vqpipe import artifacts, distributed
        from vqpipe.codebooks import kmeans as clustering
        from vqpipe.codebooks.codebook import CODEBOOK_FILE
        from vqpipe.codebooks.features import FeaturesConfig, open_features
        from vqpipe.config import to_request
        from vqpipe.planning.devices import device_of
        from vqpipe.planning.estimate import plan_kmeans

        flags = {
            "k": k,
            "iterations": iterations,
            "batch": mini_batch,
            "init": init,
            "per_class": per_class,
            "select": select,
        }
        settings = recipe.load(preset, overrides, reads=["kmeans"], kmeans=flags)
        config = settings.kmeans
        vectors = open_features(features)
        if k is None and not recipe.sets("kmeans.k", preset, overrides):
            raise ConfigError(
                f"the number of codes is not given, and {vectors.name} holds {vectors.num_vectors:,} vectors",
                f"Give --k {suitable_k(vectors, config.per_class)} (about {VECTORS_PER_CODE} vectors per code), or "
                "another, or a --preset that sets kmeans.k",
            )
        if preset is not None and vectors.artifact is not None:
            made = vectors.artifact.config
            size = FeaturesConfig(encoder=made["encoder"], image_size=made["image_size"]).chosen_size
            console.remark_size(f"{vectors.artifact.path} has features", size, preset, settings.data.image_size)
        if plan:
            ranks = distributed.world_size()
            return estimates.show(plan_kmeans(config, vectors.num_vectors, vectors.dim, device_of(torch_device), ranks))
        draft = artifacts.start(out, "codebook", {**to_request(config), "seed": seed}, {"features": vectors})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            checkpoints = draft.path / "checkpoints"
            with console.ProgressBar() as progress:
                result = clustering.kmeans(
                    vectors, config, seed=seed, device=torch_device, checkpoints=checkpoints, progress=progress
                )
            if console.prints():
                with draft.write(CODEBOOK_FILE) as path:
                    result.save(path)
            artifact = draft.publish(result.facts())
        console.show(console.labelled(report(result)))
        return console.finished(artifact)


def suitable_k(vectors: "FeatureSet", per_class: bool) -> int:
    """A number of codes with about VECTORS_PER_CODE vectors each; for `per_class` a multiple of the classes."""
    classes = len(set(vectors.labels.tolist())) if per_class and vectors.labels is not None else 1
    return max(1, vectors.num_vectors // VECTORS_PER_CODE // classes) * classes


def report(result: "Clustering") -> dict[str, str]:
    """Inertia, cluster sizes, and distinct codes, by their labels."""
    sizes = result.cluster_sizes()
    inertia = [f"{value:.6g}" for value in dict.fromkeys((result.history[0], result.inertia))]
    return {
        "inertia, first and last" if len(inertia) > 1 else "inertia": ", ".join(inertia),
        "iterations": f"{result.iterations} ({'converged' if result.converged else 'the maximum'})",
        "codes, distinct codes": f"{len(result.codebook):,}, {result.distinct_codes():,}",
        "vectors per code": "{smallest:,} to {largest:,}, median {median:,}".format(**sizes),
        "in the largest 1 % of clusters": f"{percent(sizes['share_in_largest_percent'])} of the vectors",
        "empty clusters re-seeded": f"{result.reseeded:,}",
    }
