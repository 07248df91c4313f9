"""Images at their own sizes."""

from vqpipe.data.images import SelectedImages, open_images
from vqpipe.data.sizes import SizedImages


def test_sizes_and_their_images_are_counted() -> None:
    images = SelectedImages(open_images("builtin:photos/heldout"), range(3))
    one = SizedImages(images, {(32, 48): range(3)}, {}, {})
    assert str(one) == "1 size, the largest 48x32 (3 images), the most frequent 48x32 (3 images)"
    two = SizedImages(images, {(32, 48): range(1), (16, 16): range(1, 3)}, {}, {})
    assert str(two) == "2 sizes, the largest 48x32 (1 image), the most frequent 16x16 (2 images)"
    assert str(SizedImages(images, {}, {}, {})) == "no image can be used"
