"""From bytes to pixels and features: JPEG decoding, tar shards, stored features, on one core and from memory.

The photographs of builtin:photos, encoded as JPEG (quality 90, 4:2:0) in memory. Files lie in a temporary folder and
are read more than once, so that the page cache gives them, not the disk: measured is what reading costs the CPU.
"""

import io
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vqpipe.benchmarks.measure import Case, Method, Plan, Row, Settings, Stopwatch, need, offered, version_of
from vqpipe.codebooks.features import FeatureSet, open_matrix
from vqpipe.data import transforms
from vqpipe.data.photos import HELDOUT, TRAIN, load
from vqpipe.data.tars import TarIndex, Tars, index_tar, write_tar

QUALITY = 90

Decode = Callable[[bytes], np.ndarray]
"""A JPEG -> uint8[H, W, 3]."""


def plans(settings: Settings) -> list[Plan]:
    """Decoding, tars, features."""
    decodes, samples, rows = (2, 40, 2000) if settings.quick else (8, 2000, 100_000)
    dim = 64 if settings.quick else 768
    return [
        Plan("JPEG decoding", 5, partial(decoding, settings, decodes)),
        Plan(f"tar shards: {samples:,} images", 4, partial(tar_reading, settings, samples)),
        Plan(f"stored features: {rows:,} x {dim} float16", 3, partial(feature_reading, settings, rows, dim)),
    ]


def jpegs() -> list[bytes]:
    """The built-in photographs, whole, as JPEG."""
    encoded = []
    for photo in TRAIN + HELDOUT:
        file = io.BytesIO()
        load(photo).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
        encoded.append(file.getvalue())
    return encoded


# ------------------------------------------------------------------------------------------------------------ JPEG


def decoding(settings: Settings, times: int, stopwatch: Stopwatch) -> Case:
    """Each photograph `times` times, one after another; pixels are compared with PIL's."""
    files = jpegs()
    truth = [decode_pil(data) for data in files]
    megapixels = sum(pixels.shape[0] * pixels.shape[1] for pixels in truth) / 1e6
    case = Case(
        title="JPEG decoding",
        unit="images",
        settings={"photographs": len(files), "megapixels_each": round(megapixels / len(files), 3), "quality": QUALITY},
    )
    decoders: dict[str, Callable[[], tuple[Decode, str]]] = {
        "vqpipe": lambda: (decode_ours, f"{version_of('vqpipe')}, {engine()}"),
        "PIL": lambda: (decode_pil, version_of("pillow")),
        "simplejpeg": lambda: (need("simplejpeg").decode_jpeg, version_of("simplejpeg")),
        "torchvision": in_torchvision,
        "OpenCV": in_opencv,
    }

    def method(name: str) -> Method:
        decode, version = decoders[name]()
        return Method(name=name, call=partial(repeatedly, decode, files, times), version=version, ours=name == "vqpipe")

    methods = offered({name: partial(method, name) for name in decoders}, case)
    samples = stopwatch.measure(methods, case)
    case.rows = stopwatch.rows(methods, samples, times * len(files))
    for row in case.rows:
        row.extra["same_pixels"] = same_pixels(truth, samples[row.name].result)
        row.extra["megapixels_per_s"] = times * megapixels / (1e-3 * row.wall_ms)
    return case


def repeatedly(decode: Decode, files: Sequence[bytes], times: int) -> list[np.ndarray]:
    """All files so many times; the pixels of the last."""
    for data in list(files) * (times - 1):
        decode(data)
    return [decode(data) for data in files]


def engine() -> str:
    """What our `decode` decodes a plain JPEG with."""
    return version_of("simplejpeg") if getattr(transforms, "simplejpeg", None) else version_of("pillow")


def decode_ours(data: bytes) -> np.ndarray:
    return np.asarray(transforms.decode(data))


def decode_pil(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def in_torchvision() -> tuple[Decode, str]:
    vision: Any = need("torchvision.io")

    def decode(data: bytes) -> np.ndarray:
        encoded = torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))
        return vision.decode_jpeg(encoded, mode=vision.ImageReadMode.RGB).permute(1, 2, 0).numpy()

    return decode, version_of("torchvision")


def in_opencv() -> tuple[Decode, str]:
    cv2: Any = need("cv2")

    def decode(data: bytes) -> np.ndarray:
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    return decode, f"opencv {cv2.__version__}"


def same_pixels(truth: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Share of pixel values that are the true ones, 0..1."""
    equal = sum(int((a == b).sum()) for a, b in zip(truth, found, strict=True))
    return equal / sum(pixels.size for pixels in truth)


# ------------------------------------------------------------------------------------------------------------- tars


def tar_reading(settings: Settings, count: int, stopwatch: Stopwatch) -> Case:
    """The encoded bytes and the label of every image of one shard, in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard-000000.tar"
        images = jpegs()
        with write_tar(path) as tar:
            for number in range(count):
                data = images[number % len(images)]
                tar.write(f"{number:08d}", data, "jpg", number % 10)
        kept = index(path)
        case = Case(
            title=f"tar shards: {count:,} images",
            unit="images",
            settings={"images": count, "megabytes": round(path.stat().st_size / 1e6, 1)},
        )
        makers: dict[str, Callable[[], Method]] = {
            "vqpipe": lambda: Method(
                name="vqpipe",
                call=lambda: read_all(kept),
                version=version_of("vqpipe"),
                ours=True,
                note="indexed before, once per file",
            ),
            "vqpipe, first time": lambda: Method(
                name="vqpipe, first time",
                call=lambda: read_all(index(path)),
                version=version_of("vqpipe"),
                ours=True,
                baseline="vqpipe",
                note="checks, hashes and indexes the file, too",
            ),
            "webdataset": lambda: Method(
                name="webdataset", call=through_webdataset(path), version=version_of("webdataset")
            ),
            "tarfile": lambda: Method(
                name="tarfile", call=lambda: read_tarfile(path), version="Python's own, a bare loop"
            ),
        }
        methods = offered(makers, case)
        samples = stopwatch.measure(methods, case)
        case.rows = [with_bytes(row, path) for row in stopwatch.rows(methods, samples, count)]
        read = {name: its.result for name, its in samples.items()}
        wrong = [name for name, total in read.items() if total != read["vqpipe"]]
        case.rows = [replace(row, note="reads other bytes") if row.name in wrong else row for row in case.rows]
    return case


def index(path: Path) -> TarIndex:
    """The shard walked, hashed and indexed; past the cache that keeps this for the next time."""
    with path.open("rb") as file:
        return index_tar(file, str(path), mtime_ns=path.stat().st_mtime_ns)


def read_all(shard: TarIndex) -> int:
    """Bytes of all images."""
    tars = Tars([shard], "shard")
    return sum(len(tars.read(i)) for i in range(len(tars)))


def through_webdataset(path: Path) -> Callable[[], int]:
    webdataset: Any = need("webdataset")

    def call() -> int:
        return sum(len(sample["jpg"]) for sample in webdataset.WebDataset(str(path), shardshuffle=False))

    return call


def read_tarfile(path: Path) -> int:
    total = 0
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            total += len(data) if member.name.endswith(".jpg") else 0
    return total


def with_bytes(row: Row, path: Path) -> Row:
    row.extra["megabytes_per_s"] = path.stat().st_size / 1e6 / (1e-3 * row.wall_ms)
    return row


# --------------------------------------------------------------------------------------------------------- features


def feature_reading(settings: Settings, rows: int, dim: int, stopwatch: Stopwatch) -> Case:
    """A float16 matrix, read once from its first row to its last, as float32."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features-00000.npy"
        random = np.random.default_rng(settings.seed)
        np.save(path, random.standard_normal((rows, dim), dtype=np.float32).astype(np.float16))
        megabytes = path.stat().st_size / 1e6
        case = Case(
            title=f"stored features: {rows:,} x {dim} float16",
            unit="MB",
            settings={"rows": rows, "dim": dim, "megabytes": round(megabytes, 1)},
        )
        methods = [
            Method(
                name="vqpipe",
                call=lambda: read_blocks(path),
                version=version_of("vqpipe"),
                ours=True,
                note="memory-mapped, block by block",
            ),
            Method(
                name="numpy, whole",
                call=lambda: np.load(path).astype(np.float32),
                version=version_of("numpy"),
                note="all rows in memory",
            ),
            Method(
                name="numpy to torch, mapped",
                call=lambda: torch.from_numpy(np.array(np.load(path, mmap_mode="r"))).float(),
                version=version_of("numpy"),
                note="all rows in memory",
            ),
        ]
        samples = stopwatch.measure(methods, case)
        case.rows = stopwatch.rows(methods, samples, megabytes)
    return case


def read_blocks(path: Path) -> int:
    """Rows read, as k-means reads them."""
    features = FeatureSet([open_matrix(path)], [path.name])
    return sum(len(features.read(start, features.block_stop(start))) for start in features.block_starts())
