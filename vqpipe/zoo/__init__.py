"""Published tokenizers: one TOML file each, in this folder, named after the tokenizer.

An entry states where the files are, their sizes and hashes where these are known, the licence, the codes, and the
numbers that were published with their protocol. What is not known is left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vqpipe.config import from_table, nearest_name, read_toml
from vqpipe.errors import ConfigError

FOLDER = Path(__file__).parent
NOT_STATED = "none stated"
"""`Entry.licence` where no licence was found."""
SIDE = 256
"""Image side of `Entry.bits_per_pixel`."""
MEASURES = {
    "rfid": "rFID {:.2f}",
    "psnr": "PSNR {:.2f} dB",
    "ssim": "SSIM {:.3f}",
    "lpips": "LPIPS {:.3g}",
    "utilization": "utilization {:.3g} %",
}
"""Numbers of `Published`, and how they are written."""


@dataclass(frozen=True, kw_only=True)
class ZooFile:
    """A file of a published tokenizer."""

    name: str
    source: str = ""
    """hf:OWNER/NAME/FILE or a URL; empty if only the page of the entry offers it."""
    size: int | None = None
    """Bytes."""
    size_is_rounded: bool = False
    sha256: str = ""
    sha256_of: str = ""
    """What the hash was read from, if it was not the file at `source`."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Numbers of one source, measured by one protocol."""

    protocol: str
    source: str
    rfid: float | None = None
    psnr: float | None = None
    """dB."""
    ssim: float | None = None
    lpips: float | None = None
    utilization: float | None = None
    """0..1."""

    def numbers(self) -> str:
        """`rFID 2.19, PSNR 20.79 dB, utilization 97 %`."""
        values = {key: getattr(self, key) for key in MEASURES}
        scaled = {
            key: 100 * value if key == "utilization" else value for key, value in values.items() if value is not None
        }
        return ", ".join(MEASURES[key].format(value) for key, value in scaled.items())


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A published tokenizer, or an autoencoder with continuous latents."""

    name: str
    title: str
    family: str
    """A key of `vqpipe.models.released.FAMILIES`, a class of diffusers, or a family that is `refused`."""
    paper: str
    licence: str
    """Of the weights; `NOT_STATED` if none was found."""
    page: str
    """The web page that offers the files."""
    files: tuple[ZooFile, ...] = ()
    """Empty if their names are not known."""
    downsample_factor: int | None = None
    codes: int | None = None
    """Codes of one group; None with continuous latents, or if not known."""
    code_dim: int | None = None
    """Channels of a code, or of a continuous latent."""
    groups: int = 1
    """Ids per position; 0 if not known."""
    tokens: int | None = None
    """Ids of an image of 256 x 256 pixels, if they are not one grid with `groups` ids per position."""
    preset: str = ""
    """The preset of this architecture, to fine-tune from it."""
    settings: tuple[str, ...] = ()
    """What differs from the preset, as values of --set."""
    refused: str = ""
    """Why it cannot be imported; empty if it can."""
    notes: str = ""
    published: tuple[Published, ...] = ()

    @property
    def num_tokens(self) -> int | None:
        """Ids of an image of 256 x 256 pixels."""
        if self.tokens is not None or self.downsample_factor is None or self.codes is None or not self.groups:
            return self.tokens
        return (SIDE // self.downsample_factor) ** 2 * self.groups

    @property
    def bits_per_pixel(self) -> float | None:
        """Of an image of 256 x 256 pixels: number of ids x log2(codes) / number of pixels."""
        if self.num_tokens is None or self.codes is None:
            return None
        return self.num_tokens * math.log2(self.codes) / SIDE**2

    @property
    def size(self) -> int | None:
        """Bytes of all files whose size is known, which are all but small ones; None if none is known."""
        sizes = [file.size for file in self.files if file.size is not None]
        return sum(sizes) if sizes else None

    @property
    def source(self) -> str:
        """Where the file with the weights is: its address, or the page."""
        return next((file.source for file in reversed(self.files) if file.source), self.page)


@cache
def entries() -> tuple[Entry, ...]:
    """All entries, sorted by name."""
    return tuple(sorted(map(read, FOLDER.glob("*.toml")), key=lambda entry: entry.name))


def read(path: Path) -> Entry:
    """Read the file of an entry.

    Raises:
        ConfigError: an unknown or missing key, or a value of a wrong type.
    """
    return from_table(Entry, {"name": path.stem, **read_toml(path)}, path.stem)


def find(words: Sequence[str]) -> list[Entry]:
    """The entries that contain all `words` in their name, title, family, paper, licence or source.

    Raises:
        ConfigError: there is none.
    """
    found = []
    for entry in entries():
        texts = (entry.name, entry.title, entry.family, entry.paper, entry.licence, entry.source)
        if all(word.lower() in " ".join(texts).lower() for word in words):
            found.append(entry)
    if not found:
        names = [entry.name for entry in entries()]
        raise ConfigError(f"no published tokenizer matches {' '.join(words)!r}", nearest_name(" ".join(words), names))
    return found


def get(name: str) -> Entry | None:
    """The entry of that name, if there is one."""
    return next((entry for entry in entries() if entry.name == name), None)
