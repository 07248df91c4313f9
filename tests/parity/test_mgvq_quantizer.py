"""Parity with MGVQ's released quantizer in training: losses, gradients, restarts of unused codes, masking.

The codebook has 4 x 8192 codes of 8 channels, or 8 x 2048 of 4, filled by its name in the reference.
"""

import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vqpipe.quantizers import CvqConfig, MultiGroupConfig, MultiGroupQuantizer
from vqpipe.quantizers.multi_group import default_keep_probabilities, num_kept_of

SIZES = {4: 8192, 8: 2048}
EXACT = {"rtol": 1e-5, "atol": 0}


@pytest.fixture(scope="module")
def reference(parity_outputs: Path) -> dict[str, Tensor]:
    with np.load(parity_outputs / "mgvq" / "parity_quantizer_train.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@cache
def codebook_of(num_groups: int) -> Tensor:
    """The stored codes of the reference, float32[G, K, C / G], not normalized."""
    seed = zlib.crc32(b"quantize.embedding.weight") & 0x7FFFFFFF
    size, code_dim = SIZES[num_groups], 32 // num_groups
    rows = torch.randn(num_groups * size, code_dim, generator=torch.Generator().manual_seed(seed))
    return rows.view(num_groups, size, code_dim)


def make(num_groups: int) -> MultiGroupQuantizer:
    """In training mode, keeping every group, with one random number per forward pass, as released."""
    group = CvqConfig(codebook_size=SIZES[num_groups], code_dim=32 // num_groups, normalize=True)
    keep_all = (0.0,) * (num_groups - 1) + (1.0,)
    config = MultiGroupConfig(num_groups=num_groups, group=group, masking="batch", keep_probabilities=keep_all)
    quantizer = MultiGroupQuantizer(config).train()
    for inner, codes in zip(quantizer.groups, codebook_of(num_groups), strict=True):
        inner.load_state_dict({"codes": codes, "frequencies": torch.zeros(len(codes))})
    return quantizer


def latent() -> Tensor:
    return torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_groups", SIZES)
def test_ids(reference: dict[str, Tensor], num_groups: int) -> None:
    ids = make(num_groups)(latent()).ids
    assert torch.equal(ids.view(-1, num_groups), reference[f"g{num_groups}_idx"].long())


@pytest.mark.parametrize("num_groups", SIZES)
def test_losses_and_gradients(reference: dict[str, Tensor], num_groups: int) -> None:
    quantizer, vectors = make(num_groups), latent().requires_grad_()
    losses = quantizer(vectors).losses
    # the reference has one loss per group, and multiplies its commitment loss by 0.25
    expected = {name: reference[f"g{num_groups}_{name}_loss"] for name in ("vq", "commit")}
    torch.testing.assert_close(losses["codebook"], expected["vq"].mean(), **EXACT)
    torch.testing.assert_close(0.25 * losses["commitment"], expected["commit"].mean(), **EXACT)
    for number, (group, part) in enumerate(quantizer.split_channels(vectors)):
        torch.testing.assert_close(group(part).losses["codebook"], expected["vq"][number], **EXACT)
    (num_groups * (losses["codebook"] + 0.25 * losses["commitment"])).backward()  # the gradient of the sum over groups
    assert vectors.grad is not None
    gradient = reference[f"g{num_groups}_dz"]
    torch.testing.assert_close(vectors.grad, gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))
    norms = torch.stack([group.codes.grad.norm() for group in quantizer.groups])
    torch.testing.assert_close(norms, reference[f"g{num_groups}_dcodebook_norm_per_group"], **EXACT)


@pytest.mark.parametrize("num_groups", SIZES)
def test_unused_codes_move_as_released(reference: dict[str, Tensor], num_groups: int) -> None:
    quantizer, vectors = make(num_groups), latent()
    torch.manual_seed(0)
    quantizer.update(vectors, quantizer(vectors).ids)
    frequencies = torch.stack([group.frequencies for group in quantizer.groups])
    torch.testing.assert_close(frequencies.sum(1), reference[f"g{num_groups}_embed_prob_sum"], **EXACT)
    assert torch.equal(frequencies.count_nonzero(1), reference[f"g{num_groups}_embed_prob_nonzero_per_group"])
    after = torch.stack([group.codes.detach() for group in quantizer.groups])
    replaced = (after != codebook_of(num_groups)).any(2).sum(1)
    assert torch.equal(replaced, reference[f"g{num_groups}_rows_replaced_per_group"])
    expected = reference[f"g{num_groups}_codebook_after_first128rows_per_group"]
    torch.testing.assert_close(after[:, :128], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("uniform", [0.1, 0.25, 0.35, 0.5])
def test_masking_of_four_groups_matches_the_thresholds(
    reference: dict[str, Tensor], uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With eight groups the reference never masks the last four, so only four groups are comparable."""
    zeroed = reference[f"mask_g4_u{uniform}_zeroed"]
    kept = num_kept_of(torch.tensor([uniform]), default_keep_probabilities(4))
    assert kept.tolist() == [int((~zeroed).sum())]
    quantizer = make(4)
    monkeypatch.setattr(quantizer, "sample_num_kept", lambda batch_size: kept.expand(batch_size))
    quantized = quantizer(latent())
    assert torch.equal(~quantized.codes.unflatten(1, (4, 8)).any(2).amax((0, 2, 3)), zeroed)
    losses = reference[f"mask_g4_u{uniform}_vq_loss"]
    torch.testing.assert_close(quantized.losses["codebook"], losses.mean(), **EXACT)
