"""Generators: what is trained on a tokenizer's ids or latents, and draws new ones."""

from vqpipe.generation.base import (
    Generator,
    GeneratorConfig,
    SamplingConfig,
    Space,
    build_generator,
    generator_classes,
    guidance_scale,
)
from vqpipe.generation.gpt import Gpt, GptConfig
from vqpipe.generation.llamagen import LlamaGen, LlamaGenConfig

__all__ = [
    "Generator",
    "GeneratorConfig",
    "Gpt",
    "GptConfig",
    "LlamaGen",
    "LlamaGenConfig",
    "SamplingConfig",
    "Space",
    "build_generator",
    "generator_classes",
    "guidance_scale",
]
