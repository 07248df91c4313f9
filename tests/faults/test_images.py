"""Images of unusual sizes."""

import pytest
import torch
from PIL import Image

from vqpipe.data.transforms import Framing, Rule, center_crop


@pytest.mark.parametrize("rule", ["adm", "linear", "cover"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (5, 2)])
def test_image_smaller_than_the_crop_is_enlarged(size: tuple[int, int], rule: Rule) -> None:
    image = Image.new("RGB", size, (10, 200, 30))
    expected = torch.tensor([10, 200, 30], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    assert torch.equal(Framing(rule=rule, size=(8, 8))(image), expected)
    assert torch.equal(center_crop(image, 8), expected)


@pytest.mark.parametrize("rule", ["adm", "cover"])
@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_strip_is_cropped_before_it_is_enlarged(size: tuple[int, int], rule: Rule) -> None:
    resized: list[tuple[int, int]] = []

    class Watched(Image.Image):
        """Records the sizes it is resized to."""

        def resize(self, size: tuple[int, int], *args: object, **options: object) -> Image.Image:  # type: ignore[override]
            resized.append(tuple(size))
            return super().resize(size, *args, **options)  # type: ignore[arg-type]

    image = Image.new("RGB", size, "red")
    image.__class__ = Watched
    assert Framing(rule=rule, size=(256, 256))(image).shape == (3, 256, 256)
    assert max(width * height for width, height in resized) <= 256 * 256
