"""How wide the codes of a tokenizer are beside its latents, and what that does to their use.

    python widths.py TOKENIZER EVAL TRAIN ...

Prints the directions in which the codes vary, and the ratio of the standard deviations of codes and latents in each;
then a table of sets of codes: the share of them in use over the center crops of EVAL, the same as a share of what
uniform use would reach, and the mean squared distance from a latent to its nearest code. The sets are the codes of the
tokenizer; these codes, mapped linearly to the mean and covariance of the latents; and as many, and more, latents of
TRAIN, drawn at random. EVAL and TRAIN are images as --images of `vqpipe` takes them. Only for tokenizers of one group.

Shapes: N latents, K codes, D channels, R directions in which codes vary.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from vqpipe.data import open_images
from vqpipe.data.batches import OrderedBatches
from vqpipe.search import nearest
from vqpipe.tokenizer import Tokenizer

SIDE = 128
"""Pixels of the crops: those of the preset `small`."""
SMALLEST = 0.01
"""Directions in which the codes vary less than this share of the widest are left out."""
MORE = (100_000, 1_000_000)
"""Further numbers of latents that are drawn as codes, as far as there are as many."""


def latents(tokenizer: Tokenizer, images: Sequence[str]) -> Tensor:
    """The latents of the center crops of these sets, float32[N, D]."""
    batches = OrderedBatches(open_images(images), image_size=SIDE, batch_size=32)
    return torch.cat([tokenizer.latent(batch.images).movedim(1, -1).flatten(0, -2).float() for batch in batches])


def square_root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance, float64[R, R]."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.sqrt() @ vectors.T


def matched(codes: Tensor, goal: Tensor) -> Tensor:
    """Codes, float32[K, R], mapped linearly to the mean and covariance of `goal`, float32[N, R], with the least motion
    (optimal transport between normal densities)."""
    root = square_root(codes.T.cov().double())
    inverse = torch.linalg.inv(root)
    transport = inverse @ square_root(root @ goal.T.cov().double() @ root) @ inverse
    return (codes - codes.mean(0)) @ transport.float() + goal.mean(0)


def use(vectors: Tensor, codes: Tensor) -> tuple[float, float]:
    """The share of the codes, float32[K, R], that are nearest to a vector of float32[N, R], and the mean squared
    distance to the nearest."""
    ids = nearest(vectors, codes)
    return len(ids.unique()) / len(codes), float((vectors - codes[ids]).square().sum(1).mean())


def main(name: str, evaluated: str, *train: str) -> None:
    """Print the directions and the table for a tokenizer, on one set of images, with codes drawn from others."""
    tokenizer = Tokenizer.from_pretrained(name)
    codes = tokenizer.codebook
    of_train, of_eval = latents(tokenizer, train), latents(tokenizer, [evaluated])
    values, vectors = torch.linalg.eigh(codes.T.cov())
    widths = values.clamp(min=0).sqrt()
    directions = vectors[:, widths > SMALLEST * widths.max()]
    codes, of_train, of_eval = codes @ directions, of_train @ directions, of_eval @ directions
    ratios = torch.linalg.eigvals(torch.linalg.solve(of_train.T.cov(), codes.T.cov())).real.sqrt().sort().values
    print(f"{directions.shape[1]} of {len(vectors)} directions; codes / latents:", *(f"{x:.2f}" for x in ratios))
    order = torch.randperm(len(of_train), generator=torch.Generator().manual_seed(0))
    sets = [("of the tokenizer", codes), ("the same, scaled to the width of the latents", matched(codes, of_train))]
    sets += [("latents", of_train[order[:size]]) for size in (len(codes), *MORE) if size <= len(of_train)]
    print("| codes | number | in use | of uniform use | squared distance |", "|---|---|---|---|---|", sep="\n")
    for title, each in sets:
        share, distance = use(of_eval, each)
        uniform = 1 - (1 - 1 / len(each)) ** len(of_eval)
        print(
            f"| {title} | {len(each):,} | {share * 100:.1f} % | {share / uniform * 100:.1f} % | {distance:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
