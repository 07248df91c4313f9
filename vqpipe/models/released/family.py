"""What a family of released weights has to say about itself, and how one of its files becomes our networks."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vqpipe.errors import ConfigError, WeightsError
from vqpipe.models.autoencoder import Autoencoder, AutoencoderConfig, build_autoencoder
from vqpipe.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from vqpipe.models.released.checkpoint import NOT_WHOLE, Weights, listed

PATCH_LAYER = re.compile(r"main\.(?P<layer>\d\d?)\.(weight|bias|running_mean|running_var|num_batches_tracked)")
"""A name in a patch discriminator, whose convolutions and BatchNorms are numbered through."""


@dataclass(frozen=True)
class Released:
    """A released tokenizer as our networks, on the CPU."""

    family: str
    autoencoder: Autoencoder
    discriminator: PatchDiscriminator | None
    """The network it was trained against, to go on with in fine-tuning; None where the file has none of our kind."""
    image_size: int
    """Image side in pixels that it was trained at."""
    notes: tuple[str, ...]
    """What was chosen, or left out, that its user may want to know."""


class Family(ABC):
    """One family of released weights, and one file of it.

    A subclass tells the sizes from the tensors' shapes (`config`) and where each of our weights comes from
    (`released`). All else, the strictness too, is the same for every family.
    """

    name: ClassVar[str]
    containers: ClassVar[tuple[str, ...]] = ()
    """Where in a training state the weights are that its authors evaluate, if that is not the usual place."""
    discriminator: ClassVar[str] = "discriminator."
    """What the discriminator's names begin with."""
    dropped: ClassVar[tuple[str, ...]] = ()
    """What names begin with that are known and not needed."""

    def __init__(self, weights: Weights, codebook: Tensor | None = None) -> None:
        self.weights = weights
        self.notes: list[str] = []
        if codebook is not None and not self.lacks_codebook():
            raise ConfigError(f"{weights.source} needs no codebook beside its weights", "Leave --codebook out")
        self.codebook = codebook

    @classmethod
    @abstractmethod
    def recognises(cls, names: Collection[str]) -> bool:
        """Whether a file with these names is of this family."""

    @abstractmethod
    def config(self) -> AutoencoderConfig:
        """The model, its sizes read off the shapes.

        Raises:
            WeightsError: a tensor that tells a size is absent or misshapen.
        """

    @abstractmethod
    def released(self, name: str) -> str:
        """The released name of our weight `name`."""

    def value(self, name: str) -> Tensor | None:
        """The value of our weight `name`; None where the file lacks it, which `weights.missing` then says."""
        return self.weights.take(self.released(name))

    def use_averages(self, prefixes: tuple[str, ...]) -> None:
        """Take the moving averages of what is under `prefixes`, where the file keeps some."""
        if self.weights.use_averages(prefixes):
            self.notes.append("its weights are the moving averages under model_ema, the ones its authors evaluate")

    def image_size(self) -> int:
        """Image side in pixels that the weights were trained at, as their authors say."""
        return 256

    def lacks_codebook(self) -> bool:
        """Whether the file is released without its codebook, which has to be given."""
        return False


def load(family: Family) -> Released:
    """Our networks with the file's weights, each name and shape accounted for.

    Raises:
        WeightsError: a weight is missing, has another shape, or has no place in the networks of its family.
        NumericError: a weight holds NaN or infinity.
    """
    weights = family.weights
    with torch.device("meta"):
        autoencoder = build_autoencoder(family.config())
    fill(autoencoder, family.value, family.released, weights)
    discriminator = load_discriminator(family)
    weights.drop(*family.dropped)
    if weights.missing:
        raise WeightsError(f"{weights.source}, as a {family.name} file, lacks {listed(weights.missing)}", NOT_WHOLE)
    if weights.rest:
        raise WeightsError(
            f"{weights.source} holds what the family {family.name} has no place for: {listed(list(weights.rest))}",
            "It is a variant that cannot be imported",
        )
    return Released(family.name, autoencoder, discriminator, family.image_size(), tuple(family.notes))


def fill(
    network: nn.Module,
    value: Callable[[str], Tensor | None],
    released: Callable[[str], str],
    weights: Weights,
) -> None:
    """Give a network on the meta device its values; those that are missing are passed over, to be told together.

    Raises:
        WeightsError: a value has another shape; its `released` name is told.
    """
    given: dict[str, Tensor] = {}
    places: set[int] = set()
    wrong = []
    for name, expected in network.state_dict().items():
        tensor = value(name)
        if tensor is None:
            continue
        if tensor.shape != expected.shape:
            wrong.append(f"{released(name)} has shape {list(tensor.shape)}, not {list(expected.shape)}")
        if not expected.is_floating_point():  # BatchNorm's count of batches
            tensor = tensor.to(expected.dtype)
        elif not tensor.is_floating_point():
            wrong.append(f"{released(name)} holds {str(tensor.dtype).removeprefix('torch.')}, not numbers of a network")
        place = tensor.untyped_storage().data_ptr()
        given[name] = tensor.clone() if place in places else tensor  # two weights must not move together
        places.add(place)
    if wrong:
        raise WeightsError(f"{weights.source} does not fit: {listed(wrong)}", NOT_WHOLE)
    network.load_state_dict(given, strict=False, assign=True)


def load_discriminator(family: Family) -> PatchDiscriminator | None:
    """The file's discriminator where it is a patch discriminator; one of another kind is left out, with a note."""
    weights, prefix = family.weights, family.discriminator
    names = weights.under(prefix)
    if not names:
        return None
    parts = [PATCH_LAYER.fullmatch(name.removeprefix(prefix)) for name in names]
    last = max(int(part["layer"]) if part else 0 for part in parts)
    if None in parts or last < 5 or last % 3 != 2:  # 2 modules, 3 for each layer after the first, 1
        weights.drop(prefix)
        family.notes.append("its discriminator is not a patch discriminator, and is left out")
        return None
    base_channels = weights.shape(f"{prefix}main.0.weight", 4)[0]
    config = DiscriminatorConfig(base_channels=base_channels, num_layers=(last - 2) // 3)
    with torch.device("meta"):
        network = PatchDiscriminator(config)
    fill(network, lambda name: weights.take(prefix + name), lambda name: prefix + name, weights)
    family.notes.append(
        f"its discriminator is kept; to fine-tune with it, set discriminator.num_layers = {config.num_layers}"
        + (f" and discriminator.base_channels = {base_channels}" if base_channels != 64 else "")
    )
    return network
