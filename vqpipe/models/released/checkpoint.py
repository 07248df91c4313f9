"""A released file as tensors by name, with a record of which of them found a place.

Files come from other people: nothing in them runs. A pickle is read with `weights_only`, and the few classes that
training states mention beside their tensors are read as inert objects.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqpipe.errors import NumericError, WeightsError
from vqpipe.weights import load_tensors

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before a name."""
CONTAINERS = ("model", "state_dict", "ema")
"""Where a training state keeps its weights."""
BARE = ""
"""The container of a file that is its weights and nothing else."""
DISCRIMINATOR = "discriminator"
"""Where LlamaGen's training state keeps the other network."""
AVERAGES = "model_ema."
"""Where Lightning modules keep moving averages: each under its parameter's name, the dots left out."""
AVERAGES_ASIDE = tuple(
    f"{AVERAGES}{rest}" for rest in ("decay", "num_updates", "lossdiscriminator", "lossperceptual_loss")
)
"""What lies there beside the networks' averages, and is not needed."""
NOT_WHOLE = "It is damaged, or of another family"
"""What to think of a file whose tensors are not those of its family."""
SHOWN = 3
"""Names that an error lists; the rest it counts."""


class Inert:
    """Stands for a class that a training state mentions: takes what the file says, and does nothing with it."""

    def __init__(self, *args: Any) -> None:
        pass


HARMLESS = {
    "argparse.Namespace": Inert,
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": Inert,
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping": Inert,
}
"""The command line that VQGAN-LC and LlamaGen keep; the callbacks whose classes Lightning, up to 1.4, has as keys."""


class Checkpoint:
    """The containers of tensors in one released file, with prefixes stripped from their names.

    Raises:
        WeightsError: the file is absent, cannot be read, or keeps no weights where training states keep them.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise WeightsError(f"{path} is not a file", "Name the released file of weights")
        content: Any = load_tensors(path, harmless=HARMLESS, mmap=True)
        self.path = path
        self.containers: dict[str, dict[str, Tensor]] = {}
        if not isinstance(content, dict):
            raise WeightsError(f"{path} holds no weights by name", "A codebook alone is given with --codebook")
        for key in (*CONTAINERS, DISCRIMINATOR):
            if is_weights(content.get(key)):
                self.containers[key] = self.stripped(content[key])
        if not self.containers and is_weights(content):
            self.containers[BARE] = self.stripped(content)
        self.keys = [str(key) for key in content]
        if not self.containers.keys() & {*CONTAINERS, BARE}:
            raise WeightsError(
                f"{path} keeps no weights under {', '.join(CONTAINERS)}, nor is it weights alone",
                "Save its state_dict by itself",
            )

    def stripped(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under the names that the networks' authors gave them."""
        renamed = {strip(name): tensor for name, tensor in tensors.items()}
        if len(renamed) < len(tensors):
            raise WeightsError(f"{self.path} holds the same weight twice, under different prefixes")
        return renamed

    def left_out(self, container: str) -> list[str]:
        """What the file holds beside the container in use and the discriminator."""
        return [] if container == BARE else [key for key in self.keys if key not in (container, DISCRIMINATOR)]

    def weights(self, preferred: tuple[str, ...]) -> tuple[str, "Weights"]:
        """The first container there is, with its name, and with the discriminator's where that has its own."""
        key = next(key for key in (*preferred, *CONTAINERS, BARE) if key in self.containers)
        beside = self.containers.get(DISCRIMINATOR, {})
        discriminator = {f"{DISCRIMINATOR}.{name}": tensor for name, tensor in beside.items()}
        return key, Weights(self.path, {**self.containers[key], **discriminator})


class Weights:
    """Tensors by released name, and which of them are still without a place.

    `take` and `drop` give a place; what then stands in `rest` or `missing` says that the file does not fit.
    """

    def __init__(self, source: Path, tensors: dict[str, Tensor]) -> None:
        self.source = source
        self.tensors = tensors
        self.rest = dict.fromkeys(tensors)
        self.missing: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str, ndim: int) -> torch.Size:
        """The shape of a tensor that sizes are read from.

        Raises:
            WeightsError: it is absent, or has not `ndim` dimensions.
        """
        if name not in self.tensors:
            raise WeightsError(f"{self.source} lacks {name}", NOT_WHOLE)
        shape = self.tensors[name].shape
        if len(shape) != ndim or not all(shape):
            raise WeightsError(
                f"{self.source}: {name} has shape {list(shape)}, {ndim} dimensions are expected", NOT_WHOLE
            )
        return shape

    def under(self, prefix: str) -> list[str]:
        """The names that begin so."""
        return [name for name in self.tensors if name.startswith(prefix)]

    def count(self, prefix: str, first: int = 0) -> int:
        """How many children, numbered from `first`, the module `prefix` has.

        Raises:
            WeightsError: none, or a number is left out.
        """
        numbers = {name[len(prefix) :].split(".")[0] for name in self.under(prefix)}
        expected = [str(number) for number in range(first, first + max(1, len(numbers)))]
        absent = [number for number in expected if number not in numbers]
        if absent:
            raise WeightsError(f"{self.source} lacks {prefix}{absent[0]}", NOT_WHOLE)
        return len(expected)

    def take(self, name: str) -> Tensor | None:
        """One tensor, floating point as float32; None, and noted, where it is absent.

        Raises:
            NumericError: it holds NaN or infinity.
            WeightsError: it is sparse, or its shape promises more elements than the file holds.
        """
        if name not in self.tensors:
            self.missing.append(name)
            return None
        self.rest.pop(name, None)
        tensor = self.tensors[name].detach()
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or is_inflated(tensor):
            raise WeightsError(f"{self.source}: {name} is not stored as a plain tensor", "Save it again, densely")
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.float()
        if not bool(torch.isfinite(tensor).all()):
            raise NumericError(f"{self.source}: {name} holds NaN or infinity", "Ask for another checkpoint")
        return tensor

    def drop(self, *prefixes: str) -> None:
        """Give a place to names that are known and not needed."""
        for name in [name for name in self.rest if name.startswith(prefixes)]:
            del self.rest[name]

    def use_averages(self, prefixes: tuple[str, ...]) -> bool:
        """Put the moving averages, where the file keeps some, in the place of all weights under `prefixes`."""
        if not self.under(AVERAGES):
            return False
        for name in [name for name in self.tensors if name.startswith(prefixes)]:
            average = AVERAGES + name.replace(".", "")
            if average in self.tensors:
                self.tensors[name] = self.tensors[average]
                self.drop(average)
            else:
                self.missing.append(average)
        return True


def is_weights(value: Any) -> bool:
    """Whether this is what `state_dict()` gives: tensors by name, and at least one."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def is_inflated(tensor: Tensor) -> bool:
    """Whether elements share memory, so that a small file could ask for any amount of it."""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def strip(name: str) -> str:
    """A name without any mixture of `PREFIXES` at its front."""
    while name.startswith(PREFIXES):
        name = name[len(next(prefix for prefix in PREFIXES if name.startswith(prefix))) :]
    return name


def listed(names: Sequence[str]) -> str:
    """`a, b, c, ... (7 in all)`; a name that is not for printing as Python writes it."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:SHOWN]]
    return ", ".join(shown) + (f", ... ({len(names):,} in all)" if len(names) > SHOWN else "")
