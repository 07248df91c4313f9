"""`vq`: a codebook trained by gradient descent, the quantizer of VQ-VAE and VQGAN.

Shapes: K codes, C channels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import added
from vqpipe.quantizers.base import CodebookConfig, CodebookQuantizer


@dataclass(frozen=True, kw_only=True)
class VqConfig(CodebookConfig):
    """A learned codebook. With code_dim 8 it is VQGAN-FC of the VQGAN-LC paper, with 256 its VQGAN.

    "FC" refers to the factorized codes of ViT-VQGAN (Yu et al. 2022), which are low-dimensional and of unit length. The
    released code of VQGAN-LC omits the normalization; metric = "cosine" searches as if it were there.
    """

    kind: ClassVar[str] = "vq"

    decorrelate: bool = added(False)
    """Add the loss "decorrelation" of DimVQ (ICML 2026): with the codes scaled to unit length and G = codes^T codes,
    the mean squared off-diagonal element of G. It keeps a codebook from collapsing to few dimensions. Its authors
    weight it by 1e-3, and find 1e-3 to 1e-1 alike."""


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
        self.decorrelate = isinstance(config, VqConfig) and config.decorrelate
        if self.decorrelate:
            self.loss_names = (*type(self).loss_names, "decorrelation")  # type: ignore[misc]

    def losses(self, latent: Tensor, codes: Tensor) -> dict[str, Tensor]:
        losses = super().losses(latent, codes)
        return losses | {"decorrelation": decorrelation(self.raw_codebook())} if self.decorrelate else losses

    @torch.no_grad()
    def standardize_codebook(self) -> None:
        self.codes.copy_(self.maybe_normalize(standardized(self.codes)))


def decorrelation(codes: Tensor) -> Tensor:
    """The mean squared off-diagonal element of codes^T codes, a scalar, for float[K, C] scaled to unit length."""
    unit = F.normalize(codes, dim=1)
    gram = unit.T @ unit
    return (gram - gram.diagonal().diag()).square().sum() / max(1, gram.numel() - len(gram))


def standardized(codes: Tensor) -> Tensor:
    """Center float[K, C] on zero and scale it to unit variance, averaged over channels."""
    centered = codes - codes.mean(0)
    return centered / centered.square().mean().sqrt()
