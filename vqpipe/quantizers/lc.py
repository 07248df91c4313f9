"""`lc`: a frozen codebook of image features behind a learned projector, the quantizer of VQGAN-LC.

Zhu et al. 2024, "Scaling the Codebook Size of VQGAN to 100,000 with a Utilization Rate of 99%", section 3.
Shapes: B images, C channels of a code, F channels of a feature, K codes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from vqpipe.config import check_range
from vqpipe.distributed import broadcast
from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import CodebookConfig
from vqpipe.quantizers.derived import DerivedCodebook

MLP_WIDTH = 256
"""Hidden channels of the "mlp" projector, as released."""
CODES_PER_CHUNK = 65_536
"""Codes projected at a time, so that the activations of the projector take little memory."""
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this build of PyTorch offers oneDNN's product to float32 tensors."""

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`F.linear`, or another way to compute it: features, weight, bias -> outputs."""


@dataclass(frozen=True, kw_only=True)
class LcConfig(CodebookConfig):
    """A frozen codebook behind a trained projector."""

    kind: ClassVar[str] = "lc"

    code_dim: int = 8
    """Channels of a projected code."""
    feature_dim: int = 768
    """Channels of a stored code: 768 for CLIP ViT-L/14 features after its projection."""
    projector: Literal["linear", "mlp", "none"] = "linear"
    """Maps features to codes. "none" needs code_dim = feature_dim (Table 9, "w/o projector")."""
    tune_codebook: bool = False
    """Train the stored codes as well (Table 9, "w/o frozen codebook")."""
    codebook_init: Literal["artifact", "uniform"] = "artifact"
    """Source of the stored codes: a codebook artifact, or U(-1/K, 1/K), the random codebook of Table 6."""
    normalize_latent: bool = False
    """Normalize latents, but not codes, to unit length before the search. The released code does so where code_dim is
    768, unless the codebook is learned from scratch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "model.quantizer", "[1, inf)", "feature_dim")
        if self.projector == "none" and self.code_dim != self.feature_dim:
            raise ConfigError(
                f"without a projector a code is a feature: code_dim {self.code_dim} is not feature_dim "
                f"{self.feature_dim}",
                "Make the two equal, or set model.quantizer.projector = linear",
            )

    @property
    def needs_codebook(self) -> bool:
        return self.codebook_init == "artifact"

    def codebook_settings(self, size: int, dim: int) -> dict[str, int]:
        settings = {"codebook_size": size, "feature_dim": dim}
        return settings | {"code_dim": dim} if self.projector == "none" else settings


class FrozenCodebookQuantizer(DerivedCodebook):
    """Searches the projected codebook, then projects the selected codes with gradient.

    The released code projects all K codes with gradient in each forward pass. Projecting them without gradient for the
    search, and only the selected ones with gradient, gives the same gradient at a fraction of the cost. In both, the
    decoder's gradient does not reach the projector, which is trained by the "codebook" loss alone.

    On a CPU most of a training step is the projection of all codes, for which `onednn_linear` takes half the time of
    F.linear. Both are float32 products, which differ in rounding. Frozen weights project their codes once, by F.linear,
    so the ids of a finished tokenizer depend on no such choice.

    The stored codes are never changed: `standardize_codebook` stores (code - shift) * scale as two buffers, which are
    folded into the first layer of the projector.
    """

    config_class = LcConfig
    shift: Tensor
    scale: Tensor

    def __init__(self, config: LcConfig) -> None:
        super().__init__(config)
        size, feature_dim = config.codebook_size, config.feature_dim
        codes = torch.full((size, feature_dim), math.nan)
        if config.codebook_init == "uniform":
            codes.uniform_(-1 / size, 1 / size)
        if config.tune_codebook:
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)
        self.register_buffer("shift", torch.zeros(feature_dim))
        self.register_buffer("scale", torch.ones(()))
        self.projector = make_projector(config)
        self.normalize_latent = config.normalize_latent

    def search_input(self, latent: Tensor) -> Tensor:
        if self.normalize_latent:
            latent = F.normalize(latent.float(), dim=1)
        return super().search_input(latent)

    @torch.no_grad()
    def derive(self) -> Tensor:
        """All projected codes, without gradient."""
        linear = F.linear if self.is_constant or not suits_onednn(self.codes) else onednn_linear
        return torch.cat([self.project(features, linear) for features in self.codes.split(CODES_PER_CHUNK)])

    def raw_embed(self, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.project(self.codes[ids])
        if self.is_constant:
            return self.raw_codebook()[ids]
        if self.codes.is_cuda:
            return self.project(self.codes[ids])  # `unique` would wait for the GPU
        selected, inverse = ids.unique(return_inverse=True)
        return self.project(self.codes[selected])[inverse]

    def project(self, features: Tensor, linear: Linear = F.linear) -> Tensor:
        """float[R, F] -> float[R, C]: projector((features - shift) * scale)."""
        if len(self.projector) == 0:
            return (features - self.shift) * self.scale
        first, *others = self.projector
        assert isinstance(first, nn.Linear)
        weight = first.weight * self.scale
        hidden = linear(features, weight, first.bias - weight @ self.shift)
        for layer in others:
            hidden = layer(hidden)
        return hidden

    @torch.no_grad()
    def standardize_codebook(self) -> None:
        """Make the projector orthogonal, without biases, and set shift and scale so that codes have unit variance."""
        self.check_loaded()
        self.shift.copy_(self.codes.mean(0))
        self.scale.fill_(1.0)
        layers = [layer for layer in self.projector if isinstance(layer, nn.Linear)]
        for layer in layers:
            broadcast(nn.init.orthogonal_(layer.weight))
            layer.bias.zero_()
        projected = self.project(self.codes)
        self.scale.copy_(1 / projected.var(0, unbiased=False).mean().sqrt())
        if len(layers) > 1:  # the ReLU moves the mean; without biases the MLP is homogeneous, so the mean scales too
            layers[-1].bias.copy_(-projected.mean(0) * self.scale)


def suits_onednn(features: Tensor) -> bool:
    """Whether `onednn_linear` takes these features here. A graph of torch.compile has kernels of its own."""
    if torch.compiler.is_compiling() or isinstance(features, FakeTensor):
        return False
    return ONEDNN and features.device.type == "cpu" and features.dtype == torch.float32


def onednn_linear(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` of float32 without gradient, by oneDNN. For few outputs MKL, which F.linear calls on x86 CPUs, takes
    twice as long."""
    return torch.ops.mkldnn._linear_pointwise(features, weight, bias, "none", [], "")


def make_projector(config: LcConfig) -> nn.Sequential:
    """The released projector: Linear with weights from N(0, std 1/sqrt(C)), or an MLP with PyTorch's initialization."""
    if config.projector == "none":
        return nn.Sequential()
    if config.projector == "mlp":
        return nn.Sequential(nn.Linear(config.feature_dim, MLP_WIDTH), nn.ReLU(), nn.Linear(MLP_WIDTH, config.code_dim))
    linear = nn.Linear(config.feature_dim, config.code_dim)
    nn.init.normal_(linear.weight, std=config.code_dim**-0.5)
    return nn.Sequential(linear)
