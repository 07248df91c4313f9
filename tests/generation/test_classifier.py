"""Classifiers of token maps: sizes, embeddings, losses, and loading of MAE's weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from vqpipe.config import from_table
from vqpipe.errors import ConfigError, WeightsError
from vqpipe.generation.base import Space
from vqpipe.generation.classifier import (
    Classifier,
    ClassifierConfig,
    TokenViT,
    VitConfig,
    build_classifier,
)
from vqpipe.quantizers import TokenLayout

TINY = {"kind": "vit", "width": 16, "depth": 2, "num_heads": 2, "drop_path": 0.0}
SIDE, CLASSES, CODES = 4, 3, 10


def space(
    groups: int = 1, code_dim: int = 5, classes: int | None = CLASSES, side: int = SIDE, codes: int = CODES
) -> Space:
    layout = TokenLayout(((side, side),), groups)
    sizes = {"latent_dim": groups * code_dim, "code_dim": code_dim}
    return Space(layout=layout, codebook_size=codes, num_classes=classes, **sizes)


def make(table: dict[str, object], where: Space | None = None, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    where = where or space()
    model = build_classifier(from_table(ClassifierConfig, table), where)
    if model.needs_codebook:
        model.load_codebook(torch.randn(where.num_groups, where.codebook_size, where.code_dim))
    return model.eval()


def test_vit_b_has_the_published_parameter_count() -> None:
    with torch.device("meta"):
        model = build_classifier(VitConfig(), space(side=16, code_dim=8, classes=1000, codes=100_000))
    published = 86_567_656  # ViT-B/16 at 224 px: patches of 16 x 16 x 3, 197 positions, 1,000 classes
    patches, positions = 768 * (16 * 16 * 3 + 1), 197 * 768
    own = 768 * (8 + 1) + 257 * 768
    assert sum(p.numel() for p in model.parameters()) == published - patches - positions + own


def test_codes_are_standardised_and_concatenated_over_groups() -> None:
    where = space(groups=2)
    model = build_classifier(from_table(ClassifierConfig, TINY), where)
    codebook = 7 + 3 * torch.randn(2, CODES, 5)
    model.load_codebook(codebook)
    standard = torch.stack([(table - table.mean(0)) / table.std(0) for table in codebook])
    ids = torch.randint(0, CODES, (2, SIDE * SIDE * 2))
    embedded = model.embed(ids)
    (grid,) = where.layout.split(ids)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        expected = torch.cat([standard[g][grid[1, row, column, g]] for g in range(2)])
        torch.testing.assert_close(embedded[1, row * SIDE + column], expected)


@pytest.mark.parametrize("table", [TINY, TINY | {"embedding": "table"}, {"kind": "linear", "pool": 2}])
def test_classes_with_different_codes_are_learned(table: dict[str, object]) -> None:
    """The codes of each class are a third of the codebook, which also a linear probe on the mean code can separate."""
    model = make(table).train()
    rng = torch.Generator().manual_seed(1)
    labels = torch.arange(48) % CLASSES
    ids = labels[:, None] * 3 + torch.randint(0, 3, (48, SIDE * SIDE), generator=rng)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(ids[:24], labels[:24])["total"].backward()
        optimizer.step()
    with torch.no_grad():
        assert model.eval()(ids[24:], labels[24:])["train/top1"] > 0.9  # chance is a third


def test_the_loss_is_the_smoothed_cross_entropy() -> None:
    model = make(TINY | {"label_smoothing": 0.3}).train()
    ids, labels = torch.randint(0, CODES, (4, SIDE * SIDE)), torch.tensor([0, 1, 2, 0])
    target = 0.7 * F.one_hot(labels, CLASSES) + 0.3 / CLASSES
    expected = -(target * model.logits(ids).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(model.loss(ids, labels)["total"], expected)
    plain = F.cross_entropy(model.logits(ids), labels)
    torch.testing.assert_close(model.eval().loss(ids, labels)["total"], plain)


def test_the_vit_depends_on_token_positions_and_the_probe_does_not() -> None:
    ids = torch.randint(0, CODES, (1, SIDE * SIDE))
    moved = ids.roll(1, dims=1)
    for table, depends in ((TINY, True), ({"kind": "linear"}, False), ({"kind": "linear", "pool": 4}, True)):
        model = make(table)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        assert torch.allclose(model.logits(ids), model.logits(moved), rtol=1e-4, atol=1e-4) != depends


def test_the_vit_classifies_the_mean_of_its_outputs_and_skips_blocks_in_training_only() -> None:
    model, ids = make(TINY | {"drop_path": 0.5}), torch.randint(0, CODES, (8, SIDE * SIDE))
    assert isinstance(model, TokenViT)
    outputs = model.vit.forward_features(model.embedding(model.embed(ids)))[:, 1:]  # without the class token
    torch.testing.assert_close(model.logits(ids), model.vit.head(model.vit.fc_norm(outputs.mean(1))))
    model.train()
    assert not torch.allclose(model.logits(ids), model.logits(ids))


@pytest.fixture
def mae(tmp_path: Path) -> dict[str, torch.Tensor]:
    """The state of a tiny ViT as MAE's authors publish theirs: an 8 x 8 grid, and the decoder beside it."""
    torch.manual_seed(3)
    vit = VisionTransformer(img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    state = {name: torch.randn_like(value) for name, value in vit.state_dict().items()}
    return state | {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 16)}


def test_mae_weights_are_loaded_and_every_tensor_is_accounted_for(mae: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = tmp_path / "mae.pth"
    torch.save({"model": mae}, file)
    model = make(TINY | {"weights": str(file)})
    assert isinstance(model, TokenViT)
    own = model.vit.state_dict()
    assert all(torch.equal(own[name], mae[name]) for name in own if name.startswith("blocks."))
    assert torch.equal(own["cls_token"], mae["cls_token"])
    assert own["pos_embed"].shape == (1, 1 + SIDE * SIDE, 16)
    assert torch.equal(own["pos_embed"][:, 0], mae["pos_embed"][:, 0])
    same_grid = make(TINY | {"weights": str(file)}, space(side=8))
    assert isinstance(same_grid, TokenViT)
    torch.testing.assert_close(same_grid.vit.state_dict()["pos_embed"], mae["pos_embed"])

    for change, message in (
        ({"blocks.1.attn.qkv.weight": None}, r"Missing key.*blocks\.1\.attn\.qkv\.weight"),
        ({"blocks.2.norm1.weight": torch.zeros(16)}, r"Unexpected key.*blocks\.2\.norm1\.weight"),
        ({"cls_token": torch.zeros(1, 1, 8)}, r"size mismatch for cls_token"),
        ({"pos_embed": torch.zeros(1, 60, 16)}, "not of a square grid"),
        ({"pos_embed": torch.zeros(65, 16)}, "not of a square grid"),
        ({"pos_embed": torch.zeros(1, 0, 16)}, "not of a square grid"),
        ({"cls_token": 3}, "does not fit"),
        ({3: torch.zeros(16)}, "does not fit"),
        ({"pos_embed": None}, "is not a vision transformer"),
    ):
        changed = {name: value for name, value in (mae | change).items() if value is not None}
        torch.save(changed, file)
        with pytest.raises(WeightsError, match=message):
            make(TINY | {"weights": str(file)})
    for content in ([1, 2], {"model": [1, 2]}):
        torch.save(content, file)
        with pytest.raises(WeightsError, match="is not a vision transformer"):
            make(TINY | {"weights": str(file)})
    with pytest.raises(WeightsError, match="does not exist"):
        make(TINY | {"weights": str(tmp_path / "absent.pth")})


def test_rows_and_columns_of_an_oblong_grid_keep_their_places(mae: dict[str, torch.Tensor], tmp_path: Path) -> None:
    where = Space(layout=TokenLayout(((2, 4),)), codebook_size=CODES, latent_dim=5, code_dim=5, num_classes=CLASSES)
    probe = make({"kind": "linear", "pool": 2}, where)
    embedded = torch.randn(1, 8, 5)
    cells = embedded.view(2, 2, 2, 5).mean(2)  # row, half of the columns
    torch.testing.assert_close(probe.classify(embedded)[0], probe.head(cells.movedim(2, 0).flatten()))
    mae["pos_embed"][:, 1:] = torch.arange(8.0).repeat_interleave(8)[None, :, None]  # the row
    torch.save(mae, tmp_path / "mae.pth")
    vit = make(TINY | {"weights": str(tmp_path / "mae.pth")}, where)
    assert isinstance(vit, TokenViT)
    upper, lower = vit.vit.state_dict()["pos_embed"][0, 1:].view(2, 4 * 16)
    torch.testing.assert_close((upper.std(), lower.std()), (torch.tensor(0.0),) * 2, rtol=0, atol=1e-4)
    assert lower.mean() - upper.mean() > 3


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="is not divisible by"):
        make(TINY | {"num_heads": 3})
    with pytest.raises(ConfigError, match=r"pool = 5 does not fit the grid 4 x 4\. Set classifier\.pool = 1"):
        make({"kind": "linear", "pool": 5})
    with pytest.raises(ConfigError, match="needs the tokenizer's codes"):
        make({"kind": "linear", "embedding": "table"})
