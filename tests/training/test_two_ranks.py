"""Two ranks hold the same bits: each quantizer that updates its codebook, with a discriminator, R1 and LeCam."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqpipe.config import from_table
from vqpipe.data.batches import Batch
from vqpipe.distributed import rank, world_size
from vqpipe.losses import Objective, ObjectiveConfig
from vqpipe.models import DiscriminatorConfig, PatchDiscriminator, VqganConfig, build_autoencoder
from vqpipe.quantizers import QuantizerConfig
from vqpipe.training.config import TokenizerTrainConfig
from vqpipe.training.loop import train
from vqpipe.training.tokenizer_task import TokenizerTask

BATCH = 8
CVQ = {"kind": "cvq", "codebook_size": 32, "code_dim": 4, "normalize": True}
KINDS: dict[str, dict[str, Any]] = {
    "lc": {"kind": "lc", "codebook_size": 32, "code_dim": 4, "feature_dim": 12, "codebook_init": "uniform"},
    "ema": {"kind": "ema", "codebook_size": 32, "code_dim": 4},
    "cvq": CVQ,
    "residual": {"kind": "residual", "codebook_size": 32, "code_dim": 4, "depth": 2},
    "multi_group": {"kind": "multi_group", "num_groups": 2, "group": CVQ, "masking": "sample"},
    "alone": {"kind": "multi_group", "num_groups": 2, "group": CVQ, "masking": "sample"},
}
"""By name; "alone" trains without a discriminator, and so with DDP's static graph."""


class Pictures:
    """Image p of the run is a function of p; a rank gets its share of each batch."""

    def from_sample(self, images_seen: int) -> Iterator[Batch]:
        share = BATCH // world_size()
        while True:
            places = range(images_seen + rank() * share, images_seen + (rank() + 1) * share)
            noise = (torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(place)) for place in places)
            images = torch.stack([(image * 255).to(torch.uint8) for image in noise])
            yield Batch(images, torch.full((share,), -1), [str(place) for place in places], list(places))
            images_seen += BATCH


def trained(kind: str, steps: int, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the state after `steps` steps that all ranks should hold alike."""
    torch.manual_seed(0)
    model = build_autoencoder(
        VqganConfig(
            quantizer=from_table(QuantizerConfig, KINDS[kind]),
            base_channels=4,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(),
            z_channels=8,
        )
    )
    discriminator = PatchDiscriminator(DiscriminatorConfig(base_channels=4, num_layers=1))
    weights = dict.fromkeys(model.quantizer.loss_names, 0.1)
    gan = {"adversarial": 0.1, "disc_start": 2, "r1": 0.1, "r1_every": 2, "lecam": 0.01} if kind != "alone" else {}
    config = ObjectiveConfig(l1=1.0, perceptual="none", **gan, **weights)  # type: ignore[arg-type]
    objective = Objective(config, model.quantizer.loss_names)
    settings = {"steps": steps, "log_every": steps, "accumulate": 2 if gan else 1}
    state = train(
        TokenizerTask(model, discriminator, objective),
        TokenizerTrainConfig(global_batch_size=BATCH, learning_rate=1e-3, **settings),
        Pictures(),
        folder,
        seed=0,
        device=torch.device("cpu"),
    )
    alike = {f"objective.{name}": value for name, value in objective.state_dict().items()}
    for part, tensors in state.tensors().items():
        alike |= {f"{part}.{name}": value for name, value in tensors.items() if "running_" not in name}
    return {name: value.detach().clone().contiguous() for name, value in alike.items()}


def save_states(folder: Path, kinds: Sequence[str], steps: int) -> None:
    alike = {f"{kind}/{name}": value for kind in kinds for name, value in trained(kind, steps, folder / kind).items()}
    save_file(alike, folder / f"rank-{rank()}.safetensors")


@pytest.mark.parametrize(
    ("kinds", "steps"),
    [(("lc", "ema", "multi_group", "alone"), 4), pytest.param(tuple(KINDS), 50, marks=pytest.mark.slow)],
)
def test_two_ranks_hold_the_same_bits_after_training(
    on_two_ranks: Callable[..., list[Any]], tmp_path: Path, kinds: tuple[str, ...], steps: int
) -> None:
    on_two_ranks(save_states, tmp_path, kinds, steps)
    first, second = (load_file(tmp_path / f"rank-{number}.safetensors") for number in range(2))
    assert {name.split("/")[0] for name in first} == set(kinds)
    assert any(name.endswith("objective.logit_means") and bool(value.all()) for name, value in first.items())
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
