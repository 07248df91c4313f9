"""The tensors of a released file by name, and which of them have been used.

Files are not trusted: pickles are read with `weights_only=True`, and the few other classes that training states contain
are replaced by placeholders.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqpipe.errors import NumericError, WeightsError
from vqpipe.models.released.refused import refuse_program
from vqpipe.weights import load_tensors

PREFIXES = ("module.", "_orig_mod.")
"""Prefixes added by DistributedDataParallel and torch.compile."""
CONTAINERS = ("model", "state_dict", "ema", "model_state_dict", "unitok")
"""Keys of the weights in a training state, or under "trainer" in one of UniTok."""
BARE = ""
"""The container of a plain state dict."""
DISCRIMINATOR = "discriminator"
"""Key of the discriminator in LlamaGen's training state."""
AVERAGES = "model_ema."
"""Prefix of moving averages in Lightning modules: of each parameter under its name without dots."""
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Endings of the names of tensors that are not averaged."""
UNUSED_AVERAGES = tuple(
    f"{AVERAGES}{name}" for name in ("decay", "num_updates", "lossdiscriminator", "lossperceptual_loss")
)
"""Prefixes of tensors among the averages that are ignored."""
DAMAGED = "It is damaged, or of another family"
"""Hint of the errors about tensors that do not match the family."""
MAX_NAMES = 3
"""Names listed in an error."""


class Placeholder:
    """Replaces a class in a pickle; ignores its arguments."""

    def __init__(self, *args: Any) -> None:
        pass


PLACEHOLDERS = {
    "argparse.Namespace": Placeholder,
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": Placeholder,
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping": Placeholder,
}
"""The command line saved by VQGAN-LC and LlamaGen; callbacks, whose classes Lightning up to 1.4 saved as keys."""


class Checkpoint:
    """The state dicts in a released file, with `PREFIXES` removed from their names.

    Raises:
        WeightsError: the file is absent, cannot be read, or contains no state dict under a known key.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise WeightsError(f"{path} is not a file", "Name the released file of weights")
        refuse_program(path)
        content: Any = load_tensors(path, placeholders=PLACEHOLDERS, mmap=True)
        self.path = path
        self.containers: dict[str, dict[str, Tensor]] = {}
        if not isinstance(content, dict):
            raise WeightsError(f"{path} is not a state dict or a training state", "To pass a codebook, use --codebook")
        if isinstance(trainer := content.get("trainer"), dict):
            content = {key: value for key, value in content.items() if key != "trainer"} | trainer
        for key in (*CONTAINERS, DISCRIMINATOR):
            if is_weights(content.get(key)):
                self.containers[key] = self.strip_prefixes(content[key])
        if not self.containers and is_weights(content):
            self.containers[BARE] = self.strip_prefixes(content)
        self.keys = [str(key) for key in content]
        if not self.containers.keys() & {*CONTAINERS, BARE}:
            raise WeightsError(
                f"{path} is not a state dict and has none under {', '.join(CONTAINERS)}",
                "Save its state_dict alone",
            )

    def strip_prefixes(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Remove `PREFIXES` from the names."""
        renamed = {strip_prefix(name): tensor for name, tensor in tensors.items()}
        if len(renamed) < len(tensors):
            raise WeightsError(f"{self.path} contains the same weight twice, with different prefixes")
        return renamed

    def unused(self, container: str) -> list[str]:
        """Keys of the file other than the used container and the discriminator."""
        return [] if container == BARE else [key for key in self.keys if key not in (container, DISCRIMINATOR)]

    def weights(self, preferred: tuple[str, ...]) -> tuple[str, "Weights"]:
        """The first existing container and its key; the tensors of a separate discriminator are added."""
        key = next(key for key in (*preferred, *CONTAINERS, BARE) if key in self.containers)
        separate = self.containers.get(DISCRIMINATOR, {})
        discriminator = {f"{DISCRIMINATOR}.{name}": tensor for name, tensor in separate.items()}
        return key, Weights(self.path, {**self.containers[key], **discriminator})


class Weights:
    """Tensors by released name, with a record of those not used yet (`unused`) and those absent (`missing`).

    `take` and `ignore` remove names from `unused`.
    """

    def __init__(self, source: Path, tensors: dict[str, Tensor]) -> None:
        self.source = source
        self.tensors = tensors
        self.unused = dict.fromkeys(tensors)
        self.missing: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str, ndim: int) -> torch.Size:
        """The shape of a tensor.

        Raises:
            WeightsError: it is absent, empty, or does not have `ndim` dimensions.
        """
        if name not in self.tensors:
            raise WeightsError(f"{self.source} lacks {name}", DAMAGED)
        shape = self.tensors[name].shape
        if len(shape) != ndim or not all(shape):
            raise WeightsError(
                f"{self.source}: {name} has shape {list(shape)}, {ndim} dimensions are expected", DAMAGED
            )
        return shape

    def under(self, prefix: str) -> list[str]:
        """The names with this prefix."""
        return [name for name in self.tensors if name.startswith(prefix)]

    def count(self, prefix: str, first: int = 0) -> int:
        """The number of children of the module `prefix`, numbered from `first`.

        Raises:
            WeightsError: there are none, or a number is missing.
        """
        numbers = {name[len(prefix) :].split(".")[0] for name in self.under(prefix)}
        expected = [str(number) for number in range(first, first + max(1, len(numbers)))]
        absent = [number for number in expected if number not in numbers]
        if absent:
            raise WeightsError(f"{self.source} lacks {prefix}{absent[0]}", DAMAGED)
        return len(expected)

    def take(self, name: str) -> Tensor | None:
        """Return a tensor, as float32 if it is floating point; None, recorded in `missing`, if it is absent.

        Raises:
            NumericError: it contains NaN or infinity.
            WeightsError: it is sparse, or larger than its storage.
        """
        if name not in self.tensors:
            self.missing.append(name)
            return None
        self.unused.pop(name, None)
        tensor = self.tensors[name].detach()
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or is_expanded(tensor):
            raise WeightsError(f"{self.source}: {name} is not a dense tensor", "Save it again as a dense tensor")
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.float()
        if not bool(torch.isfinite(tensor).all()):
            raise NumericError(f"{self.source}: {name} contains NaN or infinity", "Use another checkpoint")
        return tensor

    def ignore(self, *prefixes: str) -> None:
        """Mark names with these prefixes as used."""
        for name in [name for name in self.unused if name.startswith(prefixes)]:
            del self.unused[name]

    def use_averages(self, prefixes: tuple[str, ...]) -> bool:
        """Replace the weights under `prefixes` by their moving averages, and return True, if the file has any."""
        if not self.under(AVERAGES):
            return False
        for name in [name for name in self.tensors if name.startswith(prefixes) and not name.endswith(BUFFERS)]:
            average = AVERAGES + name.replace(".", "")
            if average in self.tensors:
                self.tensors[name] = self.tensors[average]
                self.ignore(average)
            else:
                self.missing.append(average)
        return True


def is_weights(value: Any) -> bool:
    """Whether this is a non-empty state dict."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory (stride 0), so that a small file could allocate any amount of memory."""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def strip_prefix(name: str) -> str:
    """Remove all `PREFIXES` from the start of a name."""
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def join_names(names: Sequence[str]) -> str:
    """`a, b, c, ... (7 in all)`; unprintable names are escaped."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:MAX_NAMES]]
    return ", ".join(shown) + (f", ... ({len(names):,} in all)" if len(names) > MAX_NAMES else "")
