"""Loss and accuracy of a network on validation examples. Every rank measures its share; all return the same numbers."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.data.examples import ExampleBatch, Examples, ordered_batches
from vqpipe.device import autocast
from vqpipe.errors import NumericError
from vqpipe.generation.classifier import Classifier
from vqpipe.generation.image_generator import image_rngs
from vqpipe.generation.latents import LatentGenerator

SEED = 20_240
"""Seed of the times and the noise of each image in the losses of latents: equal in every validation, for comparison."""


@torch.no_grad()
def validation_losses(
    network: nn.Module, examples: Examples, *, batch_size: int, device: torch.device, precision: str = "fp32"
) -> dict[str, float]:
    """Return the mean over the examples of each scalar of the network's loss, in evaluation mode.

    Up to rounding it does not depend on the batch size or the number of ranks.
    """
    network.eval()
    sums: dict[str, Tensor] = {}
    for first, batch, counts in rank_batches(examples, batch_size):
        inputs: list[Any] = [batch.examples.to(device), batch.labels.to(device)]
        if isinstance(network, LatentGenerator):
            inputs.append(image_rngs(SEED, range(first, first + len(batch))))
        with autocast(device, precision):
            losses = network(*inputs)
        for name, value in losses.items() if counts else ():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu() * len(batch)
    parts = distributed.gather_objects({name: float(value) for name, value in sums.items()})
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) / len(examples) for name in names}


@torch.no_grad()
def loss_and_accuracy(
    classifier: Classifier, examples: Examples, *, batch_size: int, device: torch.device, precision: str = "fp32"
) -> dict[str, float]:
    """Return `total`, the mean cross-entropy, `top1` and, with more than five classes, `top5`: the share of examples
    whose class is (among) the best.

    Ties count against the correct class.

    Raises:
        NumericError: the classifier returns NaN or infinity.
    """
    classifier.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for _, batch, counts in rank_batches(examples, batch_size):
        labels = batch.labels.to(device)
        with autocast(device, precision):
            logits = classifier.logits(batch.examples.to(device)).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        better = (logits >= logits.gather(1, labels[:, None])).sum(1) - 1
        if counts:
            numbers = [loss, (better < 1).sum(), (better < 5).sum(), (~logits.isfinite()).sum()]
            sums += torch.stack([number.float() for number in numbers]).cpu()
    *means, nonfinite = np.sum(distributed.gather_objects(sums.numpy()), axis=0) / len(examples)
    if nonfinite:
        raise NumericError(
            "the classifier returns NaN or infinity for validation images",
            "Lower train.learning_rate or set train.clip_norm, and choose another --out",
        )
    names = ("total", "top1", "top5") if classifier.num_classes > 5 else ("total", "top1")
    return dict(zip(names, map(float, means), strict=False))


def rank_batches(examples: Examples, batch_size: int) -> Iterator[tuple[int, ExampleBatch, bool]]:
    """Yield this rank's batches: (its first image, batch, whether it counts).

    Every rank gets the same number of batches, since a network with sharded weights gathers them in every call: a rank
    with fewer repeats the first batch, which is excluded from the sums.
    """
    rank, ranks = distributed.rank(), distributed.world_size()
    first = rank * batch_size
    for batch in ordered_batches(examples, batch_size, rank, ranks):
        yield first, batch, True
        first += ranks * batch_size
    if first - rank * batch_size < len(examples):  # the other ranks have one more
        yield 0, next(ordered_batches(examples, batch_size)), False
