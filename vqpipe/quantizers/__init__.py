"""Quantizers: latents to discrete ids and back, behind one interface."""

from vqpipe.quantizers.base import (
    CodebookConfig,
    CodebookQuantizer,
    Quantized,
    Quantizer,
    QuantizerConfig,
    TokenLayout,
    build_quantizer,
)
from vqpipe.quantizers.cvq import ClusteredQuantizer, CvqConfig
from vqpipe.quantizers.ema import EmaConfig, EmaQuantizer
from vqpipe.quantizers.fsq import FiniteScalarQuantizer, FsqConfig
from vqpipe.quantizers.ibq import IbqConfig, IndexBackpropagationQuantizer
from vqpipe.quantizers.lc import FrozenCodebookQuantizer, LcConfig
from vqpipe.quantizers.lfq import LfqConfig, LookupFreeQuantizer
from vqpipe.quantizers.multi_group import MultiGroupConfig, MultiGroupQuantizer
from vqpipe.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer
from vqpipe.quantizers.residual import ResidualConfig, ResidualQuantizer
from vqpipe.quantizers.simvq import SimVqConfig, SimVqQuantizer
from vqpipe.quantizers.vq import VectorQuantizer, VqConfig

__all__ = [
    "ClusteredQuantizer",
    "CodebookConfig",
    "CodebookQuantizer",
    "CvqConfig",
    "EmaConfig",
    "EmaQuantizer",
    "FiniteScalarQuantizer",
    "FrozenCodebookQuantizer",
    "FsqConfig",
    "IbqConfig",
    "IndexBackpropagationQuantizer",
    "LcConfig",
    "LfqConfig",
    "LookupFreeQuantizer",
    "MultiGroupConfig",
    "MultiGroupQuantizer",
    "MultiScaleConfig",
    "MultiScaleQuantizer",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "ResidualConfig",
    "ResidualQuantizer",
    "SimVqConfig",
    "SimVqQuantizer",
    "TokenLayout",
    "VectorQuantizer",
    "VqConfig",
    "build_quantizer",
]
