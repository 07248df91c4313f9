"""All that a training run is, between two steps; and how it is saved and found again.

    <run>/checkpoints/step-00012000/   model, discriminator, ema, optimizer, discriminator_optimizer (.safetensors)
                                       state.json: step, images_seen, sha256 of each file; written last

There is no random-number state to save: every random choice of a run is a function of (seed, step or sample).
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vqpipe import distributed
from vqpipe.errors import ArtifactError
from vqpipe.files import flush_to_disk, hash_file, write_json
from vqpipe.models.autoencoder import Autoencoder
from vqpipe.training.optimizers import WeightEma

KEEP = 2
"""How many checkpoints stay on disk: the newest, and the one before in case the newest is damaged."""


@dataclass
class TrainState:
    """Both networks, both optimizers, the weight average, and how far the run is."""

    model: Autoencoder
    discriminator: nn.Module
    optimizer: Optimizer
    discriminator_optimizer: Optimizer
    weight_ema: WeightEma[Autoencoder]
    step: int = 0
    images_seen: int = 0

    def save(self, run_dir: Path) -> None:
        """Write a checkpoint (rank 0) under a temporary name, then rename it; delete all but the last two."""
        if distributed.is_main():
            folder = run_dir / "checkpoints"
            target = folder / f"step-{self.step:08d}"
            temporary = folder / f".writing-{target.name}"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            digests = {}
            for name, tensors in self.tensors().items():
                file = temporary / f"{name}.safetensors"
                save_file({key: value.detach().contiguous() for key, value in tensors.items()}, file)
                flush_to_disk(file)
                digests[file.name] = hash_file(file)
            write_json(
                temporary / "state.json",
                {"step": self.step, "images_seen": self.images_seen, "sha256": digests},
            )
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            flush_to_disk(folder)
            for old in checkpoints(run_dir)[:-KEEP]:
                shutil.rmtree(old)
        distributed.barrier()

    def resume(self, run_dir: Path) -> bool:
        """Load the newest whole checkpoint of `run_dir`; False where there is none, and the run starts at step 0."""
        for folder in reversed(checkpoints(run_dir)):
            table = read_state(folder)
            if table is None:
                continue
            files = {name: load_file(folder / f"{name}.safetensors") for name in self.tensors()}
            self.model.load_state_dict(files["model"])
            self.discriminator.load_state_dict(files["discriminator"])
            load_optimizer(self.optimizer, files["optimizer"])
            load_optimizer(self.discriminator_optimizer, files["discriminator_optimizer"])
            if self.weight_ema.decay > 0:
                self.weight_ema.network.load_state_dict(files["ema"])
            self.step, self.images_seen = table["step"], table["images_seen"]
            return True
        return False

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything load-bearing, by file."""
        parts = {
            "model": dict(self.model.state_dict()),
            "discriminator": dict(self.discriminator.state_dict()),
            "optimizer": optimizer_tensors(self.optimizer),
            "discriminator_optimizer": optimizer_tensors(self.discriminator_optimizer),
        }
        if self.weight_ema.decay > 0:
            parts["ema"] = dict(self.weight_ema.network.state_dict())
        return parts


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def read_state(folder: Path) -> dict[str, Any] | None:
    """`state.json` of a checkpoint whose files all have the hashes it names, else None."""
    try:
        table = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        whole = all(hash_file(folder / name) == digest for name, digest in table["sha256"].items())
    except (OSError, ValueError, KeyError):
        return None
    return table if whole else None


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's moments as `<parameter's number>.<name>`; its settings come from the config, not from here."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`.

    Raises:
        ArtifactError: the moments belong to another set of parameters.
    """
    table = optimizer.state_dict()
    numbers = {number for group in table["param_groups"] for number in group["params"]}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    if not set(state) <= numbers:
        raise ArtifactError("a checkpoint's optimizer belongs to another model", "Delete the partial directory")
    optimizer.load_state_dict({"state": state, "param_groups": table["param_groups"]})


def seed_step(seed: int, step: int) -> None:
    """Make whatever a network draws during `step` a function of (seed, step, rank)."""
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + distributed.rank())
