"""The base class of families of released weights, and the conversion of one of their files."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqpipe.errors import ConfigError, WeightsError
from vqpipe.models.autoencoder import Autoencoder, AutoencoderConfig, build_autoencoder
from vqpipe.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from vqpipe.models.released.checkpoint import DAMAGED, Weights, join_names
from vqpipe.models.vqgan import VqganConfig
from vqpipe.quantizers import QuantizerConfig

PATCH_LAYER = re.compile(r"main\.(?P<layer>\d\d?)\.(weight|bias|running_mean|running_var|num_batches_tracked)")
"""A name in a patch discriminator."""
RESOLUTION = 256
"""`VqganConfig.resolution` of every released VQGAN."""


STANDARDIZED = {"quantizer.shift": torch.zeros, "quantizer.scale": torch.ones}
"""Weights that only `standardize_codebook` sets, which is not in released code -> their values before."""


@dataclass(frozen=True)
class Released:
    """A released tokenizer, converted, on the CPU."""

    family: str
    autoencoder: Autoencoder
    discriminator: PatchDiscriminator | None
    """Its discriminator, for fine-tuning; None if the file has none, or one of another architecture."""
    image_size: int
    """Image side in pixels of its training."""
    notes: tuple[str, ...]
    """Choices made during conversion, for the user."""


class Family(ABC):
    """A file of one family of released weights.

    A subclass derives the config from tensor shapes (`config`) and maps our weight names to released ones where they
    differ (`released_name`).
    """

    name: ClassVar[str]
    containers: ClassVar[tuple[str, ...]] = ()
    """Preferred keys in a training state, of the weights that its authors evaluate."""
    discriminator: ClassVar[str] = "discriminator."
    """Prefix of the names of the discriminator."""
    ignored: ClassVar[tuple[str, ...]] = ()
    """Prefixes of known tensors that are not needed."""

    def __init__(self, weights: Weights, codebook: Tensor | None = None) -> None:
        self.weights = weights
        self.notes: list[str] = []
        if codebook is not None and not self.lacks_codebook():
            raise ConfigError(f"{weights.source} contains a codebook or needs none", "Omit --codebook")
        self.codebook = codebook

    @classmethod
    @abstractmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a file with these tensors is of this family. At most one family matches a file."""

    @abstractmethod
    def config(self) -> AutoencoderConfig:
        """The config of the model, with sizes from tensor shapes.

        Raises:
            WeightsError: a tensor that defines a size is absent or has a wrong number of dimensions.
        """

    def released_name(self, name: str) -> str:
        """The released name of our weight `name`; the same by default."""
        return name

    def value(self, name: str) -> Tensor | None:
        """The value of our weight `name`; None, recorded in `weights.missing`, if the file lacks it."""
        return self.weights.take(self.released_name(name))

    def use_averages(self, prefixes: tuple[str, ...]) -> None:
        """Use the moving averages of the weights under `prefixes`, if the file has any."""
        if self.weights.use_averages(prefixes):
            self.notes.append("used the moving averages under model_ema, which its authors evaluate")

    def image_size(self) -> int:
        """Image side in pixels of the training."""
        return 256

    def lacks_codebook(self) -> bool:
        """Whether the file was released without its codebook."""
        return False

    def level_sizes(self) -> dict[str, Any]:
        """The sizes of an encoder with the levels of VQGAN, as fields of our configs, from the shapes of its weights.

        Raises:
            WeightsError: a weight that defines a size is absent, or widths are not multiples of the first.
        """
        weights, released_name = self.weights, self.released_name
        levels = range(weights.count(released_name("encoder.down.")))
        base = weights.shape(released_name("encoder.conv_in.weight"), 4)[0]
        widths = [weights.shape(released_name(f"encoder.down.{level}.block.0.conv1.weight"), 4)[0] for level in levels]
        if any(width % base for width in widths):
            raise WeightsError(f"{weights.source}: levels of {widths} channels are not multiples of {base}")
        return {
            "base_channels": base,
            "channel_multipliers": tuple(width // base for width in widths),
            "num_res_blocks": weights.count(released_name("encoder.down.0.block.")),
        }

    def vqgan_config(self, quantizer: QuantizerConfig) -> VqganConfig:
        """The config of a VQGAN, with sizes from the shapes of its weights.

        Raises:
            WeightsError: as `level_sizes`.
        """
        sizes = self.level_sizes()
        levels = range(len(sizes["channel_multipliers"]))
        attending = [level for level in levels if self.weights.under(self.released_name(f"encoder.down.{level}.attn."))]
        return VqganConfig(
            quantizer=quantizer,
            **sizes,
            attention_resolutions=tuple(RESOLUTION // 2**level for level in attending),
            z_channels=self.weights.shape("quant_conv.weight", 4)[1],
            resolution=RESOLUTION,
        )


def load(family: Family) -> Released:
    """Build our networks with the weights of a file; every name and shape must match.

    Raises:
        WeightsError: a weight is missing, unexpected, or has another shape.
        NumericError: a weight contains NaN or infinity.
    """
    weights = family.weights
    with torch.device("meta"):
        autoencoder = build_autoencoder(family.config())
    fill(autoencoder, family.value, family.released_name, weights)
    discriminator = load_discriminator(family)
    weights.ignore(*family.ignored)
    if weights.missing:
        raise WeightsError(f"{weights.source}, as a {family.name} file, lacks {join_names(weights.missing)}", DAMAGED)
    if weights.unused:
        raise WeightsError(
            f"{weights.source}, as a {family.name} file, has unexpected weights: {join_names(list(weights.unused))}",
            "It is a variant that cannot be imported",
        )
    return Released(family.name, autoencoder, discriminator, family.image_size(), tuple(family.notes))


def fill(
    network: nn.Module,
    value: Callable[[str], Tensor | None],
    released_name: Callable[[str], str],
    weights: Weights,
) -> None:
    """Assign values to a network on the meta device. Missing values are skipped, to be reported together.

    Raises:
        WeightsError: a value has another shape or dtype.
    """
    state: dict[str, Tensor] = {}
    storages: set[int] = set()
    wrong = []
    for name, expected in network.state_dict().items():
        tensor = STANDARDIZED[name](expected.shape) if name in STANDARDIZED else value(name)
        if tensor is None:
            continue
        if tensor.shape != expected.shape:
            wrong.append(f"{released_name(name)} has shape {list(tensor.shape)}, not {list(expected.shape)}")
        if not expected.is_floating_point():  # BatchNorm's count of batches
            tensor = tensor.to(expected.dtype)
        elif not tensor.is_floating_point():
            wrong.append(f"{released_name(name)} has dtype {str(tensor.dtype).removeprefix('torch.')}")
        storage = tensor.untyped_storage().data_ptr()
        state[name] = tensor.clone() if storage in storages else tensor  # weights must not share memory
        storages.add(storage)
    if wrong:
        raise WeightsError(f"{weights.source} does not match: {join_names(wrong)}", DAMAGED)
    network.load_state_dict(state, strict=False, assign=True)


def load_discriminator(family: Family) -> PatchDiscriminator | None:
    """The discriminator of the file if it is a patch discriminator; others are ignored, with a note."""
    weights, prefix = family.weights, family.discriminator
    names = weights.under(prefix)
    if not names:
        return None
    parts = [PATCH_LAYER.fullmatch(name.removeprefix(prefix)) for name in names]
    last = max(int(part["layer"]) if part else 0 for part in parts)
    if None in parts or last < 5 or last % 3 != 2:  # 2 modules, 3 for each layer after the first, 1
        weights.ignore(prefix)
        family.notes.append("ignored its discriminator, which is not a patch discriminator")
        return None
    base_channels = weights.shape(f"{prefix}main.0.weight", 4)[0]
    config = DiscriminatorConfig(base_channels=base_channels, num_layers=(last - 2) // 3)
    with torch.device("meta"):
        network = PatchDiscriminator(config)
    fill(network, lambda name: weights.take(prefix + name), lambda name: prefix + name, weights)
    family.notes.append(
        f"kept its discriminator; to fine-tune with it, set discriminator.num_layers = {config.num_layers}"
        + (f" and discriminator.base_channels = {base_channels}" if base_channels != 64 else "")
    )
    return network
