"""Subject "data": from files to a batch of random crops and flips, on one core, beside other loaders.

Every method reads the same JPEGs, resizes the short side to that of the crop, crops at random, flips half of them, and
returns uint8[B, 3, S, S] in this process, without workers: so many workers do as many times as much. The peers use
torchvision's transforms with their default filter, bilinear and antialiased, which costs less than our bicubic one.

The images are cut from the photographs of `builtin:photos`. Those of 12 megapixels are enlarged from them, with grain
added, so that they have as many bytes as photographs of that size.
"""

import io
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from vqpipe.benchmarks.timing import Case, Method, Settings, need, quotient, timed, version_of
from vqpipe.data.batches import TrainingStream
from vqpipe.data.images import open_images
from vqpipe.data.photos import HELDOUT, TRAIN, load
from vqpipe.data.tars import write_tar
from vqpipe.data.transforms import DataConfig
from vqpipe.progress import Progress

BATCHES = 8
"""Batches in the files: an epoch."""
QUALITY, GRAIN = 90, 4.0
"""Of the JPEGs; standard deviation of the grain of enlarged photographs, in gray levels."""


@dataclass(frozen=True)
class Loading:
    """Images of one size, in files, and the crops to make of them."""

    width: int
    height: int
    crop: int
    batch: int
    distinct: int
    """Images that differ; they are repeated up to BATCHES batches."""

    @property
    def title(self) -> str:
        """`500 x 375 px JPEG to 128 px crops`."""
        return f"{self.width} x {self.height} px JPEG to {self.crop} px crops"


LOADINGS = (
    Loading(256, 256, 128, 64, 256),
    Loading(500, 375, 128, 32, 64),
    Loading(500, 375, 256, 32, 64),
    Loading(4000, 3000, 256, 2, 4),
)
QUICK_LOADINGS = (Loading(96, 96, 48, 4, 4), Loading(125, 94, 32, 4, 4))


def cases(settings: Settings) -> list[Callable[[Progress], Case]]:
    """A case per size of image and crop."""
    return [partial(time_loading, settings, loading) for loading in (QUICK_LOADINGS if settings.quick else LOADINGS)]


def time_loading(settings: Settings, loading: Loading, progress: Progress) -> Case:
    """Our loader with data.resize "fast" and "exact", bare decoding, and the peers."""
    case = Case(loading.title, "images", {"crop": loading.crop, "batch": loading.batch, "threads": 1})
    with tempfile.TemporaryDirectory() as folder, one_thread():
        jpegs = photographs(loading, settings.seed)
        files = Files(Path(folder), jpegs, loading, settings.seed)
        case.settings["bytes"] = round(sum(map(len, jpegs)) / len(jpegs))
        ours = [files.ours("fast"), files.ours("exact")]
        peers = {
            DECODING: files.decoding,
            "webdataset": files.webdataset,
            "torchvision ImageFolder": files.image_folder,
            "mosaicml-streaming": files.streaming,
        }
        case.rows = timed(ours, peers, case, settings, progress, loading.batch)
    rows = {row.name: row for row in case.rows}
    if decoding := rows.get(DECODING):
        case.facts["over_decoding"] = quotient(rows[ours[0].name].cpu_ms, decoding.cpu_ms)
    return case


DECODING = "simplejpeg, full decode alone"


class Files:
    """The same images as a tar shard, in a folder and as a shard of streaming, and what reads them."""

    def __init__(self, folder: Path, jpegs: Sequence[bytes], loading: Loading, seed: int) -> None:
        self.folder, self.loading, self.seed = folder, loading, seed
        count = BATCHES * loading.batch
        self.jpegs = list(itertools.islice(itertools.cycle(jpegs), count))
        self.keys = [f"{number:06d}" for number in range(count)]
        self.tar = folder / "shard-000000.tar"
        with write_tar(self.tar) as tar:
            for key, jpeg in zip(self.keys, self.jpegs, strict=True):
                tar.write(key, jpeg, "jpg", label=0)

    def ours(self, resize: Literal["fast", "exact"]) -> Method:
        """`TrainingStream`, which training reads."""
        config = DataConfig(image_size=self.loading.crop, resize=resize, num_workers=0)
        stream = TrainingStream(open_images(self.tar), config, seed=self.seed, batch_size=self.loading.batch)
        batches = stream.from_sample(0)
        return Method(
            name=f"vqpipe, {resize}",
            call=lambda: next(batches).images,
            version=version_of("vqpipe"),
            ours=True,
            note=f"tar; data.resize = {resize}",
        )

    def decoding(self) -> Method:
        """Decoding of the whole images, from memory, into nothing."""
        simplejpeg = need("simplejpeg")
        parts = itertools.cycle(
            [self.jpegs[i : i + self.loading.batch] for i in range(0, len(self.jpegs), self.loading.batch)]
        )

        def call() -> None:
            for jpeg in next(parts):
                simplejpeg.decode_jpeg(jpeg)

        return Method(call=call, version=version_of("simplejpeg"), note="from memory, without a crop")

    def webdataset(self) -> Method:
        """A tar in its own order, decoded by Pillow."""
        webdataset = need("webdataset")
        crops = webdataset.WebDataset(str(self.tar), shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
        loader = crops.map_tuple(self.transform()).batched(self.loading.batch, collation_fn=stacked)
        return self.peer(loader, version_of("webdataset"), "tar, Pillow, torchvision; in order")

    def image_folder(self) -> Method:
        """Files in a class folder, shuffled."""
        datasets = need("torchvision.datasets")
        (self.folder / "folder" / "class").mkdir(parents=True)
        for key, jpeg in zip(self.keys, self.jpegs, strict=True):
            (self.folder / "folder" / "class" / f"{key}.jpg").write_bytes(jpeg)
        dataset = datasets.ImageFolder(str(self.folder / "folder"), self.transform())
        loader = torch.utils.data.DataLoader(dataset, self.loading.batch, shuffle=True, collate_fn=stacked)
        return self.peer(loader, version_of("torchvision"), "files, Pillow, torchvision")

    def streaming(self) -> Method:
        """A shard of MDS, shuffled, decoded by Pillow."""
        streaming, transform = need("streaming"), self.transform()
        folder = str(self.folder / "mds")
        with streaming.MDSWriter(out=folder, columns={"image": "bytes", "label": "int"}) as writer:
            for jpeg in self.jpegs:
                writer.write({"image": jpeg, "label": 0})

        def crops(samples: list[dict[str, Any]]) -> torch.Tensor:
            opened = (Image.open(io.BytesIO(sample["image"])).convert("RGB") for sample in samples)
            return torch.stack([transform(image) for image in opened])

        dataset = streaming.StreamingDataset(local=folder, batch_size=self.loading.batch, shuffle=True)
        loader = torch.utils.data.DataLoader(dataset, self.loading.batch, collate_fn=crops)
        return self.peer(loader, version_of("mosaicml-streaming"), "MDS, Pillow, torchvision")

    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """Resize, random crop, flip: of torchvision."""
        transforms = need("torchvision.transforms")
        steps = [transforms.Resize(self.loading.crop), transforms.RandomCrop(self.loading.crop)]
        return transforms.Compose([*steps, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])

    def peer(self, loader: Iterable[Any], version: str, note: str) -> Method:
        """The next batch of a loader, epoch after epoch."""
        batches = endless(loader)
        return Method(call=lambda: next(batches), version=version, note=note)


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader, again and again."""
    while True:
        yield from loader


def stacked(samples: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """The images of a batch."""
    return torch.stack([image for image, _ in samples])


def photographs(loading: Loading, seed: int) -> list[bytes]:
    """Different JPEGs, cut from `builtin:photos` at random, or enlarged from them where these are smaller."""
    rng, size, jpegs = np.random.default_rng(seed), (loading.width, loading.height), []
    for number in range(loading.distinct):
        photo = load((TRAIN + HELDOUT)[number % len(TRAIN + HELDOUT)])
        if photo.width >= loading.width and photo.height >= loading.height:
            left, upper = (int(rng.integers(a - b + 1)) for a, b in zip(photo.size, size, strict=True))
            photo = photo.crop((left, upper, left + loading.width, upper + loading.height))
        else:
            levels = np.asarray(ImageOps.fit(photo, size)) + rng.normal(0.0, GRAIN, (*size[::-1], 1))
            photo = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
        file = io.BytesIO()
        photo.save(file, "JPEG", quality=QUALITY)
        jpegs.append(file.getvalue())
    return jpegs


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread, as in a worker of its DataLoader."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
