"""A quantizer of your own: `vq` with the gradient of the rotation trick.

vqpipe --import rotation_quantizer.py train --preset small --images photos --set model.quantizer.kind=rotation --out own
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vqpipe.quantizers import CodebookConfig, Quantized, VectorQuantizer
from vqpipe.quantizers.base import straight_through


@dataclass(frozen=True, kw_only=True)
class RotationConfig(CodebookConfig):
    """A learned codebook with the gradient of the rotation trick."""

    kind: ClassVar[str] = "rotation"

    rescale: bool = True
    """Multiply the gradient by |code| / |latent|, as in the paper; otherwise it is only rotated."""


class RotationQuantizer(VectorQuantizer):
    """Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick" (arXiv 2410.06424).

    The straight-through estimator copies the decoder's gradient from the code to the latent. Here the gradient is
    first rotated by the rotation that takes the code to the latent. The values are those of `vq`.
    """

    config_class = RotationConfig

    def __init__(self, config: RotationConfig) -> None:
        super().__init__(config)
        self.rescale = config.rescale

    def quantized(self, latent: Tensor, ids: Tensor) -> Quantized:
        codes = self.embed(ids).transpose(1, 2).reshape_as(latent)
        rotated = rotate(latent, codes.detach(), self.rescale)
        return Quantized(straight_through(rotated, codes), ids, self.losses(latent, codes))


def rotate(latent: Tensor, codes: Tensor, rescale: bool) -> Tensor:
    """Rotate each vector of float[B, C, h, w] onto its code; the rotation and the scale are constants."""
    start, end = F.normalize(latent.detach(), dim=1), F.normalize(codes, dim=1)
    middle = F.normalize(start + end, dim=1)
    rotated = latent - 2 * middle * (middle * latent).sum(1, keepdim=True)
    rotated = rotated + 2 * end * (start * latent).sum(1, keepdim=True)
    if not rescale:
        return rotated
    return rotated * (codes.norm(dim=1, keepdim=True) / latent.detach().norm(dim=1, keepdim=True).clamp(min=1e-6))
