"""LlamaGen's image tokenizers VQ-16 and VQ-8 (Sun et al. 2024): the networks of VQGAN under other names.

Codes and latents are normalized for the search; the stored codes are not.
"""

from collections.abc import Collection

from vqpipe.models.released.family import Family
from vqpipe.models.vqgan import VqganConfig
from vqpipe.quantizers import VqConfig

MIDDLE = {"mid.block_1.": "mid.0.", "mid.attn_1.": "mid.1.", "mid.block_2.": "mid.2."}
"""Our names of the middle blocks -> LlamaGen's."""


class LlamaGen(Family):
    """VQ-16 and VQ-8. The moving averages of a training state are preferred, as in its evaluation."""

    name = "llamagen"
    containers = ("ema",)
    ignored = ("quantize.codebook_used",)

    @classmethod
    def matches(cls, names: Collection[str]) -> bool:
        return any(name.startswith("encoder.conv_blocks.") for name in names)

    def config(self) -> VqganConfig:
        size, code_dim = self.weights.shape("quantize.embedding.weight", 2)
        return self.vqgan_config(VqConfig(codebook_size=size, code_dim=code_dim, normalize=True))

    def released_name(self, name: str) -> str:
        """LlamaGen numbers the decoder's levels from the lowest resolution, we from the highest."""
        if name == "quantizer.codes":
            return "quantize.embedding.weight"
        for ours, theirs in MIDDLE.items():
            name = name.replace(ours, theirs)
        name = name.replace("encoder.down.", "encoder.conv_blocks.").replace(".block.", ".res.")
        if name.startswith("decoder.up."):
            level, module = name.removeprefix("decoder.up.").split(".", 1)
            lowest = self.weights.count("encoder.conv_blocks.") - 1
            name = f"decoder.conv_blocks.{lowest - int(level)}.{module}"
        return name
