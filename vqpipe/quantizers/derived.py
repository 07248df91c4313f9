"""Codebooks that weights compute from stored codes, such as frozen features of images.

Shapes: K codes, C channels of a code, F channels of a stored code.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import CodebookConfig, CodebookQuantizer


class DerivedCodebook(CodebookQuantizer):
    """A subclass defines the stored `codes`, float[K, F], and `derive`. Those of a codebook artifact are NaN at first.

    While the weights are frozen, the codebook is computed once.
    """

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config)
        self.loaded = not config.needs_codebook  # once true, the codes are not checked again, which waits for the GPU
        self.derived: tuple[tuple[int, ...], Tensor] | None = None  # weights_state(), the codebook

    @abstractmethod
    def derive(self) -> Tensor:
        """The codebook before normalization, float32[K, C]."""

    def raw_codebook(self) -> Tensor:
        """`derive` in float32 under any autocast; cached while the weights are frozen, but computed in every call of a
        graph of torch.compile.

        Raises:
            ConfigError: no codebook has been loaded.
        """
        self.check_loaded()
        with torch.autocast(self.codes.device.type, enabled=False):
            if not self.is_constant or torch.compiler.is_compiling():
                return self.derive()
            state = self.weights_state()
            if self.derived is None or self.derived[0] != state:
                with torch.no_grad():
                    self.derived = state, self.derive()
            return self.derived[1]

    @property
    def is_constant(self) -> bool:
        """Whether no weight can change. (Fused optimizers change weights without changing their versions.)"""
        return not self.training and not any(parameter.requires_grad for parameter in self.parameters())

    def weights_state(self) -> tuple[int, ...]:
        """Numbers that change whenever a weight is changed in place or replaced."""
        tensors = (*self.parameters(), *self.buffers())
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        return (*versions, *(tensor.data_ptr() for tensor in tensors))

    def check_loaded(self) -> None:
        """Raise a ConfigError if the codes are still those before `load_codebook`."""
        if self.loaded or torch.compiler.is_compiling():
            return  # in a graph, the search then finds codes that are NaN
        if bool(self.codes[0, 0].isnan()):
            raise self.unsupported("has no codebook yet", "Pass --codebook DIR (vqpipe kmeans makes one)")
        self.loaded = True

    @torch.no_grad()
    def load_codebook(self, codebook: Tensor) -> None:
        if codebook.shape != self.codes.shape:
            (k, dim), (size, stored_dim) = codebook.shape, self.codes.shape
            follow = self.config.codebook_settings(k, dim)
            needed = [f"model.quantizer.{key}={n}" for key, n in follow.items() if n != getattr(self.config, key)]
            raise ConfigError(
                f"the codebook holds {k} codes of {dim} channels, the model expects {size} of {stored_dim}",
                f"Set {' and '.join(needed)}, or pass another codebook",
            )
        self.codes.copy_(codebook)
        self.loaded = True
