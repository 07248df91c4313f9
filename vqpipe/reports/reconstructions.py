"""The page of `vqpipe reconstruct`: each file beside its reconstructions, with PSNR and SSIM."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from vqpipe.reports import page
from vqpipe.reports.pictures import ERROR_CAPTION, PictureBudget, compared, decibels
from vqpipe.words import counted

OPEN_ROWS = 40
"""Files up to which the table of the page is not folded."""


@dataclass(frozen=True)
class Version:
    """A reconstruction of a file: a PNG file, PSNR in dB (None: equal to the original), SSIM (None: too small)."""

    label: str
    png: Path
    psnr: float | None
    ssim: float | None

    @property
    def note(self) -> str:
        """`22.1 dB, SSIM 0.712`."""
        return ", ".join(filter(None, (decibels(self.psnr), "" if self.ssim is None else f"SSIM {self.ssim:.3f}")))


@dataclass(frozen=True)
class ReconstructedFile:
    """An original, a PNG file, and its reconstructions."""

    name: str
    original: Path
    versions: Sequence[Version]


def reconstructions_page(files: Sequence[ReconstructedFile], tokenizer: str) -> page.ReportPage:
    """Means, all files with a slider as far as the page may hold them, and the numbers of each."""
    versions = [file.versions[-1] for file in files]
    which = f", {versions[0].label}" if len(files[0].versions) > 1 else ""
    numbers = [
        page.Number(label, text, unit, f"mean over {share(count, files)}{which}" if len(files) > 1 else which[2:])
        for label, (text, count), unit in (
            ("PSNR", mean((v.psnr for v in versions), ".2f"), "dB"),
            ("SSIM", mean((v.ssim for v in versions), ".3f"), ""),
        )
    ]
    budget = PictureBudget()
    pictures, errors = shown_pictures(files, budget), ERROR_CAPTION if len(files[0].versions) == 1 else ""
    caption = f"{errors} {budget.note('reconstructions/')}".strip()
    sections: list[page.Section] = [
        page.Numbers("Reconstruction", numbers),
        page.Pictures("Originals and reconstructions", pictures, caption),
    ]
    if len(files) > 1:
        sections.append(numbers_table(files, folded=len(files) > OPEN_ROWS))
    images = files[0].name if len(files) == 1 else f"{len(files):,} images"
    subtitle = "NAME.png beside this page holds a pair; originals/ and reconstructions/ hold the images alone."
    return page.ReportPage(f"{tokenizer} on {images}", subtitle, sections)


def shown_pictures(files: Sequence[ReconstructedFile], budget: PictureBudget) -> list[page.Picture]:
    """The files that fit into the page, with an error map where there is one reconstruction."""
    pictures = (
        compared(
            file.name,
            file.original.read_bytes(),
            [page.Version(version.label, version.png.read_bytes(), version.note) for version in file.versions],
        )
        for file in files
    )
    found = list(takewhile(budget.take, pictures))
    budget.omitted = len(files) - len(found)
    return found


def numbers_table(files: Sequence[ReconstructedFile], most: int | None = None, folded: bool = False) -> page.Table:
    """A row for each reconstruction, of the first `most` files, and the mean of each kind over all files that
    have a number."""
    several = len(files[0].versions) > 1
    rows = [
        [file.name, *([version.label] if several else []), *written(version.psnr, version.ssim)]
        for file in files[:most]
        for version in file.versions
    ]
    if most is not None and len(files) > most:
        rows.append([f"{len(files) - most:,} more", *["…"] * (len(rows[0]) - 1)])
    for same in zip(*(file.versions for file in files), strict=True) if len(files) > 1 else ():
        means = mean((version.psnr for version in same), ".2f"), mean((version.ssim for version in same), ".3f")
        numbers = [text if count in (0, len(files)) else f"{text} (of {count:,})" for text, count in means]
        rows.append([f"mean of {len(files):,}", *([same[0].label] if several else []), *numbers])
    header = ["image", *(["version"] if several else []), "PSNR, dB", "SSIM"]
    return page.Table("PSNR and SSIM", header, rows, folded=folded)


def written(psnr: float | None, ssim: float | None) -> list[str]:
    """Both numbers as text."""
    return ["equal" if psnr is None else f"{psnr:.2f}", "–" if ssim is None else f"{ssim:.3f}"]


def mean(values: Iterable[float | None], how: str) -> tuple[str, int]:
    """The mean of those that are numbers, as text, and how many these are."""
    numbers = [value for value in values if value is not None]
    return format(sum(numbers) / len(numbers), how) if numbers else "–", len(numbers)


def share(count: int, files: Sequence[ReconstructedFile]) -> str:
    """`11 images`, or `7 of 11 images` where some have no number."""
    images = counted(len(files), "images")
    return images if count == len(files) else f"{count:,} of {images}"
