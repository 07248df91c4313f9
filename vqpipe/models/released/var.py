"""VAR's multi-scale tokenizer (Tian et al. 2024): f16, ten scales of residuals over 4,096 codes of 32 channels."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vqpipe.errors import WeightsError
from vqpipe.models.released.checkpoint import DAMAGED, Weights
from vqpipe.models.released.family import Family
from vqpipe.models.vqgan import VqganConfig
from vqpipe.quantizers import MultiScaleConfig

PHIS = "quantize.quant_resi.qresi_ls."
USAGE = "quantize.ema_vocab_hit_SV"
"""Usage of each code by each scale, [S, K]."""


class Var(Family):
    """Tensor names are ours, except that attention has one convolution for queries, keys and values.

    The grids of the scales are not in the file; they are those for 256 pixels, scaled for other image sizes.
    """

    name = "var"
    ignored = (USAGE,)

    def __init__(self, weights: Weights, codebook: Tensor | None = None) -> None:
        super().__init__(weights, codebook)
        for name in [name for name in weights.tensors if ".qkv." in name]:
            joined = weights.tensors[name]
            if joined.layout != torch.strided or joined.ndim == 0 or len(joined) % 3:
                continue  # reported as missing q, k and v
            for part, tensor in zip("qkv", joined.chunk(3), strict=True):
                weights.tensors[name.replace(".qkv.", f".{part}.")] = tensor
            weights.ignore(name)

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        return any(name.startswith("quantize.quant_resi.") for name in tensors)

    def config(self) -> VqganConfig:
        weights = self.weights
        codebook_size, code_dim = weights.shape("quantize.embedding.weight", 2)
        quantizer = MultiScaleConfig(
            codebook_size=codebook_size, code_dim=code_dim, num_phis=weights.count(PHIS), metric="l2"
        )
        if USAGE in weights and weights.shape(USAGE, 2)[0] != len(quantizer.scales):
            raise WeightsError(
                f"{weights.source} has {weights.shape(USAGE, 2)[0]} scales, not the {len(quantizer.scales)} released",
                "Their grids are not in the file, so it cannot be imported",
            )
        kernel = weights.shape("quant_conv.weight", 4)[-1]
        return replace(self.vqgan_config(quantizer), quant_conv_kernel=3 if kernel == 3 else 1)

    def value(self, name: str) -> Tensor | None:
        kind = {"quantizer.phi_weights": "weight", "quantizer.phi_biases": "bias"}.get(name)
        if kind is None:
            return super().value(name)
        parts = [self.weights.take(f"{PHIS}{number}.{kind}") for number in range(self.weights.count(PHIS))]
        present = [part for part in parts if part is not None]
        if len({part.shape for part in present}) > 1:
            raise WeightsError(f"{self.weights.source}: the tensors {PHIS}*.{kind} differ in shape", DAMAGED)
        return torch.stack(present) if len(present) == len(parts) else None

    def released_name(self, name: str) -> str:
        return name.replace("quantizer.codes", "quantize.embedding.weight").replace("quantizer.phi_", f"{PHIS}*.")
