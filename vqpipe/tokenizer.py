"""The tokenizer: images -> ids -> images.

Shapes: B images of H x W pixels, N ids per image, C latent channels, h x w positions, G groups.
"""

import tempfile
from collections.abc import Callable, Sequence
from math import isqrt
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from PIL import Image
from torch import Tensor

from vqpipe import artifacts
from vqpipe.data.batches import chunks
from vqpipe.data.images import ImageSet, open_images
from vqpipe.data.tokens import TokensConfig, write_tokens
from vqpipe.data.transforms import to_uint8
from vqpipe.device import check_device, reduced_precision
from vqpipe.downloads import upload_folder
from vqpipe.errors import ArtifactError, ConfigError, DataError, NumericError, printable
from vqpipe.files import hash_file
from vqpipe.image_size import Size, in_pixels, is_size, pair_of
from vqpipe.model_card import hub_card
from vqpipe.model_input import ImageLike, check_tensor_size, latent_size, network_input, read_image
from vqpipe.models import Autoencoder, AutoencoderConfig
from vqpipe.progress import SILENT, Progress
from vqpipe.quantizers import Quantized, TokenLayout
from vqpipe.quantizers.layout import check_negative, keep_groups
from vqpipe.tokenizer_files import (
    WEIGHTS,
    StoredWeights,
    config_table,
    find_tokenizer,
    model_facts,
    properties,
    read_tokenizer,
    save_tokenizer,
)

S = TypeVar("S")
IMAGES_PER_BATCH = 32
"""Images of a list that are encoded or decoded at a time."""


class Tokenizer:
    """A trained autoencoder with conversions of pixels, in evaluation mode. docs/python.md has examples.

    Its weights are frozen. Gradients flow from images to codes in `decode_codes_float`, and from codes to latents in
    `quantize`; the other methods compute without gradients.

    It is no torch.nn.Module and calls no collective: as an attribute of a module that is wrapped in
    DistributedDataParallel it adds no parameters, and ranks may encode different numbers of images. `encode`, `latent`,
    `decode` and the methods of codes compile with torch.compile(method, fullgraph=True), for every quantizer but
    `multi_scale`, whose graph breaks. In a compiled graph, invalid ids and latents raise a RuntimeError.

    Args:
        device: of torch, or "auto": a GPU if there is one. Under torchrun, "auto" and "cuda" are this rank's GPU.

    Attributes:
        device: of the weights.
        image_size: the side of the training images; None if unknown.
        name: of its directory.
        artifact: the artifact it was opened from, if any.
        source: the input of a stage that reads it: the artifact, or the stored weights; "" if it was not opened.
    """

    def __init__(self, autoencoder: Autoencoder, *, image_size: int | None = None, device: str | torch.device = "cpu"):
        self.device = check_device(device)
        self.autoencoder = autoencoder.eval().requires_grad_(False).to(self.device)
        self.image_size = image_size
        self.range_checked = False
        self.name = "tokenizer"
        self.artifact: artifacts.Artifact | None = None
        self.source: artifacts.Input | str = ""

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", *, revision: str | None = None
    ) -> "Tokenizer":
        """Open a tokenizer: the directory of an artifact or of `save_pretrained`, a repository of the hub, or the one
        inside the package, "builtin:photos-f8".

        Its weights are in float32, whatever their type in the file.

        A repository is downloaded if it is named by "hf:user/name", or by the string "user/name" where there is no such
        directory, finished or not. A `Path`, such as those of the commands, is never looked up on the hub without
        "hf:".

        Args:
            path: a directory, or "hf:user/name", or "hf:user/name@revision", or "builtin:photos-f8".
            device: to run on.
            revision: a branch, tag or commit of the repository.

        Raises:
            ArtifactError, WeightsError: it is absent, damaged, or its weights do not match its config.
            ConfigError: it has continuous latents and so no tokens, or is a directory although a revision was given; or
                the device is absent or not supported.
        """
        device = check_device(device)
        folder, name = find_tokenizer(path, revision)
        artifact = None
        if not folder.is_dir() or any((folder / file).is_file() for file in ("manifest.json", "request.json")):
            artifact = artifacts.open_artifact(folder, "tokenizer")  # says whether it is absent or not finished
        autoencoder, image_size = read_tokenizer(folder, artifact)
        tokenizer = cls(autoencoder, image_size=image_size, device=device)
        tokenizer.name = printable(name) or tokenizer.name
        tokenizer.artifact = artifact
        tokenizer.source = artifact or StoredWeights(tokenizer.name, hash_file(folder / WEIGHTS), folder)
        return tokenizer

    def __repr__(self) -> str:
        """The properties of the model."""
        values = {
            "quantizer": self.autoencoder.quantizer.config.kind,
            "downsample_factor": self.downsample_factor,
            "codebook_size": self.codebook_size,
            "num_groups": self.num_groups,
            "image_size": self.image_size,
            "num_parameters": sum(parameter.numel() for parameter in self.autoencoder.parameters()),
            "device": self.device,
            "dtype": self.dtype,
        }
        return f"Tokenizer({', '.join(f'{name}={value}' for name, value in values.items())})"

    @property
    def config(self) -> AutoencoderConfig:
        """Section [model] of the training preset."""
        return self.autoencoder.config

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the encoder and the decoder."""
        return self.autoencoder.last_layer.dtype

    @property
    def codebook(self) -> Tensor:
        """The codes as the search compares them, float32[K, C]; with groups or depths, float32[G, K, C / G or C].

        Raises:
            ConfigError: the quantizer has no table of codes (lfq, fsq); `embed` works for these too.
        """
        return self.autoencoder.quantizer.codebook().detach()

    @property
    def codebook_size(self) -> int:
        """K, codes one id ranges over (per group)."""
        return self.autoencoder.quantizer.codebook_size

    @property
    def num_groups(self) -> int:
        """Ids per position."""
        return self.autoencoder.quantizer.num_groups

    @property
    def code_dim(self) -> int:
        """Channels of the code of an id: C / G with groups."""
        return self.autoencoder.quantizer.token_dim

    @property
    def downsample_factor(self) -> int:
        """Image side / latent side."""
        return self.autoencoder.downsample_factor

    def layout(self, height: int, width: int | None = None) -> TokenLayout:
        """The layout of the ids of an image of `height` x `width` pixels; of a square without `width`.

        Raises:
            DataError: a side is not a multiple of the downsample factor.
        """
        width = height if width is None else width
        return self.autoencoder.quantizer.layout(*latent_size(height, width, self.downsample_factor))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of `height` x `width` pixels."""
        return (self.autoencoder.quantizer.latent_dim, *latent_size(height, width, self.downsample_factor))

    @overload
    def encode(  # type: ignore[overload-overlap]  # a str, which is a path, is also a sequence of str
        self, images: ImageLike, precision: str = "fp32", *, image_size: Size | None = None
    ) -> Tensor: ...

    @overload
    def encode(
        self, images: Sequence[ImageLike], precision: str = "fp32", *, image_size: Size | None = None
    ) -> list[Tensor]: ...

    @torch.no_grad()
    def encode(
        self, images: ImageLike | Sequence[ImageLike], precision: str = "fp32", *, image_size: Size | None = None
    ) -> Tensor | list[Tensor]:
        """Encode images to ids int64[B, N]; a list of images of any sizes to a list of int64[N], in the same order.

        Args:
            images: uint8[B, 3, H, W], or float[B, 3, H, W] in [-1, 1]; a PIL image, or the path of an image file, for
                B = 1; or a list of PIL images, paths and tensors [3, H, W]. Images of a list that have the same size
                and type are encoded together. Float images without a negative value are warned of, as they look like
                images in [0, 1]. The range of tensors on a GPU, for which the host has to wait, is checked in the first
                batch only.
            precision: "fp32", or "bf16" for the convolutions and matrix products of the encoder, which changes a few
                percent of the ids; the search is always in float32.
            image_size: (H, W), or the side of a square, to which PIL images and files are resized and cropped, as by
                `vqpipe tokenize`; None: their own size. Tensors are not resized.

        Raises:
            DataError: a wrong shape, dtype or range; sides that are not multiples of the downsample factor; a file that
                is absent or no image; tensors of another size than `image_size`.
            NumericError: pixels are NaN or infinite.
        """
        if isinstance(images, str | Path | Image.Image):
            return self.encode(self.read_image(images, image_size)[None], precision)
        if not isinstance(images, Tensor):
            tensors = [self.read_image(image, image_size) for image in images]
            return in_batches(tensors, [None] * len(tensors), lambda batch, _: self.encode(batch, precision))
        check_tensor_size(images, image_size)
        images = network_input(images, self)
        if len(images) == 0:
            num_tokens = self.layout(*images.shape[-2:]).num_tokens
            return torch.empty(0, num_tokens, dtype=torch.int64, device=self.device)
        with reduced_precision(self.autoencoder, self.device, precision):
            return self.autoencoder.encode(images.to(self.dtype)).ids

    def read_image(self, image: ImageLike, image_size: Size | None = None) -> Tensor:
        """An image file or PIL image as uint8[3, H, W], cropped as by `encode`; a tensor as it is."""
        return read_image(image, self, image_size)

    @torch.no_grad()
    def latent(self, images: ImageLike, precision: str = "fp32", *, image_size: Size | None = None) -> Tensor:
        """Encode images to latents before quantization, float[B, C, h, w]; arguments and errors as `encode`, but no
        list."""
        pixels = self.read_image(images, image_size)
        images = network_input(pixels if isinstance(images, Tensor) else pixels[None], self)
        if len(images) == 0:
            return torch.empty(0, *self.latent_shape(*images.shape[-2:]), dtype=self.dtype, device=self.device)
        with reduced_precision(self.autoencoder, self.device, precision):
            return self.autoencoder.latent(images.to(self.dtype))

    def quantize(self, latent: Tensor) -> Quantized:
        """Quantize a latent, float[B, C, h, w], to (codes, ids, losses), with gradients.

        `codes`, float32[B, C, h, w], are those of the ids, int64[B, N], with the gradient of the latent; `losses` are
        the unweighted terms of the quantizer, by name.

        Raises:
            DataError: another shape, or no latent: the losses of an empty batch are not defined.
            NumericError: the latent is NaN or infinite.
        """
        channels = self.autoencoder.quantizer.latent_dim
        if latent.ndim != 4 or latent.shape[1] != channels or latent.numel() == 0:
            raise DataError(f"a latent of shape {list(latent.shape)}, [B, {channels}, h, w] is expected")
        return self.autoencoder.quantizer(latent.to(self.device))

    @overload
    def decode(self, ids: Tensor, image_size: Size, groups: int | None = None) -> Tensor: ...

    @overload
    def decode(
        self, ids: Sequence[Tensor], image_size: Size | Sequence[tuple[int, int]], groups: int | None = None
    ) -> list[Tensor]: ...

    @torch.no_grad()
    def decode(
        self,
        ids: Tensor | Sequence[Tensor],
        image_size: Size | Sequence[tuple[int, int]],
        groups: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Decode ids int64[B, N] to images uint8[B, 3, H, W]; a list of int64[N] to a list of images uint8[3, H, W].

        Args:
            ids: of the layout of `image_size`. Those of the last groups of an image, or of its last scales, may all be
                -1: they are left out.
            image_size: (H, W), the side of a square, or `image_size` of an artifact's facts; for a list of ids, a list
                of (H, W), or one size of all.
            groups: decode the first `groups` groups only.

        Raises:
            DataError: ids of a wrong dtype or shape, ids outside the codebook, other negative ids, or too many groups.
        """
        if isinstance(ids, Tensor):
            return to_uint8(self.decode_float(ids, image_size, groups))  # type: ignore[arg-type]  # by the overloads
        ids = [self.check_ids(row) for row in ids]
        one: Any = image_size
        sizes = [pair_of(one)] * len(ids) if is_size(one) else [pair_of(size) for size in one]
        if len(sizes) != len(ids):
            raise DataError(f"{len(sizes)} sizes for the ids of {len(ids)} images", "Give each its size, or one of all")
        return in_batches(ids, sizes, lambda batch, size: self.decode(batch, size, groups))

    @torch.no_grad()
    def decode_float(self, ids: Tensor, image_size: Size, groups: int | None = None) -> Tensor:
        """As `decode`, without rounding and clamping: float32[B, 3, H, W], about [-1, 1]."""
        self.check_groups(groups)
        image_size = pair_of(image_size)
        layout = self.layout(*image_size)
        ids = self.check_ids(ids)
        if len(ids) == 0:
            return torch.empty(0, 3, *image_size, device=self.device)
        if ids.ndim == 2 and ids.shape[1] != layout.num_tokens and (side := square_of(self, ids.shape[1])):
            what = f"{ids.shape[1]} ids per image, but {layout.num_tokens} at {in_pixels(*image_size)}"
            raise DataError(what, f"Set image_size={side}")
        check_negative(ids, layout)
        if groups is not None:
            ids = keep_groups(ids, layout, groups)
        codes = self.autoencoder.quantizer.lookup(ids, layout)
        return self.autoencoder.decode(codes).float()

    def embed(self, ids: Tensor) -> Tensor:
        """The code of each id, float32[B, N, C / G] of int64[B, N], in the order of the ids; zeros for a negative id.

        It is row ids[:, n] of `codebook`, with groups of codebook[n % G]. With `multi_group` it has the C / G channels
        of its group, with `residual` and `multi_scale` all C.

        Raises:
            DataError: ids of a wrong dtype or shape, or outside the codebook.
        """
        ids = self.check_ids(ids)
        if ids.ndim != 2 or ids.shape[1] % self.num_groups:
            multiple = f", N a multiple of {self.num_groups}" if self.num_groups > 1 else ""
            raise DataError(f"ids of shape {list(ids.shape)}, [B, N] is expected{multiple}")
        if ids.numel() == 0:
            return torch.empty(*ids.shape, self.code_dim, device=self.device)
        return self.autoencoder.quantizer.token_codes(ids)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor, image_size: Size | None = None) -> Tensor:
        """Decode codes to images uint8[B, 3, H, W].

        Args:
            codes: those of ids, float[B, N, C / G] as `embed` returns them, or of positions, float[B, C, h, w] as
                `quantize` returns them. They may be any vectors.
            image_size: (H, W), or the side of a square; required with [B, N, C / G].

        Raises:
            DataError: another shape.
            NumericError: the codes are NaN or infinite.
        """
        if not codes.isfinite().all():
            raise NumericError("codes are NaN or infinite", "Check what made them")
        return to_uint8(self.decode_codes_float(codes, image_size))

    def decode_codes_float(self, codes: Tensor, image_size: Size | None = None) -> Tensor:
        """As `decode_codes`, without rounding and clamping, and with gradients of the codes: float32[B, 3, H, W]."""
        quantizer, factor = self.autoencoder.quantizer, self.downsample_factor
        codes = codes.to(self.device)
        if codes.ndim == 3 and image_size is None:
            raise DataError(f"codes of shape {list(codes.shape)} without the size of the images", "Set image_size")
        if codes.ndim == 3:
            layout = self.layout(*pair_of(image_size))  # type: ignore[arg-type]  # not None
            channels = self.code_dim
            if codes.shape[2] != channels:
                raise DataError(f"codes of {codes.shape[2]} channels", f"Those of this tokenizer have {channels}")
            codes = quantizer.combine(codes.float(), layout)
        if codes.ndim != 4 or codes.shape[1] != quantizer.latent_dim:
            raise DataError(
                f"codes of shape {list(codes.shape)}",
                f"Pass [B, N, {self.code_dim}] of ids, or [B, {quantizer.latent_dim}, h, w] of positions",
            )
        height, width = (factor * side for side in codes.shape[2:])
        if image_size is not None and pair_of(image_size) != (height, width):
            raise DataError(
                f"codes of an image of {in_pixels(height, width)}, image_size = {image_size}", "Omit image_size"
            )
        return self.autoencoder.decode(codes).float()

    def write_tokens(
        self,
        images: str | Path | Sequence[str | Path] | ImageSet,
        out: str | Path,
        *,
        image_size: Size | str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        progress: Progress = SILENT,
        **settings: Any,
    ) -> artifacts.Artifact:
        """Encode images and write the ids as a `tokens` artifact: `vqpipe tokenize`. `TokenDataset` reads it.

        An interrupted job continues at its first missing shard. A finished one of the same arguments is opened. Under
        torchrun each rank writes its share.

        Args:
            images: what --images takes: a folder, tars, an artifact, `builtin:photos`; or several of them.
            out: the directory of the artifact.
            image_size: (H, W), the side of a square, "WIDTHxHEIGHT", or "native": each image at its own size; by
                default that of the training images.
            settings: `flip`, `crops`, `precision`, `max_pixels`, `max_skipped` of `TokensConfig`.

        Raises:
            DataError: the image size is unknown or no multiple of the downsample factor; unreadable images.
            ArtifactError: `out` has other contents.
            ConfigError: settings that exclude each other; the tokenizer was not opened with `from_pretrained`, so that
                the artifact could not name it.
        """
        if not self.source:
            raise ConfigError("this tokenizer has no stored weights", "Call save_pretrained, and open it again")
        if image_size is not None and not isinstance(image_size, str):
            height, width = pair_of(image_size)
            image_size = f"{width}x{height}"
        config = TokensConfig(image_size=image_size, **settings).sized_by(self)
        image_set = images if isinstance(images, ImageSet) else open_images(images)
        inputs = {"images": image_set, "tokenizer": self.source}
        draft = artifacts.start(out, "tokens", config.request(image_set.key_prefix), inputs)
        if isinstance(draft, artifacts.Artifact):
            return draft
        with draft:
            options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "progress": progress}
            return draft.publish(write_tokens(draft, image_set, self, config, **options))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and README.md into `folder`, which is created if absent.

        Raises:
            ArtifactError: it is an artifact, which is never overwritten.
        """
        save_tokenizer(Path(folder), self.autoencoder, self.image_size)

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        licence: str = "",
        metrics: str = "",
        datasets: Sequence[str] = (),
        card: str | None = None,
    ) -> str:
        """Upload to the hub as `repository` ("user/name") and return the URL of the commit.

        Args:
            repository: is made if it is absent.
            private: whether a new repository is private; one that is public is refused then.
            licence, metrics, datasets: of the model card, as `hub_card`.
            card: the whole model card, in their place.

        Raises:
            ConfigError: the repository is not "user/name".
            WeightsError: no token (run `hf auth login` first), no permission, or no connection; or with `private`, the
                repository is public.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            text = card or self.hub_card(repository, licence=licence, metrics=metrics, datasets=datasets)
            (Path(folder) / "README.md").write_text(text, encoding="utf-8")
            return upload_folder(repository.removeprefix("hf:"), Path(folder), private=private)

    def hub_card(self, repository: str, *, licence: str = "", metrics: str = "", datasets: Sequence[str] = ()) -> str:
        """The model card of `push_to_hub`.

        Args:
            repository: "user/name".
            licence: of the weights, such as "apache-2.0".
            metrics: Markdown, such as that of `vqpipe.reports.model_card.metrics_section`.
            datasets: the data sets of the training, as the hub calls them.
        """
        facts = {} if self.artifact is None else self.artifact.facts
        origin = {key: facts[key] for key in ("family", "zoo", "source") if key in facts}
        return hub_card(
            repository.removeprefix("hf:"),
            properties(self.autoencoder, self.image_size) | origin,
            downsample_factor=self.downsample_factor,
            image_size=self.image_size,
            licence=licence,
            datasets=datasets,
            metrics=metrics,
            lineage=None if self.artifact is None else self.artifact.lineage,
        )

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Tokenizer":
        """Move to a device and convert the encoder and the decoder to a floating type; returns the tokenizer itself.

        The quantizer stays in float32. In another type than float32 a few percent of the ids differ.
        """
        if dtype is not None:
            if not dtype.is_floating_point:
                raise ConfigError(f"{dtype} is no floating type", "Use torch.float32, torch.bfloat16 or torch.float16")
            self.autoencoder.to(dtype)
        if device is not None:
            self.device = check_device(device)
            self.autoencoder.to(self.device)
        return self

    def describe(self, image_size: int) -> dict[str, Any]:
        """Facts for a report on images of side `image_size`."""
        return model_facts(self.autoencoder) | {
            "latent_shape": list(self.latent_shape(image_size, image_size)),
            "num_parameters": sum(parameter.numel() for parameter in self.autoencoder.parameters()),
        }

    def to_table(self) -> dict[str, Any]:
        """The content of config.json."""
        return config_table(self.autoencoder, self.image_size)

    def check_groups(self, groups: int | None) -> None:
        """Raise a DataError unless the first `groups` groups can be decoded; None means all."""
        if groups is not None and not 1 <= groups <= self.num_groups:
            raise DataError(f"groups = {groups}, the tokenizer has {self.num_groups}", "Set 1 up to that number")

    def check_ids(self, ids: Tensor) -> Tensor:
        """The ids as int64 on the device; a DataError if they are not a tensor of integers."""
        if not isinstance(ids, Tensor):
            raise DataError(f"ids of type {type(ids).__name__}", "Pass a tensor: torch.as_tensor(ids)")
        if ids.is_floating_point() or ids.is_complex():
            raise DataError(f"ids of type {ids.dtype}", "Pass integers, as `encode` returns them")
        return ids.to(self.device, torch.int64)

    def check_made(self, artifact: artifacts.Artifact) -> None:
        """Raise an ArtifactError unless this tokenizer encoded these tokens or latents."""
        made_by = artifact.inputs["tokenizer"]
        own = self.source if isinstance(self.source, str) else self.source.digest
        if made_by != own:
            name = artifact.lineage["inputs"].get("tokenizer", {}).get("name") or "without a name"
            given = f"{self.name} ({own[:12] or 'not saved'})"
            raise ArtifactError(
                f"{artifact.path} was made by tokenizer {name} ({made_by[:12]}), not by {given}",
                f"Pass {[*artifact.options('--tokenizer'), 'the tokenizer that made it'][0]}",
            )


def square_of(tokenizer: Tokenizer, num_tokens: int) -> int | None:
    """The side of the square image that has so many ids; None if there is none."""
    sides = (tokenizer.downsample_factor * cells for cells in range(1, isqrt(num_tokens) + 1))
    return next((side for side in sides if tokenizer.layout(side).num_tokens == num_tokens), None)


def in_batches(tensors: Sequence[Tensor], sizes: Sequence[S], function: Callable[[Tensor, S], Tensor]) -> list[Tensor]:
    """Apply `function` to batches of tensors that have the same shape, type and size; return its results in order."""
    alike: dict[Any, list[int]] = {}
    for place, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        alike.setdefault((tensor.shape, tensor.dtype, tensor.device, size), []).append(place)
    results: dict[int, Tensor] = {}
    for places in alike.values():
        for part in chunks(places, IMAGES_PER_BATCH):
            batch = torch.stack([tensors[place] for place in part])
            results |= zip(part, function(batch, sizes[part[0]]), strict=True)
    return [results[place] for place in range(len(tensors))]
