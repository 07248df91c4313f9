"""Validation examples over ranks."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.errors import NumericError
from vqpipe.generation import DitConfig, Space, build_generator
from vqpipe.generation.validation import loss_and_accuracy, rank_batches, validation_losses


class Numbers:
    """Image i is the number i."""

    views = 1

    def __init__(self, count: int, labels: Sequence[int] | None = None) -> None:
        self.labels = np.zeros(count, np.int64) if labels is None else np.array(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, image: int) -> str:
        return str(image)

    def read(self, images: Sequence[int], views: Sequence[int]) -> Tensor:
        return torch.tensor(list(images))[:, None]


@pytest.mark.parametrize("count", [1, 3, 6, 7, 8, 12])
def test_each_example_is_counted_once_and_ranks_have_equal_numbers_of_batches(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    counted, calls = list[int](), list[int]()
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        batches = list(rank_batches(Numbers(count), 2))
        counted += [int(each) for _, batch, counts in batches if counts for each in batch.examples]
        calls.append(len(batches))
    assert sorted(counted) == list(range(count))
    assert calls == [-(-count // 6)] * 3


class Mean(nn.Module):
    """The loss of a number is itself."""

    def forward(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"total": examples.float().mean()}


def test_a_batch_that_does_not_count_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    shares = list[dict[str, float]]()

    def gather(mine: dict[str, float]) -> list[dict[str, float]]:
        shares.append(mine)
        return shares

    monkeypatch.setattr(distributed, "gather_objects", gather)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found = validation_losses(Mean(), Numbers(5), batch_size=2, device=torch.device("cpu"))
    assert found == {"total": pytest.approx((0 + 1 + 2 + 3 + 4) / 5)}


class Latents(Numbers):
    """Image i is a latent of fixed random numbers."""

    def read(self, images: Sequence[int], views: Sequence[int]) -> Tensor:
        return torch.randn(len(self), 4, 4, 4, generator=torch.Generator().manual_seed(0))[list(images)]


def test_the_loss_of_latents_does_not_depend_on_batch_size_or_ranks(
    make_space: Callable[..., Space], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, shares = build_generator(DitConfig(size="tiny"), make_space()), list[dict[str, float]]()

    def measure(batch_size: int) -> dict[str, float]:
        return validation_losses(generator, Latents(7), batch_size=batch_size, device=torch.device("cpu"))

    whole = measure(7)
    for batch_size in (1, 3):
        assert measure(batch_size) == pytest.approx(whole, rel=1e-5)

    def gather(mine: dict[str, float]) -> list[dict[str, float]]:
        shares.append(mine)
        return shares

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", gather)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        both = measure(2)
    assert both == pytest.approx(whole, rel=1e-5)
    assert generator(Latents(7).read(range(7), []), torch.zeros(7).long())["noise"] != whole["noise"]  # of training


class Lookup(nn.Module):
    """A classifier with fixed logits for the numbers 0 to 2."""

    num_classes = 7

    def logits(self, numbers: Tensor) -> Tensor:
        rows = [[9, 1, 2, 3, 4, 5, 6], [9, 8, 1, 1, 1, 1, 1], [9, 8, 7, 6, 5, 4, 4]]
        return torch.tensor(rows)[numbers.flatten()].float()


def test_ties_count_against_the_correct_class() -> None:
    examples = Numbers(3, labels=[0, 1, 6])
    found = loss_and_accuracy(Lookup(), examples, batch_size=2, device=torch.device("cpu"))  # type: ignore[arg-type]
    loss = F.cross_entropy(Lookup().logits(torch.arange(3)), torch.tensor([0, 1, 6]))
    assert found == {"total": pytest.approx(float(loss)), "top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3)}


def test_accuracy_of_nan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lookup, "logits", lambda self, numbers: torch.full((len(numbers), 7), torch.nan))
    with pytest.raises(NumericError, match=r"the classifier returns NaN or infinity .*train\.learning_rate"):
        loss_and_accuracy(Lookup(), Numbers(3), batch_size=2, device=torch.device("cpu"))  # type: ignore[arg-type]
