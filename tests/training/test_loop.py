"""The loop on a network small enough for seconds: it learns, resumes bit for bit, and never steps on a bad gradient."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vqpipe.data.batches import Batch
from vqpipe.errors import NumericError
from vqpipe.losses import Objective, ObjectiveConfig
from vqpipe.models import Autoencoder, DiscriminatorConfig, PatchDiscriminator, VqganConfig, build_autoencoder
from vqpipe.quantizers import EmaConfig, LcConfig, QuantizerConfig, VqConfig
from vqpipe.training.history import Row
from vqpipe.training.loop import TrainConfig, train
from vqpipe.training.state import TrainState, checkpoints

STEPS, BATCH = 12, 4
QUANTIZERS: dict[str, QuantizerConfig] = {
    "lc": LcConfig(codebook_size=64, feature_dim=16, code_dim=4, codebook_init="uniform"),
    "ema": EmaConfig(codebook_size=64, code_dim=4),
    "vq": VqConfig(codebook_size=64, code_dim=4),
}


class Photographs:
    """Smooth random pictures; picture p of the run is a function of p."""

    def from_sample(self, images_seen: int) -> Iterator[Batch]:
        while True:
            images = torch.stack([self.picture(images_seen + i) for i in range(BATCH)])
            yield Batch(images, torch.full((BATCH,), -1), [""] * BATCH, list(range(BATCH)))
            images_seen += BATCH

    def picture(self, position: int) -> Tensor:
        noise = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(position))
        return (torch.nn.functional.interpolate(noise, size=16, mode="bilinear")[0] * 255).to(torch.uint8)


def networks(kind: str) -> tuple[Autoencoder, PatchDiscriminator]:
    torch.manual_seed(7)
    config = VqganConfig(
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        z_channels=8,
        quantizer=QUANTIZERS[kind],
    )
    return build_autoencoder(config), PatchDiscriminator(DiscriminatorConfig(base_channels=4))


def run(folder: Path, kind: str = "lc", stop_at: int | None = None, **settings: object) -> tuple[TrainState, list[Row]]:
    model, discriminator = networks(kind)
    weights = {"l1": 1.0, "commitment": 0.1, "codebook": 0.033, "adversarial": 0.1}
    objective = Objective(ObjectiveConfig(perceptual="none", disc_start=4, **weights), model.quantizer.loss_names)  # type: ignore[arg-type]
    config = TrainConfig(
        **{  # type: ignore[arg-type]
            "steps": STEPS,
            "global_batch_size": BATCH,
            "learning_rate": 2e-3,
            "warmup_steps": 2,
            "weight_ema": 0.9,
            "log_every": 3,
            "save_every": 5,
            "look_every": 6,
            **settings,
        }
    )
    rows: list[Row] = []
    progress = {"step": 0}

    def on_step(state: TrainState) -> None:
        progress["step"] = state.step

    asked: Callable[[], bool] = lambda: stop_at is not None and progress["step"] >= stop_at  # noqa: E731
    state = train(
        config,
        model,
        discriminator,
        objective,
        Photographs(),
        folder,
        seed=3,
        device=torch.device("cpu"),
        on_start=lambda state: None,
        on_log=rows.append,
        on_look=lambda step, model: None,
        on_step=on_step,
        stop_asked=asked,
    )
    return state, rows


def everything(state: TrainState) -> dict[str, Tensor]:
    return {f"{part}.{name}": value for part, tensors in state.tensors().items() for name, value in tensors.items()}


@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
def test_a_run_cut_anywhere_and_resumed_is_the_same_run(tmp_path: Path, kind: str) -> None:
    straight, rows = run(tmp_path / "straight", kind)
    assert straight.step == STEPS
    for stop_at in (2, 7):  # before and after the discriminator starts
        state, _ = run(tmp_path / f"cut-{stop_at}", kind, stop_at=stop_at)
        assert state.step == stop_at
    state, _ = run(tmp_path / "cut-2", kind, stop_at=9)
    for folder in ("cut-2", "cut-7"):
        resumed, rest = run(tmp_path / folder, kind)
        expected = everything(straight)
        assert set(everything(resumed)) == set(expected)
        for name, value in everything(resumed).items():
            assert torch.equal(value, expected[name]), f"{folder}: {name}"
        assert rest[-1]["loss/total"] == pytest.approx(rows[-1]["loss/total"], abs=1e-6)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    run(tmp_path, stop_at=11)
    newest = checkpoints(tmp_path)
    assert [folder.name for folder in newest] == ["step-00000010", "step-00000011"]
    file = newest[-1] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    straight, _ = run(tmp_path / "straight")
    resumed, _ = run(tmp_path)
    assert all(torch.equal(value, everything(straight)[name]) for name, value in everything(resumed).items())


def test_the_loss_falls_and_the_log_says_how(tmp_path: Path) -> None:
    _, rows = run(tmp_path, "vq", steps=60, log_every=10)
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert rows[-1]["loss/l1"] < 0.8 * rows[0]["loss/l1"]
    assert rows[-1]["psnr"] > rows[0]["psnr"]
    assert 0 < rows[-1]["utilization"] <= 1
    assert rows[-1]["window_tokens"] == 10 * BATCH * 64
    assert {"loss/adversarial", "loss/discriminator", "loss/commitment", "learning_rate", "data_wait"} <= set(rows[-1])


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, stop_at=5)
    original = Objective.generator_loss

    def poisoned(self: Objective, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = original(self, *args, **kwargs)  # type: ignore[arg-type]
        return total * float("nan"), terms

    monkeypatch.setattr(Objective, "generator_loss", poisoned)
    with pytest.raises(NumericError, match="the gradient of step 5 is not finite"):
        run(tmp_path)
    monkeypatch.undo()
    straight, _ = run(tmp_path / "straight")
    resumed, _ = run(tmp_path)
    assert all(torch.equal(value, everything(straight)[name]) for name, value in everything(resumed).items())
