"""LlamaGen's image tokenizers VQ-16 and VQ-8 (Sun et al. 2024): VQGAN's networks under other names.

Codes and latents meet on the unit sphere; the stored codes may be off it.
"""

from collections.abc import Collection

from vqpipe.models.released.family import Family
from vqpipe.models.released.sizes import vqgan_config
from vqpipe.models.vqgan import VqganConfig
from vqpipe.quantizers import VqConfig

MIDDLE = {"mid.block_1.": "mid.0.", "mid.attn_1.": "mid.1.", "mid.block_2.": "mid.2."}
"""Our names in the middle -> LlamaGen's."""


class LlamaGen(Family):
    """VQ-16 and VQ-8; where a training state keeps moving averages, those, which its authors evaluate."""

    name = "llamagen"
    containers = ("ema",)
    dropped = ("quantize.codebook_used",)

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:
        return any(name.startswith("encoder.conv_blocks.") for name in names)

    def config(self) -> VqganConfig:
        size, code_dim = self.weights.shape("quantize.embedding.weight", 2)
        return vqgan_config(
            self.weights, VqConfig(codebook_size=size, code_dim=code_dim, normalize=True), self.released
        )

    def released(self, name: str) -> str:
        """LlamaGen counts the decoder's levels from the lowest resolution up, we count them as the encoder's."""
        if name == "quantizer.codes":
            return "quantize.embedding.weight"
        for ours, theirs in MIDDLE.items():
            name = name.replace(ours, theirs)
        name = name.replace("encoder.down.", "encoder.conv_blocks.").replace(".block.", ".res.")
        if name.startswith("decoder.up."):
            level, rest = name.removeprefix("decoder.up.").split(".", 1)
            lowest = self.weights.count("encoder.conv_blocks.") - 1
            name = f"decoder.conv_blocks.{lowest - int(level)}.{rest}"
        return name
