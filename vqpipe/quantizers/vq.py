"""`vq`: a codebook learned by gradient descent, the quantizer of VQ-VAE and VQGAN.

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

    "FC" there is the low-dimensional half of ViT-VQGAN's factorised codes (Yu et al. 2022); the other half, codes
    on the unit sphere, the released code leaves out: metric = "cosine" compares as if it were there.
    """

    kind: ClassVar[str] = "vq"


class VectorQuantizer(CodebookQuantizer):
    """Codes start uniform in (-1/K, 1/K) and follow the "codebook" loss (van den Oord et al. 2017, eq. 3).

    Under `normalize` they start as unit vectors, as in LlamaGen and MGVQ.
    """

    config_class: ClassVar[type[CodebookConfig]] = VqConfig

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config)
        bound = 1 / config.codebook_size
        codes = torch.empty(config.codebook_size, config.code_dim).uniform_(-bound, bound)
        self.codes = nn.Parameter(self.on_sphere(codes))

    def raw_codebook(self) -> Tensor:
        return self.codes.float()

    def raw_embed(self, ids: Tensor) -> Tensor:
        return self.codes[ids].float()

    @torch.no_grad()
    def standardize_codebook(self) -> None:
        self.codes.copy_(self.on_sphere(standardized(self.codes)))


def standardized(codes: Tensor) -> Tensor:
    """float[K, C] centred on zero and scaled so that the variance, meant over channels, is 1."""
    centred = codes - codes.mean(0)
    return centred / centred.square().mean().sqrt()
