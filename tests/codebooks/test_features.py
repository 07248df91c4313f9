"""patch-pca against NumPy, pooling, shards of features, and feature files read as one matrix."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from vqpipe import artifacts, distributed
from vqpipe.artifacts import Artifact, Draft
from vqpipe.codebooks.encoders import PatchEncoder, PatchPca, check_pool, pool_features
from vqpipe.codebooks.features import (
    FeaturesConfig,
    FeatureSet,
    encoder_weights,
    fit_encoder,
    open_encoder,
    open_features,
    write_features,
)
from vqpipe.codebooks.kmeans import KmeansConfig, kmeans
from vqpipe.config import from_table, to_request
from vqpipe.data.decoding import decode
from vqpipe.data.images import ImageSet, open_images
from vqpipe.data.transforms import center_crop, to_float
from vqpipe.errors import ArtifactError, ConfigError, DataError, NumericError
from vqpipe.progress import Silent

CONFIG = FeaturesConfig(image_size=32, patch_size=4, components=10, images_per_shard=3, batch_size=2)


class Record(Silent):
    """Records the progress."""

    def __init__(self) -> None:
        self.resumed, self.done = list[int](), list[int]()

    def start(self, title: str, total: int | None, unit: str = "images", done: int = 0) -> None:
        self.resumed.append(done)

    def advance(self, count: int = 1) -> None:
        self.done.append(count)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Eight small images in two classes, and one unreadable file."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for index in range(8):
        path = folder / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (9, 11, 3), dtype=np.uint8))
        coarse.resize((44, 36), Image.Resampling.BICUBIC).save(path)
    (folder / "class0" / "broken.png").write_bytes(b"not a picture")
    return open_images([folder])


def write(draft: Draft, images: ImageSet, encoder: PatchEncoder, config: FeaturesConfig = CONFIG, **options) -> dict:
    return write_features(draft, images, encoder, config, **{"max_skipped": 0.2} | options)


def extract(images: ImageSet, out: Path, config: FeaturesConfig = CONFIG, **options) -> Artifact:
    draft = artifacts.start(out, "features", to_request(config), {"images": images})
    assert isinstance(draft, Draft)
    with draft:
        encoder = open_encoder(config, None)
        fit_encoder(encoder, draft, images, config, seed=0)
        return draft.publish(write(draft, images, encoder, config, **options))


def test_patch_pca_whitens_the_patches_of_its_fit(images: ImageSet) -> None:
    encoder = PatchPca(32, 4, 10)
    encoder.fit(images, None, 10**6, seed=0)
    batch = torch.stack([center_crop(decode(images.read(i)), 32) for i in range(9) if "broken" not in images.key(i)])
    vectors = encoder(batch).permute(0, 2, 3, 1).reshape(-1, 10).double().numpy()
    np.testing.assert_allclose(vectors.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(vectors.T, bias=True), np.eye(10), atol=1e-3)

    patches = to_float(batch).unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 48).double().numpy()
    variances, directions = np.linalg.eigh(np.cov(patches.T, bias=True))
    expected = (patches - patches.mean(axis=0)) @ directions[:, ::-1][:, :10] / np.sqrt(variances[::-1][:10])
    np.testing.assert_allclose(np.abs(vectors), np.abs(expected), atol=2e-3)


def test_patch_pca_finds_a_known_subspace() -> None:
    random = np.random.default_rng(0)
    directions = np.linalg.qr(random.standard_normal((12, 3)))[0]
    sample = random.standard_normal((4000, 3)) * [5, 2, 1] @ directions.T
    encoder = PatchPca(2, 2, 3)
    encoder.set_components(np.zeros(12), sample.T @ sample / 4000)
    found = encoder.project.weight.flatten(1).double().numpy()
    np.testing.assert_allclose(found @ directions @ directions.T, found, atol=1e-4)
    largest = np.abs(found).argmax(axis=1)
    assert (found[np.arange(3), largest] > 0).all()


def test_components_without_variance_stay_near_zero() -> None:
    """Patches whose last three numbers are constant: 9 directions vary, 12 are asked for."""
    random = np.random.default_rng(0)
    sample = np.concatenate([random.standard_normal((4000, 9)), np.full((4000, 3), 0.5)], axis=1)
    mean = sample.mean(axis=0)
    encoder = PatchPca(2, 2, 12)
    encoder.set_components(mean, sample.T @ sample / 4000 - np.outer(mean, mean))
    found = torch.from_numpy(sample).float() @ encoder.project.weight.flatten(1).T + encoder.project.bias
    assert found.isfinite().all()
    np.testing.assert_allclose(found.std(dim=0, correction=0), [1] * 9 + [0] * 3, atol=1e-2)


def test_patch_pca_is_fitted_on_the_first_images_alone(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for index in range(6):
        image = random.integers(0, 256 if index < 3 else 32, (16, 16, 3), dtype=np.uint8)
        for folder in ("all", "first") if index < 3 else ("all",):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / folder / f"{index}.png")
    limited, alone = PatchPca(16, 4, 5), PatchPca(16, 4, 5)
    limited.fit(open_images([tmp_path / "all"]), 3, 10**6, seed=0)
    alone.fit(open_images([tmp_path / "first"]), None, 10**6, seed=0)
    assert torch.equal(limited.project.weight, alone.project.weight)


def test_pooling_averages_squares_in_row_major_order() -> None:
    grid = torch.arange(2 * 16.0).view(1, 2, 4, 4)
    pooled = pool_features(grid, 2)
    assert pooled.shape == (1, 4, 2)
    assert pooled[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    with pytest.raises(ConfigError, match=r"8 x 8 patches cannot be averaged to 9 x 9. Use --pool 8 or less"):
        check_pool(PatchPca(32, 4, 10), 9)


@pytest.mark.parametrize(("side", "pool"), [(7, 4), (14, 4), (8, 3)])
def test_pooling_to_a_grid_that_does_not_divide_is_adaptive(side: int, pool: int) -> None:
    grid = torch.rand(2, 5, side, side)
    found = pool_features(grid, pool).transpose(1, 2).unflatten(2, (pool, pool))
    assert torch.equal(found, torch.nn.functional.adaptive_avg_pool2d(grid, pool))
    edges = [(i * side // pool, -(-(i + 1) * side // pool)) for i in range(pool)]
    cells = [[grid[:, :, a:b, c:d].mean((2, 3)) for c, d in edges] for a, b in edges]
    torch.testing.assert_close(found, torch.stack([torch.stack(row, 2) for row in cells], 2))


@pytest.mark.parametrize(("side", "pool"), [(16, 4), (7, 1), (32, 32)])
def test_pooling_to_a_grid_that_divides_has_the_bits_of_plain_average_pooling(side: int, pool: int) -> None:
    grid = torch.rand(2, 5, side, side)
    found = pool_features(grid, pool).transpose(1, 2).unflatten(2, (pool, pool))
    assert torch.equal(found, torch.nn.functional.avg_pool2d(grid, side // pool))


def test_shards_hold_the_features_of_the_encoder(images: ImageSet, tmp_path: Path) -> None:
    record = Record()
    artifact = extract(images, tmp_path / "features", progress=record)
    assert artifact.names() == [
        "encoder.safetensors",
        *(f"features-0000{i}.npy" for i in range(3)),
        *(f"samples-0000{i}.parquet" for i in range(3)),
        "skipped.parquet",
    ]
    facts = {"num_images": 8, "num_vectors": 512, "dim": 10, "encoder": "patch-pca", "skipped": {"not-an-image": 1}}
    assert artifact.facts == facts
    assert (record.resumed, sum(record.done)) == ([0], 9)
    rows = [row for name in artifact.names("samples-*") for row in parquet.read_table(artifact.file(name)).to_pylist()]
    kept = [i for i in range(9) if "broken" not in images.key(i)]
    assert [row["key"] for row in rows] == [images.key(i) for i in kept]
    assert [row["label"] for row in rows] == [images.label(i) for i in kept]
    assert [(row["shard"], row["index"]) for row in rows] == [images.origin(i) for i in kept]

    encoder = PatchPca(32, 4, 10)
    encoder.load(artifact.file("encoder.safetensors"))
    stored = open_features([artifact.path])
    batch = torch.stack([center_crop(decode(images.read(i)), 32) for i in kept])
    expected = pool_features(encoder(batch), 8).half().float().flatten(0, 1)
    torch.testing.assert_close(stored.read(0, 512), expected, atol=2e-3, rtol=1e-3)
    assert stored.labels is not None
    assert stored.labels.tolist() == [images.label(i) for i in kept for _ in range(64)]
    assert np.load(artifact.file("features-00000.npy"), mmap_mode="r").dtype == np.float16


def test_a_flipped_bit_is_found_before_clustering(images: ImageSet, tmp_path: Path) -> None:
    path = extract(images, tmp_path / "features").path
    shard = path / "features-00001.npy"
    damaged = bytearray(shard.read_bytes())
    damaged[-100] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ArtifactError, match=r"features-00001\.npy is damaged: sha256"):
        kmeans(open_features([path]), KmeansConfig(k=4, iterations=1), seed=0, device=torch.device("cpu"))


def test_errors_about_an_artifact_of_features_name_it(images: ImageSet, tmp_path: Path) -> None:
    stored = open_features([extract(images, tmp_path / "of-pictures").path])
    with pytest.raises(DataError, match=r"^of-pictures has 512 vectors, fewer than k = 513"):
        kmeans(stored, KmeansConfig(k=513), seed=0, device=torch.device("cpu"))


def test_resume_writes_only_missing_shards(images: ImageSet, tmp_path: Path) -> None:
    whole = extract(images, tmp_path / "whole")

    class Stop(Exception):
        pass

    class StopInSecondShard(Record):
        def advance(self, count: int = 1) -> None:
            super().advance(count)
            if sum(self.done) > 4:
                raise Stop

    with pytest.raises(Stop):
        extract(images, tmp_path / "cut", progress=StopInSecondShard())
    first = tmp_path / "cut.partial" / "features-00000.npy"
    before = first.stat().st_mtime_ns, (tmp_path / "cut.partial" / "encoder.safetensors").stat().st_mtime_ns
    record = Record()
    resumed = extract(images, tmp_path / "cut", progress=record)
    after = (resumed.path / first.name).stat().st_mtime_ns, resumed.file("encoder.safetensors").stat().st_mtime_ns
    assert before == after
    assert (record.resumed, sum(record.done)) == ([3], 6)
    assert resumed.digest == whole.digest


def test_two_ranks_and_two_workers_write_the_bytes_of_one(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = extract(images, tmp_path / "alone")
    out = tmp_path / "together"
    draft = artifacts.start(out, "features", to_request(CONFIG), {"images": images})
    assert isinstance(draft, Draft)
    with draft:
        encoder = open_encoder(CONFIG, None)
        fit_encoder(encoder, draft, images, CONFIG, seed=0)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        for rank in (1, 0):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            write(draft, images, encoder, num_workers=2 * rank, max_skipped=1.0)
        files = dict(draft.publish({}).manifest.files)
    expected = dict(alone.manifest.files)
    del expected["skipped.parquet"]  # it needs what the other process has found
    assert files == expected


class Overflowing(PatchEncoder):
    """An encoder without weights, whose features exceed float16 on bright images."""

    image_size, grid_size, dim, default_pool = 32, 1, 2, 1

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(1, 2, 3)).view(-1, 1, 1, 1).expand(-1, 2, 1, 1) ** 2 * 2


def test_features_beyond_float16_name_their_image(tmp_path: Path) -> None:
    for name, level in (("a", 10), ("b", 200)):
        Image.new("RGB", (32, 32), (level,) * 3).save(tmp_path / f"{name}.png")
    images = open_images([tmp_path])
    draft = artifacts.start(tmp_path / "out", "features", {}, {})
    assert isinstance(draft, Draft)
    with draft, pytest.raises(NumericError, match=r"features of image b"):
        write(draft, images, Overflowing())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "clip"}, "'clip' is unknown"),
        ({"encoder": "open_clip:"}, "'open_clip:' is unknown"),
        ({"pool": 0}, "features.pool = 0"),
        ({"precision": "fp16"}, "'fp16' is not a choice"),
    ],
)
def test_invalid_settings_are_errors(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_table(FeaturesConfig, settings, "features")


def test_unusable_patches_and_weights_are_errors() -> None:
    with pytest.raises(ConfigError, match="patches of 5 pixels do not tile an image of 32"):
        open_encoder(FeaturesConfig(image_size=32, patch_size=5), None)
    with pytest.raises(ConfigError, match="64 components of patches with 48 values"):
        open_encoder(FeaturesConfig(image_size=32, patch_size=4), None)
    with pytest.raises(ConfigError, match="patch-pca has no weights"):
        encoder_weights(FeaturesConfig(weights=Path("x.pt")))
    assert encoder_weights(FeaturesConfig()) is None


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    data = np.arange(60, dtype=np.float16).reshape(20, 3)
    for name, part in (("b", data[:7]), ("a", data[7:])):
        np.save(tmp_path / f"{name}.npy", part)
    return [tmp_path / "b.npy", tmp_path / "a.npy"]


def test_rows_run_through_files_in_the_given_order(files: list[Path]) -> None:
    features = open_features(files)
    data = np.arange(60, dtype=np.float32).reshape(20, 3)
    assert (features.num_vectors, features.dim, features.labels) == (20, 3, None)
    for start, stop in ((0, 20), (5, 9), (0, 7), (7, 8)):
        assert np.array_equal(features.read(start, stop), data[start:stop])
    rows = np.array([19, 0, 7, 6, 0])
    assert np.array_equal(features.take(rows), data[rows])
    assert (features.place(6), features.place(7)) == ("b.npy, row 6", "a.npy, row 0")


def test_digest_is_of_content_and_order(files: list[Path], tmp_path: Path) -> None:
    digest = open_features(files).digest
    renamed = [path.rename(path.with_name(f"other-{path.name}")) for path in files]
    assert open_features(renamed).digest == digest
    assert open_features(renamed[::-1]).digest != digest


def test_rows_are_float16_if_every_shard_is() -> None:
    parts = [np.arange(8, dtype=kind).reshape(4, 2) for kind in (np.float16, np.float16, np.float32, np.float64)]
    half, mixed = FeatureSet(parts[:2], ["a", "b"]), FeatureSet(parts, list("abcd"))
    assert (half.dtype, mixed.dtype) == (np.float16, np.float32)
    for features in (half, mixed):
        rows = features.stored(2, 7)
        assert rows.numpy().dtype == features.dtype
        assert np.array_equal(rows.float(), np.concatenate([parts[0][2:], parts[0][:3]]))
        assert features.read(7, 8).tolist() == [[6, 7]]
    assert np.shares_memory(half.stored(4, 6).numpy(), parts[1])
    assert not np.shares_memory(mixed.stored(4, 6).numpy(), parts[1])


def test_blocks_cover_all_rows_once() -> None:
    features = FeatureSet([np.zeros((70_000, 1), np.float16)], ["x"])
    blocks = [(start, features.block_stop(start)) for start in features.block_starts()]
    assert blocks == [(0, 65_536), (65_536, 70_000)]


def test_files_without_a_matrix_of_floats_are_errors(files: list[Path], tmp_path: Path) -> None:
    def save(array: np.ndarray) -> Path:
        np.save(tmp_path / "bad.npy", array)
        return tmp_path / "bad.npy"

    with pytest.raises(DataError, match=r"float32 of shape \[3\]"):
        open_features([save(np.zeros(3, np.float32))])
    with pytest.raises(DataError, match=r"int64 of shape \[3, 2\]"):
        open_features([save(np.zeros((3, 2), np.int64))])
    with pytest.raises(DataError, match="holds no vectors"):
        open_features([save(np.zeros((0, 2), np.float32))])
    with pytest.raises(DataError, match=r"bad.npy has dimension 5, b.npy has 3"):
        open_features([files[0], save(np.zeros((4, 5), np.float32))])
    with pytest.raises(DataError, match=r"is not a \.npy array"):
        open_features([save(np.array([{}], dtype=object))])
    with pytest.raises(DataError, match=r"is a folder: features are one artifact, or \.npy files"):
        open_features([files[0], tmp_path])
    np.savez(tmp_path / "bad.npz", np.zeros((4, 3)))
    with pytest.raises(DataError, match=r"is not a \.npy array .*Save it with numpy\.save"):
        open_features([tmp_path / "bad.npz"])
    (tmp_path / "bad.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"is not a \.npy array"):
        open_features([tmp_path / "bad.npy"])
    whole = save(np.zeros((100, 3), np.float16)).read_bytes()
    (tmp_path / "bad.npy").write_bytes(whole[:-50])
    with pytest.raises(DataError, match=r"bad.npy is cut short: it ends after 678 bytes"):
        open_features([files[0], tmp_path / "bad.npy"])
    with pytest.raises(DataError, match="No such file"):
        open_features([tmp_path / "absent.npy"])
    with pytest.raises(ArtifactError, match="not a vqpipe artifact"):
        open_features([tmp_path])
    with pytest.raises(DataError, match="no features were named"):
        open_features([])
