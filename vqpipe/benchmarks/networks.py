"""Networks for the subjects that need one: random weights, a drawn codebook, and another search put in its place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from vqpipe.benchmarks.search import expanded
from vqpipe.data.images import open_images
from vqpipe.data.transforms import center_crop, decode, to_float
from vqpipe.models import Autoencoder, AutoencoderConfig, build_autoencoder
from vqpipe.quantizers import base
from vqpipe.quantizers.lc import LcConfig

Search = Callable[..., Tensor]
"""(float[N, D], float[K, D], metric, check=) -> int64[N], as `vqpipe.search.nearest`."""
MATCHING = 16
"""Photographs that the matched start looks at."""


def photographs(count: int, size: int) -> Tensor:
    """uint8[B, 3, S, S]: crops of builtin:photos, spread over them; again from the first where there are too few."""
    images = open_images("builtin:photos")
    stride = max(1, len(images) // count)
    chosen = [(number * stride) % len(images) for number in range(count)]
    return torch.stack([center_crop(decode(images.read(i)), size) for i in chosen])


def with_codes(config: AutoencoderConfig, codebook_size: int) -> AutoencoderConfig:
    """The same network in front of a frozen codebook of so many codes."""
    quantizer = config.quantizer
    assert isinstance(quantizer, LcConfig)  # of the presets that are measured
    return replace(config, quantizer=replace(quantizer, codebook_size=codebook_size))


def build(config: AutoencoderConfig, image_size: int, device: torch.device, seed: int) -> Autoencoder:
    """A fresh network whose codebook is drawn from a normal distribution, latents and codes matched on photographs.

    Without the match, all latents of a fresh network would lie beside the codes, and share a few of them.
    """
    torch.manual_seed(seed)
    model = build_autoencoder(config)
    assert isinstance(config.quantizer, LcConfig)
    model.quantizer.load_codebook(torch.randn(config.quantizer.codebook_size, config.quantizer.feature_dim))
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    model.to(device)
    model.whiten_init(to_float(photographs(MATCHING, image_size).to(device)))
    return model


@contextmanager
def searching_with(search: Search) -> Iterator[None]:
    """Inside, quantizers find their nearest codes by `search`."""
    with patch.object(base, "nearest", search):
        yield


def naive(vectors: Tensor, codes: Tensor, metric: str = "l2", *, check: bool = True) -> Tensor:
    """The published expansion, in place of our search; of l2 alone, which the presets measured here use. It checks
    nothing, whatever `check` says."""
    assert metric == "l2"
    return expanded(vectors, codes)
