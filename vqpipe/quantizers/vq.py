"""`vq`: a codebook trained by gradient descent, the quantizer of VQ-VAE and VQGAN.

Shapes: K codes, C channels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vqpipe.quantizers.base import CodebookConfig, CodebookQuantizer


@dataclass(frozen=True, kw_only=True)
class VqConfig(CodebookConfig):
    """A learned codebook. With code_dim 8 it is VQGAN-FC of the VQGAN-LC paper, with 256 its VQGAN.

    "FC" refers to the factorized codes of ViT-VQGAN (Yu et al. 2022), which are low-dimensional and of unit length. The
    released code of VQGAN-LC omits the normalization; metric = "cosine" searches as if it were there.
    """

    kind: ClassVar[str] = "vq"


class VectorQuantizer(CodebookQuantizer):
    """Codes are initialized uniformly in (-1/K, 1/K) and trained by the "codebook" loss (van den Oord et al., eq. 3).

    With `normalize` they are initialized as unit vectors, as in LlamaGen and MGVQ.
    """

    config_class: ClassVar[type[CodebookConfig]] = VqConfig

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config)
        bound = 1 / config.codebook_size
        codes = torch.empty(config.codebook_size, config.code_dim).uniform_(-bound, bound)
        self.codes = nn.Parameter(self.maybe_normalize(codes))

    def raw_codebook(self) -> Tensor:
        return self.codes.float()

    def raw_embed(self, ids: Tensor) -> Tensor:
        return self.codes[ids].float()

    @torch.no_grad()
    def standardize_codebook(self) -> None:
        self.codes.copy_(self.maybe_normalize(standardized(self.codes)))


def standardized(codes: Tensor) -> Tensor:
    """Center float[K, C] on zero and scale it to unit variance, averaged over channels."""
    centered = codes - codes.mean(0)
    return centered / centered.square().mean().sqrt()
