"""LlamaGen's image tokenizers VQ-16 and VQ-8 (Sun et al. 2024): the networks of VQGAN under other names.

Codes and latents are normalized for the search; the stored codes are not. FVQ (Chang et al. 2025) uses the same
networks and names without normalization.
"""

from collections.abc import Mapping

from torch import Tensor

from vqpipe.models.released.family import Family
from vqpipe.models.vqgan import VqganConfig
from vqpipe.quantizers import VqConfig

CODES = "quantize.embedding.weight"
WIDE = 64
"""Codes of FVQ have at least this many channels; LlamaGen's have 8."""
MIDDLE = {"mid.block_1.": "mid.0.", "mid.attn_1.": "mid.1.", "mid.block_2.": "mid.2."}
"""Our names of the middle blocks -> LlamaGen's."""


class LlamaGen(Family):
    """VQ-16 and VQ-8. The moving averages of a training state are preferred, as in its evaluation."""

    name = "llamagen"
    containers = ("ema",)
    ignored = ("quantize.codebook_used",)

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        return has_networks(tensors) and not has_wide_codes(tensors)

    def config(self) -> VqganConfig:
        size, code_dim = self.weights.shape(CODES, 2)
        return self.vqgan_config(VqConfig(codebook_size=size, code_dim=code_dim, normalize=True))

    def released_name(self, name: str) -> str:
        """LlamaGen numbers the decoder's levels from the lowest resolution, we from the highest."""
        if name == "quantizer.codes":
            return CODES
        for ours, theirs in MIDDLE.items():
            name = name.replace(ours, theirs)
        name = name.replace("encoder.down.", "encoder.conv_blocks.").replace(".block.", ".res.")
        if name.startswith("decoder.up."):
            level, module = name.removeprefix("decoder.up.").split(".", 1)
            lowest = self.weights.count("encoder.conv_blocks.") - 1
            name = f"decoder.conv_blocks.{lowest - int(level)}.{module}"
        return name


class Fvq(LlamaGen):
    """f16 with 16,384 codes of 256 channels, in the format in which its authors publish it.

    In training its codes are the output of a projector (VQBridge) of a learned table. The published file contains that
    output as a plain codebook. Its code searches by squared L2 distance, and normalizes only on request
    (`--codebook-l2-norm`). The training state with the projector is not a published format.
    """

    name = "fvq"

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        return has_networks(tensors) and has_wide_codes(tensors)

    def config(self) -> VqganConfig:
        size, code_dim = self.weights.shape(CODES, 2)
        self.notes.append(
            "read as FVQ, with codes that are not normalized; if it is a LlamaGen with wide codes, pass "
            "--family llamagen"
        )
        return self.vqgan_config(VqConfig(codebook_size=size, code_dim=code_dim))


def has_networks(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("encoder.conv_blocks.") for name in tensors)


def has_wide_codes(tensors: Mapping[str, Tensor]) -> bool:
    return CODES in tensors and tensors[CODES].ndim == 2 and tensors[CODES].shape[1] >= WIDE
