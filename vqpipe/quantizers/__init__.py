"""Quantizers: latents to discrete ids and back, all behind one interface. Importing the room defines them all."""

from vqpipe.quantizers.base import (
    CodebookConfig,
    CodebookQuantizer,
    Quantized,
    Quantizer,
    QuantizerConfig,
    TokenLayout,
    build_quantizer,
    quantizer_classes,
)
from vqpipe.quantizers.ema import EmaConfig, EmaQuantizer
from vqpipe.quantizers.lc import FrozenCodebookQuantizer, LcConfig
from vqpipe.quantizers.vq import VectorQuantizer, VqConfig

__all__ = [
    "CodebookConfig",
    "CodebookQuantizer",
    "EmaConfig",
    "EmaQuantizer",
    "FrozenCodebookQuantizer",
    "LcConfig",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "TokenLayout",
    "VectorQuantizer",
    "VqConfig",
    "build_quantizer",
    "quantizer_classes",
]
