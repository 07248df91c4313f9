import copy

import pytest
import torch
from torch import Tensor

from vqpipe.errors import ConfigError
from vqpipe.quantizers import (
    CvqConfig,
    EmaConfig,
    FsqConfig,
    GqConfig,
    IbqConfig,
    LcConfig,
    LfqConfig,
    MultiGroupConfig,
    MultiGroupQuantizer,
    MultiScaleConfig,
    QuantizerConfig,
    ResidualConfig,
    SimVqConfig,
    TokenLayout,
    VqConfig,
    build_quantizer,
)
from vqpipe.quantizers.multi_group import default_keep_probabilities, num_kept_of

CVQ = CvqConfig(codebook_size=40, code_dim=4, normalize=True)
LC = LcConfig(codebook_size=40, code_dim=4, feature_dim=12)
B, H, W = 6, 3, 5


def make(num_groups: int = 3, group: QuantizerConfig = CVQ, **settings: object) -> MultiGroupQuantizer:
    torch.manual_seed(0)
    config = MultiGroupConfig(num_groups=num_groups, group=group, **settings)  # type: ignore[arg-type]
    quantizer = build_quantizer(config)
    assert isinstance(quantizer, MultiGroupQuantizer)
    return quantizer


def keeping(kept: list[int], monkeypatch: pytest.MonkeyPatch, **settings: object) -> MultiGroupQuantizer:
    """A quantizer in training mode that keeps `kept` groups of the images."""
    quantizer = make(**settings).train()
    monkeypatch.setattr(quantizer, "sample_num_kept", lambda batch_size: torch.tensor(kept))
    return quantizer


def latent_of(channels: int = 12) -> Tensor:
    return torch.randn(B, channels, H, W, generator=torch.Generator().manual_seed(1))


def test_each_group_quantizes_its_own_channels() -> None:
    quantizer, latent = make(masking="off"), latent_of()
    quantized = quantizer(latent)
    for number, group in enumerate(quantizer.groups):
        alone = group(latent[:, 4 * number : 4 * number + 4])
        assert torch.equal(quantized.ids.view(B, H * W, 3)[..., number], alone.ids)
        assert torch.equal(quantized.codes[:, 4 * number : 4 * number + 4], alone.codes)
    losses = [group(latent[:, 4 * n : 4 * n + 4]).losses["commitment"] for n, group in enumerate(quantizer.groups)]
    torch.testing.assert_close(quantized.losses["commitment"], torch.stack(losses).mean())


def test_first_groups_decode_to_their_codes_and_zeros() -> None:
    quantizer, latent = make().eval(), latent_of()
    quantized = quantizer(latent)
    for groups in range(4):
        ids = quantized.ids.clone().view(B, -1, 3)
        ids[..., groups:] = -1
        codes = quantized.codes.clone()
        codes[:, 4 * groups :] = 0
        assert torch.equal(quantizer.lookup(ids.flatten(1), TokenLayout(((H, W),), 3)), codes)


def test_masking_keeps_the_first_groups_of_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [1, 3, 2, 1, 3, 1]
    quantizer, latent = keeping(kept, monkeypatch), latent_of().requires_grad_()
    masked, unmasked = quantizer(latent), make(masking="off")(latent)
    grid, full_grid = masked.ids.view(B, -1, 3), unmasked.ids.view(B, -1, 3)
    for image, groups in enumerate(kept):
        assert torch.equal(grid[image, :, :groups], full_grid[image, :, :groups])
        assert (grid[image, :, groups:] == -1).all()
    assert torch.equal(quantizer.lookup(masked.ids, quantizer.layout(H, W)), masked.codes)

    pairs = [
        group(part[image : image + 1]).losses["codebook"] * (number < kept[image])
        for number, (group, part) in enumerate(quantizer.split_channels(latent))
        for image in range(B)
    ]
    torch.testing.assert_close(masked.losses["codebook"], torch.stack(pairs).mean())

    (masked.codes.sum() + sum(masked.losses.values())).backward()
    assert latent.grad is not None
    has_gradient = latent.grad.view(B, 3, -1).any(2)
    assert torch.equal(has_gradient, torch.tensor(kept)[:, None] > torch.arange(3))


def test_fully_masked_group_gets_a_zero_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = keeping([1] * B, monkeypatch)
    sum(quantizer(latent_of()).losses.values()).backward()
    gradients = [group.codes.grad for group in quantizer.groups]
    assert all(gradient is not None for gradient in gradients)
    assert [bool(gradient.any()) for gradient in gradients] == [True, False, False]


@pytest.mark.parametrize(
    "group",
    [
        VqConfig(codebook_size=40, code_dim=4, metric="cosine"),
        EmaConfig(codebook_size=40, code_dim=4),
        FsqConfig(levels=(5, 4, 3, 3)),
        IbqConfig(codebook_size=40, code_dim=4),
        LfqConfig(code_dim=4),
        SimVqConfig(codebook_size=40, code_dim=4),
    ],
    ids=lambda config: config.kind,
)
def test_every_kind_with_one_id_per_position_can_be_masked(
    group: QuantizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = keeping([2, 1, 1, 2, 1, 1], monkeypatch, group=group)
    latent = latent_of().requires_grad_()
    quantized = quantizer(latent)
    (quantized.codes.sum() + sum(quantized.losses.values())).backward()
    assert all(weight.grad is not None for weight in quantizer.parameters())
    assert latent.grad is not None
    assert latent.grad.view(B, 3, -1).any(2).sum(1).tolist() == [2, 1, 1, 2, 1, 1]
    torch.testing.assert_close(quantizer.lookup(quantized.ids, quantizer.layout(H, W)), quantized.codes)
    assert quantizer.all_codes().shape == (3, quantizer.codebook_size, 4)
    quantizer.update(latent.detach(), quantized.ids)


def test_groups_have_an_update_where_the_quantizer_of_a_group_has_one() -> None:
    assert make(group=CVQ).has_update
    assert not make(group=LC).has_update


def test_masked_images_do_not_update_the_codebook(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, latent = keeping([1, 2, 2, 1, 2, 1], monkeypatch), latent_of()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    ids = quantizer(latent).ids
    torch.manual_seed(3)
    quantizer.update(latent, ids)
    after = quantizer.state_dict()
    assert torch.equal(after["groups.2.codes"], before["groups.2.codes"])
    assert not after["groups.2.frequencies"].any()

    expected = make()
    torch.manual_seed(3)
    images = [1, 2, 4]
    grid = ids.view(B, -1, 3)
    expected.groups[0].update(latent[:, :4], grid[..., 0])
    expected.groups[1].update(latent[images, 4:8], grid[images][..., 1])
    assert torch.equal(after["groups.1.codes"], expected.groups[1].codes)
    assert torch.equal(after["groups.1.frequencies"], expected.groups[1].frequencies)


@pytest.mark.parametrize("group", [EmaConfig(codebook_size=30, code_dim=4), GqConfig(codebook_size=30, code_dim=2)])
def test_masked_images_do_not_count_in_the_update_of_other_quantizers(
    group: QuantizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer, latent = keeping([1, 2, 2, 1, 2, 1], monkeypatch, group=group), latent_of()
    expected = copy.deepcopy(quantizer.groups[1])
    ids = quantizer(latent).ids
    quantizer.update(latent, ids)
    images = [1, 2, 4]
    expected.update(latent[images, 4:8], ids.view(B, -1, 3)[images][..., 1])
    for name, value in quantizer.groups[1].state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name])


@pytest.mark.parametrize("masking", ["sample", "batch"])
def test_number_of_kept_groups_follows_the_probabilities(masking: str) -> None:
    quantizer = make(4, masking=masking, keep_probabilities=(0.5, 0.0, 0.2, 0.3)).train()
    sampled = torch.stack([quantizer.sample_num_kept(4) for _ in range(2000)])
    shares = torch.bincount(sampled.flatten(), minlength=5) / sampled.numel()
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3]), rtol=0, atol=0.04)
    assert bool((sampled == sampled[:, :1]).all()) == (masking == "batch")


def test_evaluation_and_masking_off_use_no_random_numbers() -> None:
    state = torch.get_rng_state()
    for quantizer in (make(masking="off").train(), make().eval()):
        torch.set_rng_state(state)
        assert (quantizer(latent_of()).ids >= 0).all()
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 8])
def test_default_probabilities_sum_to_one(num_groups: int) -> None:
    probabilities = default_keep_probabilities(num_groups)
    assert len(probabilities) == num_groups
    assert sum(probabilities) == pytest.approx(1)
    if num_groups == 4:
        assert probabilities == (0.2, 0.1, 0.1, 0.6)


def test_number_of_kept_groups_at_the_thresholds() -> None:
    uniform = torch.tensor([0.0, 0.249, 0.25, 0.749, 0.75, 0.999999])
    assert num_kept_of(uniform, (0.25, 0.5, 0.25)).tolist() == [1, 1, 2, 2, 3, 3]


def test_codebook_is_loaded_into_every_group_or_split() -> None:
    quantizer, codes = make(group=LC), torch.randn(120, 12)
    quantizer.load_codebook(codes[:40])
    assert all(torch.equal(group.codes, codes[:40]) for group in quantizer.groups)
    quantizer.load_codebook(codes)
    assert torch.equal(torch.cat([group.codes for group in quantizer.groups]), codes)
    with pytest.raises(ConfigError, match=r"holds 50 codes .* Set model.quantizer.group.codebook_size=50, or"):
        quantizer.load_codebook(codes[:50])


def test_groups_with_one_frozen_codebook_learn_separate_projectors() -> None:
    quantizer, codes = make(group=LC, masking="off").train(), torch.randn(40, 12)
    quantizer.load_codebook(codes)
    quantizer.standardize_codebook()
    before = quantizer.codebook()
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.5)
    losses = [quantizer(latent_of()).losses["codebook"]]
    for _ in range(10):
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        losses.append(quantizer(latent_of()).losses["codebook"])
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(group.codes, codes) for group in quantizer.groups)
    first, second, third = (quantizer.codebook() - before).abs().amax((1, 2))
    assert min(first, second, third) > 1e-3
    assert not torch.equal(quantizer.codebook()[0], quantizer.codebook()[1])


def test_quantizers_with_several_ids_per_position_are_rejected() -> None:
    groups = MultiGroupConfig(group=VqConfig(codebook_size=4, code_dim=2))
    for group in (groups, ResidualConfig(codebook_size=4, code_dim=2), MultiScaleConfig(codebook_size=4, code_dim=2)):
        with pytest.raises(ConfigError, match="more than one id per position"):
            make(group=group)
