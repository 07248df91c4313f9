"""Pictures on a page: originals beside what became of them, as many as a file of bounded size holds."""

from collections.abc import Sequence
from dataclasses import replace

from vqpipe.reports import page, pictures
from vqpipe.reports.evaluation import Evaluated, Shown

MOST_SIDE = 1024
"""Pixels. Of larger pictures the page shows the middle, at full resolution: a smaller copy would hide what was lost."""
MOST_BYTES = 24 * 2**20
"""PNG bytes of all pictures of a page; base64 makes a third more of them."""
ERROR_CAPTION = (
    f"Error: mean over R, G and B; black for none, brightest from {pictures.ERROR_PEAK} of 255 grey levels on."
)
TITLES = {"spread": "Originals and reconstructions", "worst": "The worst images", "best": "The best images"}
WHICH = {
    "spread": "Images evenly spread over the set, chosen before anything was measured.",
    "worst": "Those with the lowest PSNR of the set, lowest first.",
    "best": "Those with the highest PSNR of the set, highest first.",
}


class Room:
    """How many bytes of pictures a page still takes."""

    def __init__(self, num_bytes: int = MOST_BYTES) -> None:
        self.left = num_bytes
        self.turned_away = 0

    def take(self, *pngs: bytes) -> bool:
        """Whether these fit beside those before; if not, one more was turned away."""
        size = sum(map(len, pngs))
        if self.turned_away or size > self.left:
            self.turned_away += 1
            return False
        self.left -= size
        return True

    def note(self) -> str:
        """What is said of the pictures turned away."""
        if not self.turned_away:
            return ""
        return f"{self.turned_away} more would make this file too large for a page: they lie in pictures/ beside it."


def galleries(shown: Sequence[Shown]) -> list[page.Section]:
    """Original, reconstruction and error: the images spread over the set, then the worst, then the best."""
    sections: list[page.Section] = []
    room = Room()
    for why, title in TITLES.items():
        chosen = [each for each in shown if each.why == why]
        if why != "spread":
            chosen.sort(key=lambda each: (each.psnr is None, each.psnr), reverse=why == "best")
        triples = triples_of(chosen, room)
        if triples:
            which = WHICH[why] if any(each.why != "spread" for each in shown) else ""
            sections.append(page.Pictures(title, triples, joined(which, ERROR_CAPTION, room.note())))
            room.turned_away = 0
    return sections


def triples_of(shown: Sequence[Shown], room: Room | None = None) -> list[page.Picture]:
    """Original, reconstruction and error of those that there is room for."""
    room = room or Room()
    found = []
    for each, note in map(middle, shown):
        original, again = pictures.from_png(each.original), pictures.from_png(each.reconstruction)
        error = pictures.error_picture(original, again)
        if room.take(each.original, each.reconstruction, error):
            versions = [
                page.Version("reconstruction", pictures.data_uri(each.reconstruction)),
                page.Version("error", pictures.data_uri(error)),
            ]
            found.append(picture(each, versions, ", ".join(filter(None, (decibels(each.psnr), note)))))
    return found


def side_by_side(evaluations: Sequence[Evaluated], room: Room) -> list[page.Picture]:
    """The originals that every one of several reports shows, with each one's reconstruction."""
    by_original = [{shown.original: shown for shown in evaluated.shown} for evaluated in evaluations]
    found = []
    for original in by_original[0]:
        if not all(original in known for known in by_original):
            continue
        cut, notes = zip(*(middle(known[original]) for known in by_original), strict=True)
        if room.take(cut[0].original, *(each.reconstruction for each in cut)):
            versions = [
                page.Version(evaluated.name, pictures.data_uri(each.reconstruction), decibels(each.psnr))
                for evaluated, each in zip(evaluations, cut, strict=True)
            ]
            found.append(picture(cut[0], versions, notes[0]))
    return found


def picture(shown: Shown, versions: Sequence[page.Version], note: str = "") -> page.Picture:
    """A picture of a page, its original as it is shown."""
    return page.Picture(shown.name, pictures.data_uri(shown.original), versions, note)


def middle(shown: Shown) -> tuple[Shown, str]:
    """The middle of pictures with a side over MOST_SIDE, and a note that says so; others as they are."""
    width, height = pictures.png_size(shown.original)
    if max(width, height) <= MOST_SIDE:
        return shown, ""
    original, again = (pictures.cut_middle(png, MOST_SIDE) for png in (shown.original, shown.reconstruction))
    size = " x ".join(map(str, pictures.png_size(original)))
    note = f"the middle {size} of {width} x {height} pixels; PSNR of the whole"
    return replace(shown, original=original, reconstruction=again), note


def joined(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def decibels(psnr: float | None) -> str:
    """22.1 dB; nothing where it is infinite or was not measured."""
    return "" if psnr is None else f"{psnr:.1f} dB"
