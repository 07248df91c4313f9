import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vqpipe.data.decoding import decode
from vqpipe.data.images import open_images
from vqpipe.data.photos import HELDOUT, TRAIN, load, open_photos


def test_the_splits_share_no_photograph() -> None:
    counts = {}
    for split in ("/train", "/heldout", ""):
        images = open_images("builtin:photos" + split)
        counts[split] = Counter(images.key(i).rsplit("-", 3)[0] for i in range(len(images)))
        assert len({images.key(i) for i in range(len(images))}) == len(images)
        assert images.num_classes is None
    assert not counts["/train"].keys() & counts["/heldout"].keys()
    assert counts["/train"] + counts["/heldout"] == counts[""]
    assert (counts["/train"].total(), counts["/heldout"].total()) == (673, 180)  # as the docstring says


def test_a_crop_matches_its_key() -> None:
    images = open_images("builtin:photos/heldout")
    number = next(i for i in range(len(images)) if images.key(i).startswith("coffee-128-x") and i % 7 == 3)
    _, side, x, y = images.key(number).split("-")
    x, y, side = int(x[1:]), int(y[1:]), int(side)
    with Image.open(next(photo for photo in HELDOUT if photo.name == "coffee").path) as photo:
        expected = np.asarray(photo.convert("RGB"))[y : y + side, x : x + side]
    assert np.array_equal(np.asarray(decode(images[number].image)), expected)


@pytest.mark.parametrize("photo", [*TRAIN, *HELDOUT], ids=lambda photo: photo.name)
def test_every_photograph_is_in_colour_and_covered(photo) -> None:
    pixels = np.asarray(load(photo)).astype(int)
    assert np.ptp(pixels, axis=2).mean() > 3  # not gray
    crops = [crop for crop in open_photos("builtin:photos").crops if crop.photo == photo]
    covered = np.zeros(photo.size[::-1], bool)
    for crop in crops:
        assert crop.x + crop.side <= photo.size[0]
        assert crop.y + crop.side <= photo.size[1]
        if crop.side == 128:
            covered[crop.y : crop.y + 128, crop.x : crop.x + 128] = True
    assert covered.all()
    assert Image.open(io.BytesIO(open_images("builtin:photos")[0].image)).size == (256, 256)
