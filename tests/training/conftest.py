"""Networks and states small enough for a step in milliseconds."""

from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from vqpipe.losses import Objective, ObjectiveConfig
from vqpipe.models import DiscriminatorConfig, PatchDiscriminator, VqganConfig, build_autoencoder
from vqpipe.quantizers import LcConfig, QuantizerConfig, VqConfig
from vqpipe.training.checkpoint import TrainState
from vqpipe.training.config import TokenizerTrainConfig
from vqpipe.training.loop import initial_state
from vqpipe.training.tokenizer_task import TokenizerTask


def vqgan(
    quantizer: QuantizerConfig | None = None, *, width: int = 8, multipliers: tuple[int, ...] = (1, 2)
) -> VqganConfig:
    """A VQGAN without attention, by default at f = 2 with a learned codebook of 32 codes."""
    return VqganConfig(
        base_channels=width,
        channel_multipliers=multipliers,
        num_res_blocks=1,
        attention_resolutions=(),
        z_channels=8,
        quantizer=quantizer or VqConfig(codebook_size=32, code_dim=4),
    )


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., VqganConfig]:
    return vqgan


@pytest.fixture(scope="session")
def make_state() -> Callable[..., TrainState]:
    """`make_state(quantizer, seed=0, decay=0.9, adversarial=True, width=8, frozen=False)`: a state at step 0."""

    def make(
        quantizer: QuantizerConfig | None = None,
        *,
        seed: int = 0,
        decay: float = 0.9,
        adversarial: bool = True,
        width: int = 8,
        frozen: bool = False,
    ) -> TrainState:
        torch.manual_seed(seed)
        quantizer = quantizer or LcConfig(codebook_size=64, feature_dim=16, code_dim=4, codebook_init="uniform")
        model = build_autoencoder(vqgan(quantizer, width=width, multipliers=(1,)))
        discriminator = PatchDiscriminator(DiscriminatorConfig(base_channels=4))
        objective = Objective(ObjectiveConfig(l1=1.0, perceptual="none", adversarial=0.1 if adversarial else 0.0))
        config = TokenizerTrainConfig(weight_ema=decay, freeze=("encoder",) if frozen else ())
        return initial_state(TokenizerTask(model, discriminator, objective), config, torch.device("cpu"))

    return make


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterable[int]], None]:
    """`poison(steps)`: from now on, the autoencoder's loss is NaN in these steps, counted from 0."""
    original = Objective.autoencoder_loss

    def start(steps: Iterable[int]) -> None:
        calls = count()

        def poisoned(*args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
            total, terms = original(*args, **kwargs)
            return total * (float("nan") if next(calls) in steps else 1.0), terms

        monkeypatch.setattr(Objective, "autoencoder_loss", poisoned)

    return start
