"""Facts of artifacts in words: `350 images, PSNR 24.28 dB`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vqpipe.words import counted

WORDS = {
    "num_images": "images",
    "num_classes": "classes",
    "num_vectors": "vectors",
    "num_latents": "latents",
    "num_sizes": "sizes",
    "num_tokens": "tokens per image",
    "num_groups": "groups",
    "num_parameters": "parameters",
    "k": "codes",
    "codebook_size": "codes",
    "distinct_codes": "distinct codes",
    "reseeded": "codes placed again",
    "dim": "channels",
    "iterations": "iterations",
    "steps": "steps",
    "images_seen": "images seen",
    "duplicate_keys": "duplicate keys",
    "image_size": "image size {}",
    "latent_shape": "latent shape {}",
    "downsample_factor": "downsample factor {}",
    "grids": "grid {}",
    "quantizer": "quantizer {}",
    "encoder": "encoder {}",
    "family": "family {}",
    "protocol": "protocol {}",
    "kind": "{}",
    "inertia": "mean squared distance to the nearest code {}",
    "inertia_per_iteration": "the same after each iteration {}",
    "converged": "converged: {}",
    "cluster_sizes": "vectors per code: {}",
    "share_in_largest_percent": "share of vectors in the largest 1 % {}",
    "published_step": "published step {}",
    "training_psnr": "training PSNR {} dB",
    "valid_psnr": "validation PSNR {} dB",
    "training_utilization": "share of codes in use in training {}",
    "training_loss": "training loss {}",
    "valid_loss": "validation loss {}",
    "top1": "top-1 accuracy {}",
    "top5": "top-5 accuracy {}",
    "class_names": "class names: {}",
    "left_out": "left out: {}",
    "image_sets": "image sets: {}",
}
"""Fact -> the plural noun that it counts, or a text with its value at {}. Those of reports are measures."""
MAIN = {
    "dataset": ("num_images", "num_classes"),
    "features": ("num_images", "num_vectors", "dim", "encoder"),
    "codebook": ("k", "dim", "iterations", "inertia"),
    "tokenizer": ("quantizer", "codebook_size", "num_groups", "downsample_factor"),
    "tokens": ("num_images", "num_sizes", "num_tokens", "codebook_size", "image_size"),
    "latents": ("num_images", "latent_shape", "image_size"),
    "report": ("num_images", "psnr", "rfid", "utilization", "fid", "measured", "device"),
    "images": ("num_images", "num_classes", "image_size"),
    "generator": ("kind", "num_parameters", "steps", "valid_loss"),
    "classifier": ("kind", "num_parameters", "num_classes", "top1"),
    "statistics": ("num_images",),
    "autoencoder": ("family", "downsample_factor"),
}
"""Kind of artifact -> the facts that are printed when it is published."""


def summary(kind: str, facts: Mapping[str, Any]) -> str:
    """The most important facts of an artifact, in one line."""
    single = {key: facts[key] for key in MAIN.get(kind, ()) if isinstance(facts.get(key), int | float | str)}
    return ", ".join(phrases(single))


def phrases(facts: Mapping[str, Any]) -> Iterator[str]:
    """Each fact in words, without those that are empty or unknown."""
    from vqpipe.reports.evaluation import BY_KEY, written  # imports PyTorch

    for key, value in facts.items():
        words = WORDS.get(key)
        if value is None or value in ("", {}, []):
            continue
        if isinstance(value, int | float) and key in BY_KEY:
            yield f"{BY_KEY[key].label} {written(BY_KEY[key], value)}"
        elif words is None:
            yield f"{key}{':' if isinstance(value, Mapping) else ''} {text_of(value)}"
        elif "{}" in words:
            yield words.replace("{}", text_of(value))
        else:
            yield counted(value, words) if isinstance(value, int) else f"{words} {text_of(value)}"


def text_of(value: Any) -> str:
    """A value as text: numbers with four digits; a grid of 16 rows and columns as `16 x 16`."""
    if isinstance(value, Mapping):
        return ", ".join(phrases(value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        mark = ", " if any(isinstance(each, str | list | Mapping | float) for each in value) else " x "
        return mark.join(map(text_of, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
