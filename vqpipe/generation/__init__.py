"""Generators: networks trained on a tokenizer's ids or latents that sample new images.

Importing this package registers them all.

diffusers and timm, which take seconds to import, are imported when a network that needs them is built.
"""

from vqpipe.generation.base import (
    Generator,
    GeneratorConfig,
    SamplingConfig,
    Space,
    build_generator,
    guidance_scale,
)
from vqpipe.generation.dit import Dit, DitConfig
from vqpipe.generation.gpt import Gpt, GptConfig
from vqpipe.generation.ldm import Ldm, LdmConfig
from vqpipe.generation.llamagen import LlamaGen, LlamaGenConfig
from vqpipe.generation.sit import Sit, SitConfig

__all__ = [
    "Dit",
    "DitConfig",
    "Generator",
    "GeneratorConfig",
    "Gpt",
    "GptConfig",
    "Ldm",
    "LdmConfig",
    "LlamaGen",
    "LlamaGenConfig",
    "SamplingConfig",
    "Sit",
    "SitConfig",
    "Space",
    "build_generator",
    "guidance_scale",
]
