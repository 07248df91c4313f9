"""Token shards: one Parquet row per view of an image, its ids as narrow as the codebook allows; images to tokens and
back.

Columns: key string; shard dictionary<string> and index int64, the name of the tar, archive or folder that holds the
image, and its position there (not for generated images); label int32, null where unknown; ids fixed_size_list<uint16 or
uint32>[N]; and, only where an image has several rows, flipped bool. The rows of an image follow each other:

| tokenize | rows of an image |
|---|---|
| --crops center | the center crop |
| --flip | the center crop, and its horizontal flip |
| --crops ten | center, top left, top right, bottom left, bottom right of a larger center crop; the same of its flip |

The files are `tokens-00000.parquet` and so on. With --image-size native each size has files of its own,
`tokens-WIDTHxHEIGHT-00000.parquet`, so `tokens-*.parquet` matches all and `tokens-640x480-*.parquet` those of one size.

B images of a batch, N ids per image.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import Artifact, Draft
from vqpipe.config import check_choices
from vqpipe.data.batches import chunks
from vqpipe.data.decoding import encode_png
from vqpipe.data.encode import (
    IMAGES_PER_SHARD,
    ORIGIN_FIELDS,
    EncodedShard,
    EncodingJob,
    Shard,
    encode_views,
    equal_shards,
    faster_network,
    sample_columns,
    with_flip,
)
from vqpipe.data.images import ImageSet
from vqpipe.data.made_images import Form, shard_file, write_labels, write_shard
from vqpipe.data.sizes import batch_size_of, group_by_size
from vqpipe.data.tars import tar_keys
from vqpipe.data.transforms import Framing, crop_to_multiples, ten_crops
from vqpipe.device import check_precision
from vqpipe.errors import ConfigError, DataError, VqpipeError
from vqpipe.image_size import fixed_size, normal_size, parse_size
from vqpipe.progress import SILENT, Progress
from vqpipe.words import counted, first_names

SHARD_NAME = "tokens-{:05d}.parquet"
NATIVE_SHARD_NAME = "tokens-{}-{:05d}.parquet"

Crops = Literal["center", "ten"]
TEN_CROP_RANGE = 1.1
"""Side of the center crop that ten crops are cut from, over their side: the default of LlamaGen's
`extract_codes_c2i.py`."""
TEN_CROP_KEYS = ("", "-top-left", "-top-right", "-bottom-left", "-bottom-right")
"""Added to the keys of decoded images."""


class ImageTokenizer(Protocol):
    """The part of `vqpipe.Tokenizer` used here."""

    device: torch.device
    image_size: int | None
    """Side of the images of its training."""

    @property
    def codebook_size(self) -> int:
        """Ids are below it."""

    @property
    def downsample_factor(self) -> int:
        """Image side / latent side."""

    def layout(self, height: int, width: int) -> Any:
        """The order of the ids of an image of `height` x `width` pixels (a `TokenLayout`)."""

    def encode(self, images: Tensor, precision: str = "fp32") -> Tensor:
        """uint8[B, 3, S, S] -> int64[B, N]."""

    def decode(self, ids: Tensor, image_size: tuple[int, int], groups: int | None = None) -> Tensor:
        """int64[B, N] -> uint8[B, 3, H, W]."""


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """What is encoded of each image.

    Raises:
        ConfigError: `flip` with ten crops, which include flips; ten crops of a rectangle; a size that is none;
            `max_pixels` with a fixed size; a value that is no choice, or out of range.
    """

    image_size: int | str | None
    """The side of ADM's center crop, "WIDTHxHEIGHT" for the crop of the rule cover, or "native": each image at its own
    size (see sizes.py). None: that of the tokenizer's training."""
    flip: bool = False
    """Store the ids of each image's horizontal flip as well."""
    crops: Crops = "center"
    """"ten": ten views of each image, as LlamaGen: `ten_crops` of a center crop 1.1 times as wide as `image_size`."""
    precision: str = "fp32"
    """"bf16" applies to the network; the codebook search stays in float32, on slightly different latents: a few percent
    of the ids change."""
    max_pixels: int | None = None
    """Larger images are left out; with "native" only."""
    max_skipped: float = 0.01
    """Share of the images that may be unreadable."""

    def __post_init__(self) -> None:
        if self.image_size is not None:
            object.__setattr__(self, "image_size", normal_size(self.image_size))
        object.__setattr__(self, "flip", bool(self.flip))
        check_precision(self.precision)
        check_choices(self)
        if not 0 <= self.max_skipped <= 1:
            raise ConfigError(f"max_skipped = {self.max_skipped} is not a share of the images", "Use 0 to 1")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ConfigError(f"max_pixels = {self.max_pixels}", "It is at least 1")
        if self.crops == "ten" and self.flip:
            raise ConfigError("--crops ten includes the flip of each image", "Omit --flip")
        if self.crops == "ten" and isinstance(self.image_size, str):
            raise ConfigError(
                f"--crops ten is for squares, {self.image_size} is none", "Give one number as --image-size"
            )
        if self.max_pixels is not None and not self.native:
            raise ConfigError("--max-pixels is for images at their own sizes", "Omit it, or add --image-size native")

    @property
    def native(self) -> bool:
        return self.image_size == "native"

    def sized_by(self, tokenizer: "ImageTokenizer") -> "TokensConfig":
        """These settings with the image size that the tokenizer was trained on, if they name none.

        Raises:
            DataError: the tokenizer cannot encode this size, or names none.
        """
        config = self
        if config.image_size is None:
            if tokenizer.image_size is None:
                what = "this tokenizer's config does not name the image size of its training"
                raise DataError(what, "Give --image-size (image_size in Python)")
            config = replace(config, image_size=tokenizer.image_size)
        if not config.native:
            tokenizer.layout(*fixed_size(str(config.image_size)))
        return config

    def request(self, key_prefix: str | None = None) -> dict[str, Any]:
        """The `config` of the artifact's manifest. A second call has to have the same one."""
        request = {name: getattr(self, name) for name in ("image_size", "flip", "precision", "max_skipped")}
        request |= {} if self.crops == "center" else {"crops": self.crops}  # both are left out unless they are set
        request |= {} if self.max_pixels is None else {"max_pixels": self.max_pixels}
        return request if key_prefix is None else {**request, "key_prefix": key_prefix}


def write_tokens(
    draft: Draft,
    images: ImageSet,
    tokenizer: ImageTokenizer,
    config: TokensConfig,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Tokenize images: write this rank's missing shards of a `tokens` artifact. Returns its facts, over all ranks.

    Raises:
        DataError: more images than `config.max_skipped` are unreadable, or all are; an id outside the codebook; the
            tokenizer cannot encode a native size.
        ConfigError: the codebook has more than 2^32 codes, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size}", "It is at least 1")
    dtype = id_dtype(tokenizer.codebook_size)
    num_views = views_per_image(config.request())
    views = partial(with_flip, flip=config.flip)
    size = parse_size(str(config.image_size))
    ordered, unusable, excluded = images, dict[int, str](), dict[int, str]()
    transform: Callable[[Image.Image], Tensor] | None = None
    if size is None:
        factor = tokenizer.downsample_factor
        sized = group_by_size(
            draft,
            images,
            factor,
            max_pixels=config.max_pixels,
            num_workers=num_workers,
            progress=progress,
        )
        ordered, unusable, excluded, side = sized.images, sized.skipped, sized.excluded, sized.side(batch_size)
        layouts = {size: native_layout(tokenizer, *size) for size in sized.sizes}
        shards = sized.shards(NATIVE_SHARD_NAME, lambda h, w: (num_views, layouts[h, w].num_tokens), batch_size)
        transform = partial(crop_to_multiples, factor=factor)
        progress.message(str(sized))
    else:
        side, layout = max(size), tokenizer.layout(*size)
        shards = equal_shards(SHARD_NAME, len(images), IMAGES_PER_SHARD, (num_views, layout.num_tokens), batch_size)
        if config.crops == "ten":
            views = partial(ten_crops, size=side)
            side = int(side * TEN_CROP_RANGE)
        if size[0] != size[1]:
            transform = Framing(rule="cover", size=size)
    job = EncodingJob(
        draft,
        ordered,
        shards,
        title="tokenize",
        skipped=unusable,
        excluded=excluded,
        max_skipped=config.max_skipped,
        progress=progress,
        faster_encoding=faster_network(tokenizer.device, config.precision),
    )
    job.run(
        partial(encode_views, views=views, encode=partial(encode_in_memory, tokenizer, config.precision)),
        write_token_shard,
        check=partial(check_token_ids, codebook_size=tokenizer.codebook_size),
        device=tokenizer.device,
        dtype=dtype,
        image_size=side,
        num_workers=num_workers,
        transform=transform,
    )
    records, skipped = job.finish()
    facts = {"num_images": sum(record["images"] for record in records)}
    shared = {"codebook_size": tokenizer.codebook_size, "image_size": config.image_size}
    if size is None:
        sizes = size_facts(layouts, shards, records)
        facts |= {"num_sizes": len(sizes), **shared, "sizes": sizes}
        facts |= {"excluded": dict(sorted(Counter(excluded.values()).items()))} if excluded else {}
    else:
        facts |= {"num_tokens": layout.num_tokens, **shared, "layout": layout.to_table()}
    return {**facts, "class_names": list(images.class_names), "skipped": skipped, **images.facts}


def size_facts(
    layouts: Mapping[tuple[int, int], Any], shards: Sequence[Shard], records: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """WIDTHxHEIGHT -> the number of images of this size, of their ids, and their layout; sizes of unreadable images are
    left out."""
    counts = Counter[str]()
    for shard, record in zip(shards, records, strict=True):
        counts[shard.name.split("-")[1]] += record["images"]
    return {
        name: {"num_images": counts[name], "num_tokens": layout.num_tokens, "layout": layout.to_table()}
        for (height, width), layout in layouts.items()
        for name in [f"{width}x{height}"]
        if counts[name]
    }


def encode_in_memory(tokenizer: ImageTokenizer, precision: str, images: Tensor) -> Tensor:
    """Encode a batch.

    Raises:
        DataError: memory does not suffice. (Linux may kill the process instead.)
    """
    try:
        return tokenizer.encode(images, precision)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        count, _, height, width = images.shape
        what = f"out of memory for a batch of {counted(count, 'images')} of {width}x{height}"
        larger = f"Leave such images out of --image-size native: --max-pixels {height * width - 1}"
        raise DataError(what, "Use a smaller --batch-size" if count > 1 else larger) from None


def native_layout(tokenizer: ImageTokenizer, height: int, width: int) -> Any:
    """The layout of the ids of images of a native size.

    Raises:
        DataError: the tokenizer cannot encode this size.
    """
    try:
        return tokenizer.layout(height, width)
    except VqpipeError as error:
        what = f"this tokenizer cannot encode images of {width}x{height} at their own size: {error.what}"
        raise DataError(what, "Give one number as --image-size") from None


def views_per_image(config: Mapping[str, Any]) -> int:
    """The rows of each image in an artifact of tokens or latents: 10, 2 or 1. Of several, the second half are flips."""
    return 10 if config.get("crops") == "ten" else 1 + bool(config.get("flip", False))


def id_dtype(codebook_size: int) -> np.dtype:
    """The narrowest type for ids below `codebook_size`: uint16 up to 65,536 codes, else uint32.

    Raises:
        ConfigError: ids of so many codes do not fit 32 bits.
    """
    if codebook_size > 1 << 32:
        raise ConfigError(
            f"ids of {codebook_size:,} codes do not fit the 32 bits of a stored id",
            "Train with several ids a position, such as model.quantizer.bits_per_id of bsq",
        )
    return np.dtype(np.uint16 if codebook_size <= 1 << 16 else np.uint32)


def check_token_ids(ids: Tensor, keys: list[str], codebook_size: int) -> None:
    """Raise a DataError for an id outside the codebook: narrowing would wrap it around."""
    low, high = ids.aminmax()
    if low < 0 or high >= codebook_size:
        raise DataError(f"ids from {low} to {high} are outside a codebook of {codebook_size} codes")


def write_token_shard(draft: Draft, shard: EncodedShard) -> None:
    """Write the file of a shard, with its counts as its record."""
    with draft.write(shard.name, images=len(shard.keys), skipped=shard.skipped) as path:
        write_token_file(path, shard.keys, shard.labels, shard.rows, shard.origins)


def write_token_file(
    path: Path,
    keys: Sequence[str],
    labels: Sequence[int],
    ids: np.ndarray,
    origins: Sequence[tuple[str, int]] | None = None,
) -> None:
    """Write one Parquet file: ids uint16 or uint32[images, V, N], of V views of each image; labels -1 where unknown;
    origins as `ImageSet.origin` gives them, None for images that are not stored."""
    rows_per_image, num_tokens = ids.shape[1:]
    table = sample_columns(keys, labels, origins, rows_per_image=rows_per_image)
    columns = {"key": pa.array(table["key"], pa.string())}
    if origins is not None:
        columns |= {field.name: pa.array(table[field.name], field.type) for field in ORIGIN_FIELDS}
    columns |= {
        "label": pa.array(table["label"], pa.int32()),
        "ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), num_tokens),
    }
    if rows_per_image > 1:
        columns["flipped"] = pa.array(table["flipped"], pa.bool_())
    pq.write_table(pa.table(columns), path, compression="zstd")


@dataclass(frozen=True)
class Tokens:
    """The tokens of some images: ids int64[B, N]; labels int64[B], -1 where unknown; flipped bool[B]."""

    keys: list[str]
    labels: Tensor
    ids: Tensor
    flipped: Tensor


def check_columns(schema: pa.Schema) -> None:
    """Raise a ValueError unless the columns are those of a token shard."""
    ids: Any = schema.field("ids").type if "ids" in schema.names else None
    types = {"key": pa.string(), "label": pa.int32(), "ids": ids, "flipped": pa.bool_()}
    types |= {field.name: field.type for field in ORIGIN_FIELDS}
    if len(set(schema.names)) < len(schema) or not {"key", "label", "ids"} <= set(schema.names) <= types.keys():
        raise ValueError("columns")
    if not pa.types.is_fixed_size_list(ids) or ids.value_type not in (pa.uint16(), pa.uint32()) or ids.list_size < 1:
        raise ValueError("ids")
    if any(schema.field(name).type != types[name] for name in schema.names):
        raise ValueError("types")


def read_tokens(path: Path, codebook_size: int) -> Tokens:
    """Read one token file.

    Raises:
        DataError: it is no token shard, or an id is outside the codebook.
    """
    try:
        with path.open("rb") as handle, pq.ParquetFile(handle) as file:  # pyarrow refuses a path that is not UTF-8
            check_columns(file.schema_arrow)
            table = file.read()
        column = table["ids"].combine_chunks()
        count = table.num_rows
        flat = column.flatten()
        if flat.null_count or any(table[name].null_count for name in table.column_names if name != "label"):
            raise ValueError("null")
        flat = flat.to_numpy().astype(np.int64)
        ids = torch.from_numpy(flat).view(count, column.type.list_size)
        labels = torch.from_numpy(table["label"].fill_null(-1).to_numpy().astype(np.int64))
        keys = table["key"].to_pylist()
    except (pa.ArrowException, ValueError, RuntimeError, OSError) as error:
        raise not_tokens(path, error) from None
    if ids.numel() and int(ids.max()) >= codebook_size:
        raise DataError(f"{path} holds id {int(ids.max())}, the codebook has {codebook_size} codes")
    flipped = table["flipped"].to_pylist() if "flipped" in table.column_names else [False] * count
    return Tokens(keys, labels, ids, torch.tensor(flipped, dtype=torch.bool))


def files_of_size(tokens: Artifact, image_size: int | str | None = None) -> tuple[list[str], dict[str, Any]]:
    """The files of a `tokens` artifact and its facts; of one with native sizes those of the images of `image_size`.

    Raises:
        DataError: it has several sizes and none was given, or no images of this size; the message names sizes.
    """
    facts, sizes = tokens.facts, tokens.facts.get("sizes")
    wanted = None if image_size is None else fixed_size(image_size)
    if sizes is None:
        if wanted is not None and wanted != fixed_size(facts["image_size"]):
            raise DataError(
                f"{tokens.path} has images of {facts['image_size']}, not of {image_size}", "Omit image_size"
            )
        return tokens.names("tokens-*.parquet"), facts
    names = {fixed_size(name): name for name in sizes}
    if wanted is None or wanted not in names:
        listed = sizes_text(tokens)
        what = "their own sizes" if wanted is None else f"other sizes than {image_size}"
        raise DataError(f"{tokens.path} has images of {what}: {listed}", "Give image_size, one of its facts['sizes']")
    name = names[wanted]
    return tokens.names(f"tokens-{name}-*.parquet"), facts | sizes[name] | {"image_size": name}


def sizes_text(tokens: Artifact) -> str:
    """`640x480 (12), 32x32 (1)`: the native sizes of an artifact and their images, most first."""
    counts = sorted(((table["num_images"], size) for size, table in tokens.facts["sizes"].items()), reverse=True)
    return first_names([f"{size} ({count:,})" for count, size in counts], 5)


def file_sizes(tokens: Artifact) -> dict[str, tuple[int, int]]:
    """The token files of an artifact, sorted -> (height, width) of their images."""
    if "sizes" not in tokens.facts:
        return dict.fromkeys(tokens.names("tokens-*.parquet"), fixed_size(tokens.facts["image_size"]))
    return {name: fixed_size(name.split("-")[1]) for name in tokens.names("tokens-*.parquet")}


def decode_tokens(
    draft: Draft,
    tokens: Artifact,
    tokenizer: ImageTokenizer,
    *,
    limit: int | None = None,
    groups: int | None = None,
    form: Form = "tar",
    batch_size: int = 32,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Decode tokens: write this rank's missing shards of PNG files, one per token shard, rank r of w every w-th.

    As single files, images are named by their row and key. Only the rows of the first `limit` images and the first
    `groups` groups of ids are decoded. Returns the facts, over all ranks.
    """
    views = views_per_image(tokens.config)
    crops = TEN_CROP_KEYS if views == 10 else ("",)
    total = tokens.facts["num_images"] * views
    left = num_rows = total if limit is None else min(total, limit * views)
    shards = dict[int, tuple[str, int, int]]()  # of this rank: number -> tokens, rows to decode, first row
    sizes = file_sizes(tokens)
    for number, name in enumerate(sizes):
        take = min(count_rows(tokens.file(name)), left)
        left -= take
        if take and number % distributed.world_size() == distributed.rank():
            shards[number] = name, take, num_rows - left - take
    missing = {number: shard for number, shard in shards.items() if draft.record(shard_file(number, form)) is None}
    mine, pending = (sum(take for _, take, _ in part.values()) for part in (shards, missing))
    progress.start(distributed.share_title("detokenize"), mine, done=mine - pending)
    for number, (name, take, first) in missing.items():
        part = read_tokens(tokens.verified_file(name), tokens.facts["codebook_size"])
        keys = tar_keys(
            key + crops[row % len(crops)] + ("-flipped" if flipped else "")
            for row, (key, flipped) in enumerate(zip(part.keys, part.flipped, strict=True))
        )
        if form == "png":
            keys = [f"{first + row:08d}-{key}" for row, key in enumerate(keys)]
        size = sizes[name]
        batch = batch_size_of(batch_size, *size) if "sizes" in tokens.facts else batch_size
        with write_shard(draft, number, form, take) as shard:
            for rows in chunks(range(take), batch):
                images = tokenizer.decode(part.ids[rows.start : rows.stop], size, groups=groups).cpu()
                for index, image in zip(rows, images, strict=True):
                    shard.write(keys[index], encode_png(image), "png", int(part.labels[index]))
                progress.advance(len(rows))
    write_labels(draft, form)
    return {"num_images": num_rows - left, "image_size": tokens.facts["image_size"]}


def count_rows(path: Path) -> int:
    """The number of rows of a token file, from its footer."""
    try:
        with path.open("rb") as file:
            return int(pq.read_metadata(file).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise not_tokens(path, error) from None


def not_tokens(path: Path, error: Exception) -> DataError:
    """The DataError for a file that is no token shard."""
    return DataError(f"{path} is not a token shard ({type(error).__name__})", "Tokenize the images again")
