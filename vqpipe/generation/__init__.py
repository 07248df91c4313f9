"""Generators: what is trained on a tokenizer's ids or latents, and draws new ones. Importing the room defines them all.

What takes seconds to import (diffusers, timm) is imported by whoever builds a network of it.
"""

from vqpipe.generation.base import (
    Generator,
    GeneratorConfig,
    SamplingConfig,
    Space,
    build_generator,
    generator_classes,
    guidance_scale,
)
from vqpipe.generation.dit import Dit, DitConfig
from vqpipe.generation.gpt import Gpt, GptConfig
from vqpipe.generation.llamagen import LlamaGen, LlamaGenConfig
from vqpipe.generation.sit import Sit, SitConfig
from vqpipe.generation.unet import Ldm, LdmConfig

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
    "generator_classes",
    "guidance_scale",
]
