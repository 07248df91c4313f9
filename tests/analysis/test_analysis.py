"""Analyses against brute force on small sets, for any sharding, and their sections of the page."""

import io
import itertools
import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vqpipe.analysis import ANALYSES, Analysis, build, embedding, patches, replacement
from vqpipe.analysis.base import NotComputed, codebooks, sample_ids, sampling_key
from vqpipe.data.transforms import to_float
from vqpipe.errors import ConfigError
from vqpipe.metrics import distortion
from vqpipe.metrics.distortion import mean_squared_error, psnr_of
from vqpipe.quantizers import (
    CvqConfig,
    FsqConfig,
    LcConfig,
    MultiGroupConfig,
    MultiScaleConfig,
    QuantizerConfig,
    ResidualConfig,
    VqConfig,
)
from vqpipe.reports import page
from vqpipe.reports.pictures import from_png
from vqpipe.tokenizer import Tokenizer

LC = LcConfig(codebook_size=120, feature_dim=60, code_dim=4, codebook_init="uniform")
GROUPS = MultiGroupConfig(num_groups=2, group=CvqConfig(codebook_size=60, code_dim=3, normalize=True))
RESIDUAL = ResidualConfig(codebook_size=60, code_dim=4, depth=3)
COSINE = VqConfig(codebook_size=60, code_dim=4, metric="cosine")
SCALES = MultiScaleConfig(codebook_size=60, code_dim=4, scales=(1, 4))
FSQ = FsqConfig(levels=(3, 3))
KINDS: dict[str, QuantizerConfig] = {"lc": LC, "groups": GROUPS, "residual": RESIDUAL, "cosine": COSINE}
SIDE = 16


@pytest.fixture(scope="module")
def tokenizers(small_tokenizer: Callable[[QuantizerConfig], Tokenizer]) -> dict[str, Tokenizer]:
    return {name: small_tokenizer(config) for name, config in KINDS.items()}


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Ten images of flat quarters with noise, so that codes differ: uint8[10, 3, 16, 16]."""
    random = torch.Generator().manual_seed(3)
    quarters = torch.randint(0, 256, (10, 3, 2, 2), generator=random).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return (quarters + torch.randint(-20, 20, quarters.shape, generator=random)).clamp(0, 255).to(torch.uint8)


KEYS = [f"image-{number}" for number in range(10)]


def look(analysis: Analysis, tokenizer: Tokenizer, images: Tensor, parts: Sequence[Sequence[int]]) -> Analysis:
    for part in map(list, parts):
        ids = tokenizer.encode(images[part])
        again = tokenizer.decode(ids, (SIDE, SIDE))
        analysis.update(images[part], again, ids, [KEYS[i] for i in part])
    return analysis


def one(name: str, tokenizer: Tokenizer, **options: Any) -> Analysis:
    (analysis,) = build([name], tokenizer, **options)
    return analysis


@pytest.mark.parametrize("name", ["lc", "groups"])
def test_each_token_is_replaced_by_the_kth_nearest_other_code(
    name: str, tokenizers: dict[str, Tokenizer], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers[name]
    monkeypatch.setattr(replacement, "MAX_DISTANCES", 500)  # a few codes a tile
    analysis = look(one("replacement", tokenizer), tokenizer, images, [range(4), range(4, 10)])
    result = analysis.result()
    json.dumps(result)
    ids = tokenizer.encode(images)
    tables = [table.double() for table in codebooks(tokenizer.autoencoder.quantizer)]
    assert [row["k"] for row in result["rows"]] == [0, *(k for k in (1, 50, 100) if k < tokenizer.codebook_size)]
    for row in result["rows"]:
        replaced = ids.clone().view(10, -1, len(tables))
        if row["k"]:
            for group, table in enumerate(tables):
                order = torch.cdist(table, table, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(-1)
                replaced[..., group] = order.argsort(dim=1)[:, row["k"]][replaced[..., group]]
        again = tokenizer.decode(replaced.view_as(ids), (SIDE, SIDE))
        assert row["psnr"] == pytest.approx(float(psnr_of(mean_squared_error(images, again)).mean()), abs=1e-6)
    assert result["num_images"] == 10


def test_example_pictures_are_the_same_for_any_sharding(
    tokenizers: dict[str, Tokenizer], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["lc"]
    once = look(one("replacement", tokenizer), tokenizer, images, [range(10)])
    parts = [
        look(one("replacement", tokenizer), tokenizer, images, [part]) for part in ([7, 2, 9], [0, 1, 3, 4, 5], [6, 8])
    ]
    shown = once.sections(once.result())[-1]
    gathered = [part.examples for part in parts]  # type: ignore[attr-defined]
    monkeypatch.setattr(replacement, "gather_objects", lambda value: gathered if isinstance(value, list) else [value])
    dealt = parts[0].sections(parts[0].result())[-1]
    assert isinstance(shown, page.Pictures)
    assert isinstance(dealt, page.Pictures)
    assert [picture.name for picture in shown.pictures] == sorted(KEYS, key=sampling_key)[: replacement.NUM_EXAMPLES]
    assert dealt.pictures == shown.pictures
    assert [version.label for version in shown.pictures[0].versions][:2] == ["reconstruction", "1st nearest"]
    for _, _, files, psnr in gathered[0]:
        original, *versions = (from_png(file).numpy().astype(np.float64) for file in files)
        assert psnr == pytest.approx([10 * np.log10(255**2 / np.mean((original - v) ** 2)) for v in versions])
    rows = once.result()["rows"]
    (plot,) = once.sections(once.result())[0].plots  # type: ignore[attr-defined]
    assert plot.alt == f"replaced ends at {rows[-1]['psnr']:.4g}, reconstruction {rows[0]['psnr']:.4g}"


def test_images_that_are_reconstructed_exactly_have_no_psnr_on_the_page(
    tokenizers: dict[str, Tokenizer], images: Tensor
) -> None:
    tokenizer = tokenizers["lc"]
    ids = tokenizer.encode(images)
    exact = tokenizer.decode(ids, (SIDE, SIDE))
    analysis = one("replacement", tokenizer)
    analysis.update(exact, exact, ids, KEYS)
    result = analysis.result()
    plots, table, _ = analysis.sections(result)
    assert plots.plots[0].alt.startswith("replaced ends at")  # type: ignore[attr-defined]
    assert "reconstruction" not in plots.plots[0].alt  # type: ignore[attr-defined]
    assert table.rows[0][1] == "–"  # type: ignore[attr-defined]
    result["rows"] = [{"k": row["k"], "ssim": row["ssim"]} for row in result["rows"]]  # no pixel of any changes
    assert analysis.sections(result)[0].plots == []  # type: ignore[attr-defined]


def test_lpips_is_measured_with_a_network(
    tokenizers: dict[str, Tokenizer], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distortion, "SMALLEST_SIDES", {})  # the images are smaller than those of AlexNet

    class Difference(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    tokenizer = tokenizers["cosine"]
    given = look(one("replacement", tokenizer, perceptual={"lpips_alex": Difference()}), tokenizer, images, [[0, 1]])
    result = given.result()
    assert all(row["lpips_alex"] > 0 for row in result["rows"])
    table = given.sections(result)[1]
    assert isinstance(table, page.Table)
    assert "LPIPS (AlexNet)" in table.header


@pytest.mark.parametrize("name", KINDS)
def test_patches_equal_those_of_brute_force(name: str, tokenizers: dict[str, Tokenizer], images: Tensor) -> None:
    tokenizer = tokenizers[name]
    analysis = look(one("patches", tokenizer), tokenizer, images, [range(3), range(3, 10)])
    result = analysis.result()
    json.dumps(result)
    quantizer, factor = tokenizer.autoencoder.quantizer, tokenizer.downsample_factor
    groups = patches.num_compared(quantizer)
    found: dict[tuple[int, int], list[tuple[float, str, int, Tensor]]] = {}
    tables = codebooks(quantizer)
    for number, image in enumerate(images):
        ids = tokenizer.encode(image[None]).view(4, 4, -1)
        latent = tokenizer.autoencoder.latent(to_float(image[None]))[0]
        wide = torch.nn.functional.pad(image.float()[None], (factor // 2,) * 4, mode="reflect")[0].to(torch.uint8)
        for y, x, group in itertools.product(range(4), range(4), range(groups)):
            vector = latent.chunk(groups)[group][:, y, x]
            if name in ("groups", "cosine"):
                vector = vector / vector.norm()
            code = int(ids[y, x, group])
            piece = wide[:, factor * y : factor * y + 2 * factor, factor * x : factor * x + 2 * factor]
            distance = float((vector - tables[group][code]).norm())
            found.setdefault((group, code), []).append((distance, sampling_key(KEYS[number]), 4 * y + x, piece))
    assert result["sheets"]
    for sheet in result["sheets"]:
        nearest = sorted(found[sheet["group"], sheet["code"]], key=lambda each: each[:3])[: patches.NEAREST]
        assert sheet["times"] == len(found[sheet["group"], sheet["code"]])
        assert sheet["share"] == sheet["times"] / (10 * 4 * 4)
        assert sheet["distances"] == pytest.approx([each[0] for each in nearest], abs=1e-4)
        assert isinstance(analysis, patches.Patches)
        slot = analysis.slot(sheet["group"], sheet["code"])
        shown = torch.from_numpy(analysis.kept.of(np.array([slot])).pixels)
        if len({round(each[0], 4) for each in nearest}) == len(nearest):  # no near tie that batches may round apart
            assert torch.equal(shown, torch.stack([each[3] for each in nearest]))
    for group in range(groups):
        times = sorted((len(each) for (own, _), each in found.items() if own == group), reverse=True)
        first = [sheet["times"] for sheet in result["sheets"] if sheet["group"] == group]
        common = patches.NUM_COMMON // groups
        assert first[:common] == times[:common]


def test_rare_codes_are_the_least_frequent_that_fill_a_sheet() -> None:
    times = torch.tensor([0, 50, 9, 2, 30, 12])
    assert patches.common_and_rare(times, 2, 1) == [1, 4, 2]
    assert patches.common_and_rare(times[:4], 2, 1) == [1, 2, 3]  # none of the others fills one
    assert patches.common_and_rare(times, 1, 0) == [1]


def test_patches_of_two_ranks_are_those_of_all_images(
    tokenizers: dict[str, Tokenizer], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["groups"]
    singles = [[number] for number in range(10)]
    once = look(one("patches", tokenizer), tokenizer, images, singles)
    shares = [look(one("patches", tokenizer), tokenizer, images, part) for part in (singles[::2][::-1], singles[1::2])]
    whole = once.result()
    assert all(isinstance(share, patches.Patches) for share in shares)
    counts = sum(share.usage.counts for share in shares)  # type: ignore[attr-defined]
    monkeypatch.setattr(shares[0].usage, "merged", lambda: SimpleNamespace(counts=counts))  # type: ignore[attr-defined]
    together: list[Any] = []

    def gather(value: Any) -> list[Any]:
        if isinstance(value, int):
            return [value, 0]
        slots = np.unique(np.concatenate([share.kept.slot for share in shares]))  # type: ignore[attr-defined]
        together.extend(share.kept.of(slots) for share in shares)  # type: ignore[attr-defined]
        return together

    monkeypatch.setattr(patches, "gather_objects", gather)
    dealt = shares[0].result()
    assert dealt == whole
    assert shares[0].sections(dealt) == once.sections(whole)


def test_memory_of_patches_is_bounded_and_a_large_codebook_is_sampled(
    tokenizers: dict[str, Tokenizer], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["lc"]
    piece = 3 * 8 * 8
    monkeypatch.setattr(patches, "MAX_BYTES", 30 * patches.NEAREST * piece)
    analysis = one("patches", tokenizer)
    assert isinstance(analysis, patches.Patches)
    assert len(analysis.tracked) == 30 < tokenizer.codebook_size
    for _ in range(3):
        look(analysis, tokenizer, images, [range(10)])
        assert analysis.kept.pixels.nbytes <= patches.MAX_BYTES
    result = analysis.result()
    assert {sheet["code"] for sheet in result["sheets"]} <= set(analysis.tracked.tolist())
    (section,) = analysis.sections(result)
    assert isinstance(section, page.Maps)
    assert "Of 120 codes 30 are tracked" in section.caption


def test_embedding_marks_active_and_inactive_codes(
    tokenizers: dict[str, Tokenizer], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[tuple[int, ...]] = []

    def instead(vectors: Tensor, seed: int) -> np.ndarray:
        placed.append(tuple(vectors.shape))
        return vectors[:, :2].numpy()

    monkeypatch.setattr(embedding, "tsne", instead)
    for name, shapes in {"lc": [(100, 60), (100, 4)], "groups": [(50, 3), (50, 3)], "cosine": [(60, 4)]}.items():
        placed.clear()
        tokenizer = tokenizers[name]
        analysis = one("embedding", tokenizer, seed=5, embedding_codes=100)
        look(analysis, tokenizer, images, [range(5), range(5, 10)])
        assert isinstance(analysis, embedding.Embedding)
        result = analysis.result()
        json.dumps(result)
        assert placed == shapes
        ids = tokenizer.encode(images).view(-1, tokenizer.num_groups)
        used = [set(column.tolist()) for column in ids.T]
        assert result["active_per_group"] == [len(each) for each in used]
        drawn = sample_ids(tokenizer.codebook_size, shapes[0][0], 5).tolist()
        for _, group, _, active in analysis.maps:
            assert active.tolist() == [code in used[group] for code in drawn]
        (section,) = analysis.sections(result)
        assert isinstance(section, page.Plots)
        assert (
            section.plots[0].title
            == {
                "lc": "Stored codes, before the projector",
                "groups": "Codes, group 1",
                "cosine": "Codes",
            }[name]
        )
        caption, size = section.plots[0].caption, tokenizer.codebook_size
        assert f"{len(drawn)} of {size} are shown" in caption
        assert ("sampled uniformly (seed 5)" in caption) == (len(drawn) < size)


def test_more_codes_than_sklearn_is_used_for_need_another_package(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "MAX_SKLEARN", 59)
    monkeypatch.setattr(embedding, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"t-SNE of 60 codes needs .* openTSNE.*pip install 'vqpipe\[embedding\]'"):
        one("embedding", tokenizers["groups"], embedding_codes=1000)
    assert not isinstance(one("embedding", tokenizers["groups"], embedding_codes=118), NotComputed)  # 59 a group
    monkeypatch.setattr(embedding, "find_spec", lambda name: object())
    assert not isinstance(one("embedding", tokenizers["groups"], embedding_codes=1000), NotComputed)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["sklearn", "openTSNE"])
def test_tsne_separates_clusters_and_is_reproducible(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "openTSNE":
        pytest.importorskip("openTSNE")
        monkeypatch.setattr(embedding, "MAX_SKLEARN", 39)
    random = torch.Generator().manual_seed(0)
    near, far = torch.randn(20, 60, generator=random), torch.randn(20, 60, generator=random) + 30
    places = embedding.tsne(torch.cat([near, far]), seed=1)
    assert isinstance(places, np.ndarray)
    assert places.shape == (40, 2)
    assert np.array_equal(places, embedding.tsne(torch.cat([near, far]), seed=1))
    first, second = places[:20], places[20:]
    radius = max(np.linalg.norm(half - half.mean(0), axis=1).max() for half in (first, second))
    assert np.linalg.norm(first.mean(0) - second.mean(0)) > 2 * radius


def test_codes_without_a_map_give_the_reason() -> None:
    assert embedding.tsne(torch.ones(20, 3), seed=0) == "the codes are all the same, or not finite"
    assert "too few" in str(embedding.tsne(torch.randn(5, 3), seed=0))


def test_a_code_is_not_its_own_neighbor_even_among_equal_codes() -> None:
    table = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [1.0, 0.0]])
    near = replacement.kth_nearest(torch.arange(4), table, [1, 2, 3])
    assert near[:, 0].tolist()[:2] == [1, 0]
    assert near[2].tolist()[0] == 3
    assert all(code not in row for code, row in enumerate(near.tolist()))
    assert near[0].tolist() == [1, 3, 2]


@pytest.mark.parametrize("name", ANALYSES)
def test_one_image_is_enough_for_every_analysis(
    name: str, tokenizers: dict[str, Tokenizer], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "tsne", lambda vectors, seed: vectors[:, :2].numpy())
    tokenizer = tokenizers["residual"]
    analysis = look(one(name, tokenizer), tokenizer, images, [[4]])
    result = analysis.result()
    assert "not_computed" not in result
    text = page.render(page.ReportPage("one", "image", analysis.sections(result)))
    assert text.count("<section") == len(analysis.sections(result))


def test_padded_and_tiled_images_are_excluded_and_counted(tokenizers: dict[str, Tokenizer], images: Tensor) -> None:
    tokenizer = tokenizers["lc"]
    for name in ("replacement", "patches"):
        analysis = one(name, tokenizer)
        odd = images[:2, :, :15, :15]
        analysis.update(odd, odd, tokenizer.encode(images[:2]), KEYS[:2])  # padded to 16
        tiled = tokenizer.encode(images[:2]).repeat(1, 2)
        analysis.update(images[:2], images[:2], tiled, KEYS[:2])
        assert "padded, or in tiles" in analysis.result()["not_computed"]
        look(analysis, tokenizer, images, [range(3)])
        assert analysis.result()["num_without_layout"] == 4


def test_an_analysis_that_does_not_apply_gives_the_reason(
    tokenizers: dict[str, Tokenizer], small_tokenizer: Callable[[QuantizerConfig], Tokenizer]
) -> None:
    fsq, scales = small_tokenizer(FSQ), small_tokenizer(SCALES)
    for analysis in build(list(ANALYSES), fsq):
        assert isinstance(analysis, NotComputed)
        result = analysis.result()
        assert result == {"not_computed": "the fsq quantizer has no codebook"}
        (section,) = analysis.sections(result)
        assert isinstance(section, page.Reasons)
        assert section.reasons == {analysis.name: result["not_computed"]}
    names = {type(analysis).__name__ for analysis in build(["patches", "replacement"], scales)}
    assert names == {"NotComputed", "Replacement"}
    assert build(["patches", "embedding", "patches"], tokenizers["lc"])[0].name == "embedding"  # the page's order
    with pytest.raises(ConfigError, match="no analysis 'tsne'"):
        build(["tsne"], fsq)


def test_codes_of_all_scales_are_replaced(
    images: Tensor, small_tokenizer: Callable[[QuantizerConfig], Tokenizer]
) -> None:
    scales = small_tokenizer(SCALES)
    result = look(one("replacement", scales), scales, images, [range(3)]).result()
    assert [row["k"] for row in result["rows"]] == [0, 1, 50]


def test_a_sheet_with_fewer_patches_is_transparent_there() -> None:
    sheet = Image.open(io.BytesIO(patches.code_sheet(np.full((2, 3, 8, 8), 7, np.uint8))))
    alpha = np.array(sheet)[..., 3]
    assert sheet.size == (248, 248)
    assert (alpha[:80, :80] == 255).all()
    assert (alpha[84:] == 0).all()
    assert (np.array(sheet)[:80, 84:164, 0] == 7).all()
