"""From pixels to encoded bytes: what a prepared data set stores."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vqpipe.data.images import ImageSet
from vqpipe.data.transforms import BadImage, center_crop, decode, image_extension
from vqpipe.errors import VqpipeError


@dataclass(frozen=True)
class Stored:
    """One image as a shard holds it: its position in the source, and bytes with their ending, or a reason not to.

    `excluded` tells a rule of the data set's (too small) from a fault of the file's.
    """

    index: int
    extension: str = ""
    data: bytes = b""
    reason: str = ""
    excluded: bool = False


class StoredImages(Dataset["list[Stored] | VqpipeError"]):
    """Work for a loader process: positions -> the files as they are, each decoded once to see that it can be; or, with
    `image_size`, their ADM centre crops as JPEG. Images below `min_size`, (width, height), are excluded."""

    def __init__(
        self, images: ImageSet, image_size: int | None = None, min_size: tuple[int, int] | None = None
    ) -> None:
        self.images, self.image_size, self.min_size = images, image_size, min_size

    def __getitem__(self, work: Sequence[int]) -> list[Stored] | VqpipeError:
        try:
            return [self.store(i) for i in work]
        except VqpipeError as error:
            return error

    def store(self, i: int) -> Stored:
        """Image i as it goes into a shard, or the reason why it does not."""
        data = self.images.read(i)
        try:
            image = decode(data)
        except BadImage as error:
            return Stored(i, reason=error.reason)
        if self.min_size is not None and (image.width < self.min_size[0] or image.height < self.min_size[1]):
            return Stored(i, reason="smaller than {}x{}".format(*self.min_size), excluded=True)
        if self.image_size is None:
            return Stored(i, image_extension(data), data)
        return Stored(i, "jpg", encode_jpeg(center_crop(image, self.image_size)))
