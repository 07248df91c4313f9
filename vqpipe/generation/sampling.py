"""From logits to ids: temperature, top-k, top-p, guidance; and draws that belong to one image each.

Shapes: B images, V entries of the vocabulary, N ids an image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vqpipe.generation.base import SamplingConfig, guidance_scale


def uniforms(draws: Sequence[torch.Generator], count: int, device: torch.device) -> Tensor:
    """`count` numbers in [0, 1) from each image's own generator, float64[B, count] on `device`.

    Drawn before the first token, in one call an image: a token then costs no call of a generator, and image i gets the
    same numbers in any batch.
    """
    numbers = [torch.rand(count, dtype=torch.float64, generator=draw) for draw in draws]
    return torch.stack(numbers).to(device) if numbers else torch.empty(0, count, dtype=torch.float64, device=device)


def draw_ids(logits: Tensor, chances: Tensor, sampling: SamplingConfig) -> Tensor:
    """One id per row: float[B, V] logits and float64[B] numbers in [0, 1) -> int64[B].

    The id is where the cumulated probabilities, in the order of the ids and in float64, pass the number. That order
    does not change where rounding changes the logits a little, as sorted probabilities would.
    """
    if sampling.temperature == 0:
        return logits.argmax(1)
    kept = keep_most_probable(logits.double() / sampling.temperature, sampling)
    cumulated = kept.softmax(1).cumsum(1)
    total = cumulated[:, -1:]
    wanted = torch.minimum(chances.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, wanted, right=True).squeeze(1)


def keep_most_probable(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """float[B, V] logits with -infinity where `top_k` and then `top_p` (Holtzman et al. 2020) leave an id out."""
    count = top_count(sampling.top_k, logits.shape[1])
    if count < logits.shape[1]:
        best, ids = logits.topk(count, dim=1)
        logits = torch.full_like(logits, -torch.inf).scatter(1, ids, best)
    if sampling.top_p < 1:
        ordered, ids = logits.sort(dim=1, descending=True)
        probabilities = ordered.softmax(1)
        before = probabilities.cumsum(1) - probabilities  # of the ids that are more probable: 0 for the first
        ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(1, ids, ordered)
    return logits


def top_count(top_k: int | float, codebook_size: int) -> int:
    """How many ids `top_k` keeps: a count, or as a float a share of the codebook; 0 keeps all, and at least one stays.

    MGVQ's released sampler takes an exponent of two instead, so that its 12 is our 4096; VQGAN-LC's paper keeps 10 %
    of the vocabulary, our 0.1.
    """
    if top_k == 0:
        return codebook_size
    count = round(top_k * codebook_size) if isinstance(top_k, float) else top_k
    return min(codebook_size, max(1, count))


def with_null(labels: Tensor, null: int, sampling: SamplingConfig) -> Tensor:
    """The labels to run: int64[B], or with guidance int64[2 B], the null class for each image behind them."""
    if sampling.cfg_scale == 1:
        return labels
    return torch.cat([labels, torch.full_like(labels, null)])


def guided(logits: Tensor, sampling: SamplingConfig, step: int, steps: int) -> Tensor:
    """The logits that ids are drawn from at `step` of `steps`: float[2 B, V] with guidance -> float[B, V].

    null + s (conditional - null) on logits, as LlamaGen and MGVQ (Ho & Salimans 2022 have it on noise).
    """
    if sampling.cfg_scale == 1:
        return logits
    conditional, null = logits.float().chunk(2)
    return torch.lerp(null, conditional, guidance_scale(sampling, step / max(1, steps - 1)))


def for_each_run(ids: Tensor, sampling: SamplingConfig) -> Tensor:
    """The ids drawn, int64[B], for all that runs: with guidance int64[2 B], both halves alike."""
    return ids if sampling.cfg_scale == 1 else torch.cat([ids, ids])
