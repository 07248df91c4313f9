"""VQGAN-LC (Zhu et al. 2024) and the baselines of its code: VQGAN, VQGAN-FC, VQGAN-EMA."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from vqpipe.errors import WeightsError
from vqpipe.models.released.family import Family
from vqpipe.models.vqgan import VqganConfig
from vqpipe.quantizers import EmaConfig, LcConfig, QuantizerConfig, VqConfig

CLIP_WIDTH = 768
"""Channels of a CLIP ViT-L/14 feature. Codes of this width are frozen features, and latents are normalized."""
OUR_PROJECTOR = "quantizer.projector."
OUR_NAMES = {
    "quantizer.codes": "tok_embeddings.weight",
    "quantizer.counts": "cluster_size",
    "quantizer.sums": "embed_avg",
}


class VqganLc(Family):
    """f8 and f16; the quantizer is detected from its tensors.

    A tuned codebook is imported as frozen, since the files do not differ. Codes of 768 channels without a projector are
    imported as features (Table 9, "w/o projector"); the files of a VQGAN of that width would not differ.
    """

    name = "vqgan-lc"
    ignored = ("perceptual_loss.",)

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        own = ("tok_embeddings.", "codebook_projection.", "discriminator.", "perceptual_loss.")
        networks = any(name.startswith("encoder.mid.") for name in tensors)
        another = any(name.startswith("quantize.") for name in tensors)
        return networks and not another and any(name.startswith(own) for name in tensors)

    def lacks_codebook(self) -> bool:
        return "tok_embeddings.weight" not in self.weights

    def config(self) -> VqganConfig:
        return self.vqgan_config(self.quantizer())

    def quantizer(self) -> QuantizerConfig:
        """The config of the quantizer, from its tensors."""
        weights = self.weights
        size, width = self.codebook_shape()
        code_dim = weights.shape("quant_conv.weight", 4)[0]
        if "cluster_size" in weights or "embed_avg" in weights:
            return EmaConfig(codebook_size=size, code_dim=code_dim, released_start=True)
        if not weights.under("codebook_projection.") and code_dim != CLIP_WIDTH:
            return VqConfig(codebook_size=size, code_dim=code_dim)
        if self.projector() == "none":
            self.notes.append(f"read its codes of {code_dim} channels as frozen features without a projector")
        return LcConfig(
            codebook_size=size,
            code_dim=code_dim,
            feature_dim=width,
            projector=self.projector(),
            normalize_latent=code_dim == CLIP_WIDTH,
        )

    def codebook_shape(self) -> torch.Size:
        """[K, F] of the stored codes."""
        if self.codebook is not None:
            return self.codebook.shape
        if self.lacks_codebook():
            raise WeightsError(
                f"{self.weights.source} lacks tok_embeddings.weight", "Pass its codebook with --codebook"
            )
        return self.weights.shape("tok_embeddings.weight", 2)

    def projector(self) -> Literal["linear", "mlp", "none"]:
        """The kind of projector in the file."""
        if not self.weights.under("codebook_projection."):
            return "none"
        return "mlp" if self.weights.under("codebook_projection.0.") else "linear"

    def released_name(self, name: str) -> str:
        if name.startswith(OUR_PROJECTOR):
            layer = name.removeprefix(OUR_PROJECTOR)
            return "codebook_projection." + (layer if self.projector() == "mlp" else layer.removeprefix("0."))
        return OUR_NAMES.get(name, name)

    def value(self, name: str) -> Tensor | None:
        if name == "quantizer.codes" and self.codebook is not None:
            return self.codebook
        return super().value(name)
