"""From files to batches: where images come from, how they are decoded and cropped, and in which order they arrive.

images      `open_images`: every form of `--images` as one ordered ImageSet of several sources
sources     the interface of a source of images, and what the sources share
folders     a source: folders of image files
label_lists lists of labels and classes in a folder
lists       a source: files that a list names
stored      files that hold images, local or remote, and checked for changes; remote has all use of fsspec
tars        a source: tar shards in WebDataset's layout, read and written
zips, parquets  sources: archives, and Parquet files with encoded images
photos      a source: the built-in photographs
decoding    encoded bytes to 8-bit RGB, and back
transforms  the only conversions between RGB images, uint8 pixels and floats; the crops of evaluation protocols
skipped     the images that cannot be used: their tolerance, and their list
batches     OrderedBatches (in order) and TrainingStream (endless, shuffled); the loader processes
sizes       images at their own sizes, measured and grouped
encode      images to shards of arrays (tokens, latents, features): decoding, encoding and writing at the same time
tokens, latents  the shards of tokens and of latents
arrays      rows of numbers in .npy files, of features and latents
examples    tokens and latents as training data of a generator
streams     tokens and images for training loops of others: TokenDataset, TokenStream, ImageStream
manifests   the files of data_manifests/, and a local copy of a data set as they describe it
prepare     a data set packed into tars
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqpipe.data.images import open_images
    from vqpipe.data.streams import ImageStream, TokenDataset, TokenStream

__all__ = ["ImageStream", "TokenDataset", "TokenStream", "open_images"]


def __getattr__(name: str) -> Any:
    """Import the public names, which need torch, on first use."""
    if name == "open_images":
        from vqpipe.data.images import open_images

        return open_images
    if name in __all__:
        from vqpipe.data import streams

        return getattr(streams, name)
    raise AttributeError(f"module 'vqpipe.data' has no attribute {name!r}")
