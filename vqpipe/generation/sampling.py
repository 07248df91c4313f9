"""Sampling of token ids from logits: temperature, top-k, top-p and classifier-free guidance.

Shapes: B images, K codes, N ids per image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vqpipe.errors import NumericError
from vqpipe.generation.base import SamplingConfig, guidance_scale, progress_at


def uniform_noise(rngs: Sequence[torch.Generator], count: int, device: torch.device) -> Tensor:
    """Return `count` numbers in [0, 1) from each image's own generator, float64[B, count] on `device`.

    All numbers of an image are drawn in one call before its first token, so that they do not depend on the batch.
    """
    numbers = [torch.rand(count, dtype=torch.float64, generator=rng) for rng in rngs]
    return torch.stack(numbers).to(device) if numbers else torch.empty(0, count, dtype=torch.float64, device=device)


def sample_ids(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> Tensor:
    """Sample one id per row: logits float[B, K] and uniform numbers float64[B] in [0, 1) -> int64[B].

    The id is the first at which the cumulative probability, in the order of the ids and in float64, exceeds the number.
    Unlike the order of the probabilities, the order of the ids does not change when logits change by rounding.
    The id is -1 where the probabilities are not finite: see `checked`, which waits for the GPU once for all ids.
    """
    if sampling.temperature == 0:
        return logits.argmax(1).masked_fill(~logits.amax(1).isfinite(), -1)
    filtered = filter_logits(logits.double() / sampling.temperature, sampling)
    cumulative = filtered.softmax(1).cumsum(1)
    total = cumulative[:, -1:]
    threshold = torch.minimum(uniform.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).masked_fill(~total.isfinite(), -1).squeeze(1)


def checked(ids: Tensor) -> Tensor:
    """Return sampled ids int64[...].

    Raises:
        NumericError: one is -1.
    """
    if bool((ids < 0).any()):
        raise NumericError(
            "the generator predicts NaN or infinity",
            "Lower the guidance scale, raise the temperature, or train it longer",
        )
    return ids


def filter_logits(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Set logits float[B, K] to -infinity where `top_k` and then `top_p` (Holtzman et al. 2020) exclude an id."""
    count = top_k_count(sampling.top_k, logits.shape[1])
    if count < logits.shape[1]:
        best, ids = logits.topk(count, dim=1)
        logits = torch.full_like(logits, -torch.inf).scatter(1, ids, best)
    if sampling.top_p < 1:
        ordered, ids = logits.sort(dim=1, descending=True)
        probabilities = ordered.softmax(1)
        before = probabilities.cumsum(1) - probabilities  # sum over all more probable ids; 0 for the first
        ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(1, ids, ordered)
    return logits


def top_k_count(top_k: int | float, codebook_size: int) -> int:
    """Return how many ids `top_k` keeps, at least 1: a count, as a float a share of the codebook, 0 for all.

    MGVQ's released sampler uses an exponent of two instead: its 12 is our 4096. VQGAN-LC's paper keeps 10 % of the
    vocabulary, our 0.1.
    """
    if top_k == 0:
        return codebook_size
    count = round(top_k * codebook_size) if isinstance(top_k, float) else top_k
    return min(codebook_size, max(1, count))


def append_null_classes(labels: Tensor, null: int, sampling: SamplingConfig) -> Tensor:
    """Return the labels of the network's batch: int64[B], with guidance int64[2 B], the second half null classes."""
    if sampling.cfg_scale == 1:
        return labels
    return torch.cat([labels, torch.full_like(labels, null)])


def guide_logits(logits: Tensor, sampling: SamplingConfig, step: int, steps: int) -> Tensor:
    """Combine conditional and null logits at `step` of `steps`: with guidance float[2 B, K] -> float[B, K].

    null + s (conditional - null) on logits, as LlamaGen and MGVQ (Ho & Salimans 2022 guide noise).
    """
    if sampling.cfg_scale == 1:
        return logits
    conditional, null = logits.float().chunk(2)
    return torch.lerp(null, conditional, guidance_scale(sampling, progress_at(step, steps)))


def repeat_for_guidance(ids: Tensor, sampling: SamplingConfig) -> Tensor:
    """Return the sampled ids int64[B], with 0 for -1, for the network's batch: with guidance int64[2 B], both halves
    equal."""
    ids = ids.clamp(min=0)
    return ids if sampling.cfg_scale == 1 else torch.cat([ids, ids])
