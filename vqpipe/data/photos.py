"""`builtin:photos`: crops of photographs that ship inside the scikit-image and scikit-learn wheels.

They need no network and no data set, and are enough to try every command. Ten color photographs; grayscale, drawn and
transparent pictures of these packages are left out, and one picture of a stereo pair. Each is covered by grids of
square crops of 256, 192 and 128 pixels, at most half a side apart. Neighboring crops overlap; the splits share no
photograph:

    builtin:photos/train     673 crops of 8 photographs
    builtin:photos/heldout   180 crops of 2 photographs
    builtin:photos           both, train first: 853 crops

A crop's key is its photograph, side and upper left corner: `coffee-128-x064-y128`. Crops have no class.
"""

import hashlib
import importlib.util
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from vqpipe.data.sources import NO_LABEL
from vqpipe.errors import DataError
from vqpipe.files import BUILTIN_IMAGES

SIDES = (256, 192, 128)


@dataclass(frozen=True)
class Photo:
    """A photograph in a wheel, cropped to `box` (left, upper, right, lower), then reduced by averages of `shrink`^2
    pixels."""

    package: str
    file: str
    size: tuple[int, int]
    """Width and height after `box` and `shrink`."""
    box: tuple[int, int, int, int] | None = None
    shrink: int = 1

    @property
    def name(self) -> str:
        """The first part of its crops' keys."""
        return Path(self.file).stem.replace("_", "-")

    @property
    def path(self) -> Path:
        """Its path in the installed package; a DataError where it is missing."""
        spec = importlib.util.find_spec(self.package)
        path = Path(spec.origin).parent / self.file if spec and spec.origin else None
        if path is None or not path.is_file():
            raise DataError(
                f"{self.package} lacks {self.file}, a photograph of builtin:photos",
                f"Install the wheel again: pip install --force-reinstall --no-deps {INSTALL_NAMES[self.package]}",
            )
        return path


INSTALL_NAMES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
TRAIN = (
    Photo("skimage", "data/astronaut.png", (512, 512)),
    Photo("skimage", "data/chelsea.png", (451, 300)),
    Photo("skimage", "data/hubble_deep_field.jpg", (500, 436), shrink=2),
    Photo("skimage", "data/ihc.png", (512, 512)),
    Photo("skimage", "data/motorcycle_left.png", (741, 500)),
    Photo("skimage", "data/retina.jpg", (498, 498), box=(207, 207, 1203, 1203), shrink=2),  # inside a round image
    Photo("skimage", "data/rocket.jpg", (640, 427)),
    Photo("sklearn", "datasets/images/flower.jpg", (640, 427)),
)
HELDOUT = (
    Photo("skimage", "data/coffee.png", (600, 400)),
    Photo("sklearn", "datasets/images/china.jpg", (640, 427)),
)
SPLITS = dict(zip(BUILTIN_IMAGES, (TRAIN + HELDOUT, TRAIN, HELDOUT), strict=True))


@dataclass(frozen=True)
class Crop:
    """A square of `side` pixels of a photograph; x and y are those of its upper left corner."""

    photo: Photo
    side: int
    x: int
    y: int


class Photos:
    """The crops of some photographs, one photograph after another, large crops first. An ImageSource."""

    def __init__(self, photos: tuple[Photo, ...], name: str) -> None:
        self.name = name
        self.crops = [crop for photo in photos for crop in cut(photo)]
        self.labels = np.full(len(self.crops), NO_LABEL, np.int32)
        self.class_names: tuple[str, ...] = ()
        self.num_classes: int | None = None
        self.left_out: dict[str, int] = {}
        self.unlabeled = ""
        files = {photo: hashlib.sha256(photo.path.read_bytes()).hexdigest() for photo in photos}
        keys = "".join(f"{self.key(i)} {files[crop.photo]}\n" for i, crop in enumerate(self.crops))
        self.digest = hashlib.sha256(keys.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.crops)

    def key(self, i: int) -> str:
        """`coffee-128-x064-y128`."""
        crop = self.crops[i]
        return f"{crop.photo.name}-{crop.side}-x{crop.x:03d}-y{crop.y:03d}"

    def origin(self, i: int) -> tuple[str, int]:
        """The name of the set, and `i`."""
        return self.name, i

    def read(self, i: int) -> bytes:
        """The crop as a PNG."""
        crop, file = self.crops[i], io.BytesIO()
        window = (crop.x, crop.y, crop.x + crop.side, crop.y + crop.side)
        load(crop.photo).crop(window).save(file, "PNG", compress_level=0)
        return file.getvalue()


def open_photos(spec: str) -> Photos:
    """`builtin:photos`, `builtin:photos/train` or `builtin:photos/heldout`.

    Raises:
        DataError: another name, or a photograph is missing.
    """
    if spec not in SPLITS:
        raise DataError(f"there is no {spec}", f"Use {', '.join(SPLITS)}")
    return Photos(SPLITS[spec], spec)


def cut(photo: Photo) -> list[Crop]:
    """Square crops of each side, evenly spaced, at most half a side apart, up to the borders."""
    crops = []
    for side in SIDES:
        xs, ys = (spread(length, side) for length in photo.size)
        crops += [Crop(photo, side, x, y) for y in ys for x in xs]
    return crops


def spread(length: int, side: int) -> list[int]:
    """Evenly spaced offsets of crops of `side` along `length` pixels."""
    steps = -(-(length - side) // (side // 2))
    return [(length - side) * step // max(steps, 1) for step in range(steps + 1)]


@lru_cache(maxsize=len(TRAIN + HELDOUT))
def load(photo: Photo) -> Image.Image:
    """The pixels of a photograph, as RGB, cropped and reduced."""
    with Image.open(photo.path) as image:
        pixels = image.convert("RGB").crop(photo.box)
    pixels = pixels.reduce(photo.shrink)
    if pixels.size != photo.size:
        raise DataError(f"{photo.path} is not the photograph of that name: {pixels.size} pixels, not {photo.size}")
    return pixels
