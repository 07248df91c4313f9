"""Quantizers: latents to discrete ids and back, behind one interface."""

from vqpipe.quantizers.base import (
    CodebookConfig,
    CodebookQuantizer,
    Quantized,
    Quantizer,
    QuantizerConfig,
    build_quantizer,
)
from vqpipe.quantizers.bsq import BinarySphericalQuantizer, BsqConfig
from vqpipe.quantizers.cvq import ClusteredQuantizer, CvqConfig
from vqpipe.quantizers.diveq import DiveqConfig, DiveqQuantizer
from vqpipe.quantizers.ema import EmaConfig, EmaQuantizer
from vqpipe.quantizers.fsq import FiniteScalarQuantizer, FsqConfig
from vqpipe.quantizers.gq import GaussianQuantizer, GqConfig
from vqpipe.quantizers.ibq import IbqConfig, IndexBackpropagationQuantizer
from vqpipe.quantizers.layout import TokenLayout
from vqpipe.quantizers.lc import FrozenCodebookQuantizer, LcConfig
from vqpipe.quantizers.leech import LeechConfig, LeechQuantizer
from vqpipe.quantizers.lfq import LfqConfig, LookupFreeQuantizer
from vqpipe.quantizers.multi_group import MultiGroupConfig, MultiGroupQuantizer
from vqpipe.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer
from vqpipe.quantizers.regvq import RegularizedQuantizer, RegVqConfig
from vqpipe.quantizers.residual import ResidualConfig, ResidualQuantizer
from vqpipe.quantizers.simvq import SimVqConfig, SimVqQuantizer
from vqpipe.quantizers.sqvae import SqvaeConfig, StochasticQuantizer
from vqpipe.quantizers.vq import VectorQuantizer, VqConfig
from vqpipe.quantizers.vqbridge import BridgedQuantizer, VqBridgeConfig

__all__ = [
    "BinarySphericalQuantizer",
    "BridgedQuantizer",
    "BsqConfig",
    "ClusteredQuantizer",
    "CodebookConfig",
    "CodebookQuantizer",
    "CvqConfig",
    "DiveqConfig",
    "DiveqQuantizer",
    "EmaConfig",
    "EmaQuantizer",
    "FiniteScalarQuantizer",
    "FrozenCodebookQuantizer",
    "FsqConfig",
    "GaussianQuantizer",
    "GqConfig",
    "IbqConfig",
    "IndexBackpropagationQuantizer",
    "LcConfig",
    "LeechConfig",
    "LeechQuantizer",
    "LfqConfig",
    "LookupFreeQuantizer",
    "MultiGroupConfig",
    "MultiGroupQuantizer",
    "MultiScaleConfig",
    "MultiScaleQuantizer",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "RegVqConfig",
    "RegularizedQuantizer",
    "ResidualConfig",
    "ResidualQuantizer",
    "SimVqConfig",
    "SimVqQuantizer",
    "SqvaeConfig",
    "StochasticQuantizer",
    "TokenLayout",
    "VectorQuantizer",
    "VqBridgeConfig",
    "VqConfig",
    "build_quantizer",
]
