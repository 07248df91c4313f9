"""`leech`: a fixed codebook, the 196,560 shortest vectors of the Leech lattice, the quantizer Lambda-24-SQ.

arXiv 2512.14697; the construction of the lattice is that of Conway & Sloane, "Sphere Packings, Lattices and Groups",
chapter 4, section 11. Shapes: K = 196,560 codes, C = 24 channels.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vqpipe.quantizers.base import CodebookConfig, CodebookQuantizer, QuantizerConfig

NUM_CODES, DIM = 196_560, 24
GENERATOR = 0b110001110101
"""The generator polynomial of the binary Golay code of length 23: x^11 + x^10 + x^6 + x^5 + x^4 + x^2 + 1."""


@dataclass(frozen=True, kw_only=True)
class LeechConfig(QuantizerConfig):
    """There are no settings: the lattice has its number of codes and of channels."""

    kind: ClassVar[str] = "leech"


class LeechQuantizer(CodebookQuantizer):
    """Latents scaled to unit length, the code of the largest inner product, and no loss: nothing trains the codes.

    No image features and no k-means: a control for frozen codebooks of features (`lc`). The codes are computed, not
    stored with the weights. Their order, which gives the ids, is that of `leech_vectors`.
    """

    config_class = LeechConfig  # the base class gets the CodebookConfig below
    loss_names = ()

    def __init__(self, config: LeechConfig) -> None:
        super().__init__(CodebookConfig(codebook_size=NUM_CODES, code_dim=DIM, normalize=True))
        self.config = config
        # On the CPU also where the network is built on the meta device: loading weights does not fill it.
        codes = torch.tensor(leech_vectors(), dtype=torch.float32, device="cpu")
        self.register_buffer("codes", codes / 32**0.5, persistent=False)

    def maybe_normalize(self, vectors: Tensor, dim: int = -1) -> Tensor:
        """Normalize latents; the codes have unit length already."""
        return vectors if dim == -1 else super().maybe_normalize(vectors, dim)

    def losses(self, latent: Tensor, codes: Tensor) -> dict[str, Tensor]:
        return {}


@cache
def golay_words() -> np.ndarray:
    """The 4,096 words of the extended binary Golay code, int8[4096, 24] of 0 and 1, in the order of their messages.

    A message of 12 bits times the generator polynomial over GF(2), lowest power first, and a parity bit.
    """
    words = np.zeros((4096, DIM), np.int8)
    for message in range(4096):
        for shift in range(12):
            if message >> shift & 1:
                words[message, shift : shift + 12] ^= np.array([GENERATOR >> i & 1 for i in range(12)], np.int8)
    words[:, 23] = words.sum(1) % 2
    return words


@cache
def leech_vectors() -> np.ndarray:
    """The shortest vectors of the Leech lattice, scaled to integers, int8[196560, 24]; their squared length is 32.

    In this order, words in the order of `golay_words`:

    - 97,152: +-2 at the 8 ones of each of the 759 words of weight 8, with an even number of minus signs;
    - 98,304: for each of the 4,096 words and each position, -3 there and +1 elsewhere, then the signs at the ones of
      the word changed;
    - 1,104: +-4 at two positions.
    """
    words = golay_words()
    even = np.array([signs for signs in product((1, -1), repeat=8) if np.prod(signs) > 0], np.int8)  # [128, 8]
    octads = words[words.sum(1) == 8]
    first = np.zeros((len(octads), len(even), DIM), np.int8)
    for block, octad in zip(first, octads, strict=True):
        block[:, np.flatnonzero(octad)] = 2 * even
    second = (1 - 2 * words)[:, None, :] * (1 - 4 * np.eye(DIM, dtype=np.int8))
    third = np.zeros((276, 4, DIM), np.int8)
    for block, pair in zip(third, combinations(range(DIM), 2), strict=True):
        block[:, pair] = 4 * np.array([*product((1, -1), repeat=2)], np.int8)
    return np.concatenate([part.reshape(-1, DIM) for part in (first, second, third)])
