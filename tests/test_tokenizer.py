import pickle
import re
import struct
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vqpipe
from vqpipe import Tokenizer, VqpipeError, artifacts
from vqpipe.data import TokenDataset, open_images
from vqpipe.data.decoding import decode
from vqpipe.data.transforms import center_crop, to_float, to_uint8
from vqpipe.errors import ArtifactError, ConfigError, DataError, NumericError, WeightsError
from vqpipe.model_input import network_input
from vqpipe.quantizers import (
    CvqConfig,
    LcConfig,
    LfqConfig,
    MultiGroupConfig,
    MultiScaleConfig,
    QuantizerConfig,
    ResidualConfig,
)


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer: Callable[[QuantizerConfig], Tokenizer]) -> Tokenizer:
    return small_tokenizer(LcConfig(codebook_size=50, feature_dim=16, code_dim=4, codebook_init="uniform"))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 32, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_public_names() -> None:
    assert vqpipe.__all__ == ["TokenLayout", "Tokenizer", "VqpipeError"]
    assert all(hasattr(vqpipe, name) for name in vqpipe.__all__)
    assert issubclass(DataError, VqpipeError)


def test_encode_and_decode(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    ids = tokenizer.encode(images)
    assert (ids.dtype, tuple(ids.shape)) == (torch.int64, (3, 8 * 6))
    assert tokenizer.layout(32, 24).num_tokens == 48
    assert (tokenizer.codebook_size, tokenizer.num_groups, tokenizer.downsample_factor) == (50, 1, 4)
    decoded = tokenizer.decode(ids, image_size=(32, 24))
    assert (decoded.dtype, decoded.shape) == (torch.uint8, images.shape)
    assert torch.equal(tokenizer.encode(images.float() / 127.5 - 1), ids)


def test_decode_of_ids_equals_the_forward_pass_exactly(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    with torch.no_grad():
        reconstruction = tokenizer.autoencoder(to_float(images))
    decoded = tokenizer.decode(reconstruction.quantized.ids, (32, 24))
    assert torch.equal(decoded, to_uint8(reconstruction.images))


def test_ids_do_not_depend_on_the_batch(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    ids = tokenizer.encode(images)
    assert torch.equal(torch.cat([tokenizer.encode(image[None]) for image in images]), ids)


def test_empty_batch(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    ids = tokenizer.encode(images[:0])
    assert (ids.dtype, ids.shape) == (torch.int64, (0, 48))
    decoded = tokenizer.decode(ids, (32, 24))
    assert (decoded.dtype, decoded.shape) == (torch.uint8, (0, 3, 32, 24))
    assert tokenizer.embed(ids).shape == (0, 48, 4)
    assert tokenizer.embed(ids.new_zeros(3, 0)).shape == (3, 0, 4)
    assert tokenizer.decode_codes(tokenizer.embed(ids), (32, 24)).shape == (0, 3, 32, 24)
    latent = tokenizer.latent(images[:0])
    assert latent.shape == (0, *tokenizer.latent(images).shape[1:])
    with pytest.raises(DataError, match="a latent of shape"):
        tokenizer.quantize(latent)


def test_save_and_open_round_trip(tokenizer: Tokenizer, images: torch.Tensor, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    readers = tmp_path.stat().st_mode & 0o444
    assert (tmp_path / "model.safetensors").stat().st_mode & readers == readers
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    opened = Tokenizer.from_pretrained(tmp_path)
    assert opened.config == tokenizer.config
    assert opened.image_size == 32
    assert torch.equal(opened.encode(images), tokenizer.encode(images))


def test_invalid_images_are_rejected(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="is not divisible into cells of 4"):
        tokenizer.encode(torch.zeros(1, 3, 30, 32, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"float images in \[0, 255\]"):
        tokenizer.encode(torch.tensor([0.0, 255.0]).repeat(1, 3, 32, 16))
    with pytest.raises(DataError, match=r"dtype torch\.int32"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.int32))
    with pytest.raises(DataError, match="shape"):
        tokenizer.encode(torch.zeros(3, 32, 32, dtype=torch.uint8))
    with pytest.raises(NumericError):
        tokenizer.encode(torch.full((1, 3, 32, 32), float("nan")))


def test_invalid_ids_are_rejected(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="outside a codebook of 50"):
        tokenizer.decode(torch.full((1, 64), 50), (32, 32))
    with pytest.raises(DataError, match="ids of shape"):
        tokenizer.decode(torch.zeros(1, 63, dtype=torch.int64), (32, 32))
    with pytest.raises(DataError, match=r"ids of type torch\.float32"):
        tokenizer.decode(torch.zeros(1, 64), (32, 32))
    for ids in (torch.zeros(1, 64, dtype=torch.int64).numpy(), [[0] * 64]):
        for method in (partial(tokenizer.decode, image_size=32), tokenizer.embed):
            with pytest.raises(DataError, match=r"ids of type (ndarray|list)\. Pass a tensor: torch\.as_tensor\(ids\)"):
                method(ids)
    with pytest.raises(DataError, match="groups = 2, the tokenizer has 1"):
        tokenizer.decode(torch.zeros(1, 64, dtype=torch.int64), (32, 32), groups=2)


def test_decoding_refuses_negative_ids(tokenizer: Tokenizer) -> None:
    for ids in (torch.full((1, 64), -1), torch.full((1, 64), -2), torch.tensor([[0] * 63 + [-1]])):
        with pytest.raises(DataError, match=r"ids of -[12], which are not"):
            tokenizer.decode(ids, (32, 32))


def test_repository_of_the_hub_is_opened_only_by_name(tokenizer: Tokenizer, tmp_path: Path, hub: Any) -> None:
    tokenizer.save_pretrained(tmp_path)
    hub.files["user/name"] = tmp_path
    with pytest.raises(ArtifactError, match="user/name is not a vqpipe artifact"):
        Tokenizer.from_pretrained(Path("user/name"))  # a mistyped --tokenizer
    assert hub.requests == []
    for source in ("user/name", "hf:user/name", Path("hf:user/name")):
        assert Tokenizer.from_pretrained(source).name == "name"
    assert hub.requests == ["user/name"] * 3


def test_invalid_folders_are_rejected(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a vqpipe artifact"):
        Tokenizer.from_pretrained(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="is absent or is not the config of a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"codebook_size": 50', '"codebook_size": 51'))
    with pytest.raises(WeightsError, match="do not match their config"):
        Tokenizer.from_pretrained(tmp_path)
    for side in ('"x"', "128.0", "NaN", "true", "0"):
        (tmp_path / "config.json").write_text(re.sub('"image_size": .*', f'"image_size": {side}', config))
        with pytest.raises(ArtifactError, match=r"image_size = .* in .*config\.json is no number of pixels"):
            Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model": ' + "[" * 100_000)  # too deep for Python's reader of JSON
    with pytest.raises(ArtifactError, match="is not the config of a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


KINDS: dict[str, QuantizerConfig] = {
    "lc": LcConfig(codebook_size=50, feature_dim=16, code_dim=4, codebook_init="uniform"),
    "lfq": LfqConfig(code_dim=6),
    "multi_group": MultiGroupConfig(num_groups=3, group=CvqConfig(codebook_size=40, code_dim=2)),
    "multi_scale": MultiScaleConfig(codebook_size=40, code_dim=6),
    "residual": ResidualConfig(codebook_size=40, code_dim=6, depth=2),
}
CHANNELS = {"lc": 4, "lfq": 6, "multi_group": 2, "multi_scale": 6, "residual": 6}
"""Of the code of an id."""


@pytest.fixture(scope="module", params=KINDS)
def any_tokenizer(request: pytest.FixtureRequest, small_tokenizer: Callable[[QuantizerConfig], Tokenizer]) -> Tokenizer:
    return small_tokenizer(KINDS[request.param])


def test_codes_of_ids_decode_to_the_images_of_the_ids(any_tokenizer: Tokenizer, images: torch.Tensor) -> None:
    ids = any_tokenizer.encode(images)
    codes = any_tokenizer.embed(ids)
    kind = any_tokenizer.config.quantizer.kind
    assert codes.dtype == torch.float32
    assert codes.shape == (*ids.shape, CHANNELS[kind]) == (*ids.shape, any_tokenizer.code_dim)
    decoded = any_tokenizer.decode_codes(codes, image_size=(32, 24))
    assert torch.equal(decoded, any_tokenizer.decode(ids, (32, 24)))
    assert not any_tokenizer.embed(torch.full_like(ids, -1)).any()
    if kind != "lfq":
        groups = torch.arange(ids.shape[1]) % any_tokenizer.num_groups
        codebook = any_tokenizer.codebook.reshape(-1, any_tokenizer.codebook_size, any_tokenizer.code_dim)
        torch.testing.assert_close(codebook[groups, ids], codes, rtol=0, atol=1e-6)


def test_shape_of_the_codebook(small_tokenizer: Callable[[QuantizerConfig], Tokenizer]) -> None:
    shapes = {kind: small_tokenizer(KINDS[kind]).codebook.shape for kind in KINDS if kind != "lfq"}
    assert shapes == {"lc": (50, 4), "multi_group": (3, 40, 2), "multi_scale": (40, 6), "residual": (2, 40, 6)}
    with pytest.raises(ConfigError, match="the lfq quantizer has no codebook"):
        _ = small_tokenizer(KINDS["lfq"]).codebook


def test_latent_quantize_and_decode_codes_are_the_steps_of_a_reconstruction(
    any_tokenizer: Tokenizer, images: torch.Tensor
) -> None:
    codes, ids, losses = any_tokenizer.quantize(any_tokenizer.latent(images))
    assert torch.equal(ids, any_tokenizer.encode(images))
    assert torch.equal(any_tokenizer.decode_codes(codes), any_tokenizer.decode(ids, (32, 24)))
    assert losses.keys() == set(any_tokenizer.autoencoder.quantizer.loss_names)


def test_gradients_reach_codes_and_latents(any_tokenizer: Tokenizer, images: torch.Tensor) -> None:
    codes = any_tokenizer.embed(any_tokenizer.encode(images)).requires_grad_()
    any_tokenizer.decode_codes_float(codes, (32, 24)).square().mean().backward()
    assert codes.grad is not None
    assert codes.grad.any()
    latent = any_tokenizer.latent(images).requires_grad_()
    any_tokenizer.decode_codes_float(any_tokenizer.quantize(latent).codes).square().mean().backward()
    assert latent.grad is not None
    assert latent.grad.any()
    assert not any_tokenizer.decode_codes(codes, (32, 24)).requires_grad
    assert all(parameter.grad is None for parameter in any_tokenizer.autoencoder.parameters())


def test_invalid_codes_are_rejected(any_tokenizer: Tokenizer) -> None:
    count, channels = any_tokenizer.layout(16, 16).num_tokens, any_tokenizer.code_dim
    with pytest.raises(DataError, match="without the size of the images"):
        any_tokenizer.decode_codes(torch.zeros(1, count, channels))
    with pytest.raises(DataError, match="codes of shape"):
        any_tokenizer.decode_codes(torch.zeros(1, count + 1, channels), 16)
    with pytest.raises(DataError, match=f"codes of {channels + 1} channels"):
        any_tokenizer.decode_codes(torch.zeros(1, count, channels + 1), 16)
    with pytest.raises(DataError, match="codes of shape"):
        any_tokenizer.decode_codes(torch.zeros(1, 99, 4, 4))
    with pytest.raises(NumericError, match="codes are NaN"):
        any_tokenizer.decode_codes(torch.full((1, count, channels), torch.nan), 16)
    with pytest.raises(DataError, match="codes of an image of 16 x 16"):
        any_tokenizer.decode_codes(torch.zeros(any_tokenizer.latent_shape(16, 16))[None], (16, 12))
    with pytest.raises(DataError, match="a latent of shape"):
        any_tokenizer.quantize(torch.zeros(1, 99, 4, 4))
    with pytest.raises(DataError, match="outside a codebook"):
        any_tokenizer.embed(torch.full((1, count), any_tokenizer.codebook_size))
    with pytest.raises(DataError, match=r"ids of type torch\.float32"):
        any_tokenizer.embed(torch.zeros(1, count))
    with pytest.raises(DataError, match="ids of shape"):
        any_tokenizer.embed(torch.zeros(count, dtype=torch.int64))


def test_lists_of_images_of_several_sizes_keep_their_order(
    any_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqpipe.tokenizer.IMAGES_PER_BATCH", 2)
    generator = torch.Generator().manual_seed(2)
    sizes = [(32, 24), (16, 16), (32, 24), (24, 32), (16, 16), (32, 24)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    ids = any_tokenizer.encode(images)
    assert [each.tolist() for each in ids] == [any_tokenizer.encode(image[None])[0].tolist() for image in images]
    decoded = any_tokenizer.decode(ids, sizes)
    for each, own, size in zip(decoded, ids, sizes, strict=True):
        assert torch.equal(each, any_tokenizer.decode(own[None], size)[0])
    (first,) = any_tokenizer.decode(ids[:1], sizes[:1], groups=1)
    assert torch.equal(first, any_tokenizer.decode(ids[0][None], sizes[0], groups=1)[0])
    assert any_tokenizer.encode([]) == any_tokenizer.decode([], 16) == []
    with pytest.raises(DataError, match="5 sizes for the ids of 6 images"):
        any_tokenizer.decode(ids, sizes[:5])
    with pytest.raises(DataError, match="images of shape"):
        any_tokenizer.encode([images[0][None]])


def test_size_of_one_image_or_of_all_images_of_a_list(tokenizer: Tokenizer) -> None:
    ids = torch.arange(16)[None]
    expected = tokenizer.decode(ids, (16, 16))
    assert torch.equal(tokenizer.decode(ids, 16), expected)
    whole: Any = np.int64(16)
    for size in (16, "16", (16, 16), whole, (whole, whole), np.array([16, 16])):
        assert torch.equal(tokenizer.decode(ids, size), expected)
        for image in tokenizer.decode([ids[0]] * 3, size):
            assert torch.equal(image, expected[0])
    assert torch.equal(to_uint8(tokenizer.decode_float(ids, 16)), expected)
    assert torch.equal(tokenizer.decode_codes(tokenizer.embed(ids), 16), expected)


@pytest.mark.parametrize(
    "kind", ["lc", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("multi_group", "lfq", "residual"))]
)
def test_encode_and_decode_compile_to_one_graph(
    kind: str, small_tokenizer: Callable[[QuantizerConfig], Tokenizer], images: torch.Tensor
) -> None:
    torch._dynamo.reset()  # compiled functions of other tests count to the limit of recompilations
    tokenizer = small_tokenizer(KINDS[kind])
    ids = tokenizer.encode(images)
    encode = torch.compile(tokenizer.encode, fullgraph=True, backend="eager")
    decode = torch.compile(tokenizer.decode, fullgraph=True, backend="eager")
    assert torch.equal(encode(images), ids)
    assert torch.equal(decode(ids, (32, 24)), tokenizer.decode(ids, (32, 24)))


WRONG_IDS = """
import torch
from vqpipe import Tokenizer
tokenizer = Tokenizer.from_pretrained("builtin:photos-f8")
decode = torch.compile(tokenizer.decode, fullgraph=True, backend="eager")
ids = torch.zeros(1, 16, dtype=torch.int64)
print(decode(ids, 32).shape)
decode(ids + tokenizer.codebook_size, 32)
"""


@pytest.mark.slow
def test_ids_outside_the_codebook_are_an_error_in_a_compiled_graph(python: Callable[..., Any]) -> None:
    """In a process of its own: after an error in a compiled function, PyTorch trains other networks wrongly."""
    done = python(WRONG_IDS)
    assert done.stdout == "torch.Size([1, 3, 32, 32])\n"
    assert "RuntimeError: an id is outside the codebook" in done.stderr


@pytest.mark.slow  # the compiler takes minutes
def test_compiled_by_inductor(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    torch._dynamo.reset()
    ids = tokenizer.encode(images)
    compiled = torch.compile(tokenizer.encode, fullgraph=True)(images)
    assert (compiled == ids).float().mean() > 0.95
    decoded = torch.compile(tokenizer.decode, fullgraph=True)(ids, (32, 24))
    assert (decoded.int() - tokenizer.decode(ids, (32, 24)).int()).abs().max() <= 1


def test_moves_and_converts_the_networks_but_not_the_quantizer(
    small_tokenizer: Callable[[QuantizerConfig], Tokenizer], images: torch.Tensor, tmp_path: Path
) -> None:
    tokenizer = small_tokenizer(KINDS["residual"])
    ids, decoded = tokenizer.encode(images), tokenizer.decode(tokenizer.encode(images), (32, 24))
    assert tokenizer.to("auto", torch.bfloat16) is tokenizer
    assert tokenizer.dtype == torch.bfloat16
    assert {value.dtype for value in tokenizer.autoencoder.quantizer.state_dict().values()} == {torch.float32}
    assert (tokenizer.encode(images) == ids).float().mean() > 0.5
    difference = tokenizer.decode(ids, (32, 24)).to("cpu").int() - decoded.int()
    assert 0 < difference.abs().float().mean() < 4
    tokenizer.save_pretrained(tmp_path)
    opened = Tokenizer.from_pretrained(tmp_path, device="auto")
    assert opened.dtype == torch.float32
    assert torch.equal(opened.to(dtype=torch.bfloat16).encode(images), tokenizer.encode(images))
    with pytest.raises(ConfigError, match="no floating type"):
        tokenizer.to(dtype=torch.int8)


def test_tokenizer_adds_no_parameters_to_a_module_and_is_pickled(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    module = torch.nn.Linear(2, 2)
    module.tokenizer = tokenizer  # type: ignore[assignment]
    assert len(list(module.parameters())) == len(module.state_dict()) == 2
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer)).encode(images), tokenizer.encode(images))


def test_repr_lists_the_properties(small_tokenizer: Callable[[QuantizerConfig], Tokenizer]) -> None:
    tokenizer = small_tokenizer(KINDS["multi_group"])
    count = sum(parameter.numel() for parameter in tokenizer.autoencoder.parameters())
    assert repr(tokenizer) == (
        f"Tokenizer(quantizer=multi_group, downsample_factor=4, codebook_size=40, num_groups=3, image_size=32, "
        f"num_parameters={count}, device=cpu, dtype=torch.float32)"
    )


def test_float_images_in_0_1_are_warned_of(tokenizer: Tokenizer) -> None:
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"if they are in \[0, 1\], pass 2 \* images - 1") as caught:
        tokenizer.encode(images)
    assert [Path(warning.filename).name for warning in caught] == ["test_tokenizer.py"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(2 * images - 1)
        tokenizer.encode(torch.zeros(1, 3, 32, 32))


def test_package_is_typed() -> None:
    assert (Path(vqpipe.__file__).parent / "py.typed").is_file()


def test_write_tokens_writes_what_encode_returns(
    small_tokenizer: Callable[[QuantizerConfig], Tokenizer], draw_folder: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = small_tokenizer(LcConfig(codebook_size=50, feature_dim=16, code_dim=4, codebook_init="uniform"))
    folder = draw_folder(tmp_path / "images", 3, side=32)
    with pytest.raises(ConfigError, match=r"no stored weights.*save_pretrained"):
        tokenizer.write_tokens(folder, tmp_path / "tokens")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    artifact = tokenizer.write_tokens(folder, tmp_path / "tokens")
    stored = TokenDataset(tmp_path / "tokens")
    pixels = torch.stack([center_crop(decode(path.read_bytes()), 32) for path in sorted(folder.iterdir())])
    assert torch.equal(torch.stack([stored[i]["ids"] for i in range(3)]), tokenizer.encode(pixels))
    assert artifact.facts["image_size"] == 32
    with pytest.raises(ArtifactError, match="is an artifact, which is never overwritten"):
        tokenizer.save_pretrained(artifact.path)
    artifact.verify()
    assert tokenizer.write_tokens(open_images(folder), tmp_path / "tokens").digest == artifact.digest
    wide = tokenizer.write_tokens(folder, tmp_path / "wide", image_size=(np.int64(16), 32))
    assert (wide.facts["image_size"], wide.facts["num_tokens"]) == ("32x16", 32)
    with pytest.raises(DataError, match="not divisible"):
        tokenizer.write_tokens(folder, tmp_path / "odd", image_size=30)
    native = tokenizer.write_tokens(folder, tmp_path / "native", image_size="native", max_pixels=32 * 32)
    assert native.facts["sizes"]["32x32"]["num_images"] == 3
    with pytest.raises(ConfigError, match="--crops ten includes the flip"):
        tokenizer.write_tokens(folder, tmp_path / "both", crops="ten", flip=True)
    for name, value in (("precision", "fp16"), ("crops", "five"), ("max_skipped", float("nan")), ("batch_size", -1)):
        with pytest.raises(ConfigError, match=f"{name} = {value!r}"):
            tokenizer.write_tokens(folder, tmp_path / "invalid", **{name: value})
    with pytest.raises(ConfigError, match="max_pixels = 0"):
        tokenizer.write_tokens(folder, tmp_path / "invalid", image_size="native", max_pixels=0)
    with pytest.raises(ConfigError, match="precision = 'int8'"):
        tokenizer.encode(pixels, "int8")
    (folder / "cut.png").write_bytes((folder / "00.png").read_bytes()[:60])
    cut = tokenizer.write_tokens(folder, tmp_path / "cut", image_size="native", max_skipped=0.5)
    assert cut.facts["num_sizes"] == len(cut.facts["sizes"]) == 1
    tokenizer.image_size = None
    with pytest.raises(DataError, match="Give --image-size"):
        tokenizer.write_tokens(folder, tmp_path / "unknown")
    assert not (tmp_path / "odd.partial").exists()


@pytest.fixture
def photo(draw_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "photos", 1, side=50) / "00.png"


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "white is zero", "12 bits"])
def test_gray_of_more_than_8_bits_is_the_same_as_file_and_as_pil_image(
    tokenizer: Tokenizer, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "gray"
    gray = Image.fromarray(np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8))
    if kind == "PPM":
        path.write_bytes(b"P5 8 8 65535\n" + np.asarray(gray).astype(">u2").tobytes())
    else:
        tags = {262: 0} if kind == "white is zero" else {}
        gray.save(path, kind if kind == "PNG" else "TIFF", **({} if kind == "PNG" else {"tiffinfo": tags}))
    if kind == "12 bits":  # the same bytes: 3 hold two samples
        path.write_bytes(
            path.read_bytes().replace(struct.pack("<HHIH", 258, 3, 1, 16), struct.pack("<HHIH", 258, 3, 1, 12))
        )
    with Image.open(path) as image:
        assert image.mode.startswith("I")
        assert torch.equal(tokenizer.read_image(image), tokenizer.read_image(path))
        assert torch.equal(tokenizer.read_image(image), tokenizer.read_image(path))  # it is loaded already


def test_encode_takes_files_and_pil_images(tokenizer: Tokenizer, photo: Path) -> None:
    with Image.open(photo) as image:
        crop = center_crop(image.convert("RGB"), 32)
        ids = tokenizer.encode(crop[None])
        assert torch.equal(tokenizer.encode(image, image_size=32), ids)
        assert torch.equal(tokenizer.encode(str(photo), image_size=32), ids)
        for one in (image, photo, crop[None]):
            assert torch.equal(tokenizer.latent(one, image_size=32), tokenizer.latent(crop[None]))
        rows = tokenizer.encode([image, photo, crop], image_size=32)
        assert all(torch.equal(row, ids[0]) for row in rows)
        assert tokenizer.encode(image, image_size=(16, 32)).shape == (1, tokenizer.layout(16, 32).num_tokens)
        assert tokenizer.encode(image.crop((0, 0, 12, 8))).shape == (1, 6)
        clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
        assert torch.equal(tokenizer.read_image(clear), torch.full((3, 8, 8), 255, dtype=torch.uint8))
        with pytest.raises(DataError, match=r"50 x 50 pixels is not divisible into cells of 4\. Set image_size"):
            tokenizer.encode(image)
        with pytest.raises(DataError, match=r"32 x 32 pixels, image_size = 16\. Omit image_size"):
            tokenizer.encode(crop[None], image_size=16)
        with pytest.raises(DataError, match=r"of type ndarray\. Pass tensors, PIL images"):
            tokenizer.encode([crop.numpy()])  # type: ignore[list-item]
        with pytest.raises(DataError, match="an image of type list"):
            tokenizer.latent([image])  # type: ignore[arg-type]
    photo.write_bytes(photo.read_bytes()[:100])
    with pytest.raises(DataError, match=r"00\.png: truncated image"):
        tokenizer.encode(photo, image_size=32)
    with Image.open(photo) as image, pytest.raises(DataError, match="truncated image"):
        tokenizer.encode(image, image_size=32)
    with pytest.raises(DataError, match=r"absent\.png: No such file.*Check the path"):
        tokenizer.encode("absent.png")
    with pytest.raises(DataError, match=r"/photos is a folder\. Pass its files, or the folder to write_tokens"):
        tokenizer.encode(photo.parent)
    with pytest.raises(DataError, match=r"is expected\. Pass images\[None\] for a single one"):
        tokenizer.encode(crop)


def test_ids_of_another_size_are_refused_with_the_size_that_they_fit(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    count = ids.shape[1]
    with pytest.raises(DataError, match=rf"{count} ids per image, but .* at 32 x 32 pixels\. Set image_size=64\."):
        tokenizer.decode(ids, image_size=32)
    with pytest.raises(DataError, match=r"is expected\. It has 8 x 8 positions"):
        tokenizer.decode(ids[:, : 17 * tokenizer.num_groups], image_size=32)
    with pytest.raises(DataError, match=r"is expected\. Pass ids\[None\] for a single image\.$"):
        tokenizer.decode(ids[0], image_size=64)


def test_sizes_are_also_those_of_the_facts_of_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(torch.zeros(1, 3, 64, 32, dtype=torch.uint8))
    assert torch.equal(tokenizer.decode(ids, "32x64"), tokenizer.decode(ids, (64, 32)))
    assert tokenizer.decode([ids[0]], "32x64")[0].shape == (3, 64, 32)


def test_layout_of_one_side_is_that_of_a_square(tokenizer: Tokenizer) -> None:
    assert tokenizer.layout(32) == tokenizer.layout(32, 32)


def test_range_of_tensors_on_a_gpu_is_checked_once() -> None:
    """The meta device stands for a GPU: to read a value from it, as the check does, is an error."""
    owner = SimpleNamespace(device=torch.device("meta"), downsample_factor=4, range_checked=True)
    images = torch.zeros(1, 3, 8, 8, device="meta")
    assert network_input(images, owner).shape == images.shape
    owner.range_checked = False
    with pytest.raises(RuntimeError, match="meta"):
        network_input(images, owner)
    assert owner.range_checked
    with pytest.raises(DataError, match="float images in"):
        network_input(torch.full((1, 3, 8, 8), 2.0), owner)


def test_an_unfinished_tokenizer_names_the_command_that_finishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/vqpipe", "train", "--out", "t5"])
    draft = artifacts.start(tmp_path / "t5", "tokenizer", {}, {})
    assert isinstance(draft, artifacts.Draft)
    with draft, draft.write("metrics.jsonl") as path:
        path.write_text("")
    for name in ("t5", "t5.partial"):
        with pytest.raises(ArtifactError, match=r"t5 is not finished\. Finish it with: vqpipe train --out t5;"):
            Tokenizer.from_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(ArtifactError, match=r"t5 is not finished\. Finish it with"):  # not looked up on the hub
        Tokenizer.from_pretrained(f"{tmp_path.name}/t5")


def test_tokens_of_another_tokenizer_are_refused_with_the_name_of_the_one_that_made_them(
    draw_folder: Callable[..., Path], tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["tokenize", "--tokenizer", "builtin:photos-f8"]
    monkeypatch.setattr(sys, "argv", ["vqpipe", *words])
    folder = draw_folder(tmp_path / "images", 1, side=64)
    made = Tokenizer.from_pretrained("builtin:photos-f8").write_tokens(folder, tmp_path / "tokens", image_size=64)
    tokenizer.save_pretrained(tmp_path / "mine")
    with pytest.raises(
        ArtifactError, match=r"tokenizer photos-f8 \(.*\), not by mine \(.*\)\. Pass builtin:photos-f8\."
    ):
        Tokenizer.from_pretrained(tmp_path / "mine").check_made(made)


SCRIPT_OF_A_USER = """
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader

from vqpipe import Tokenizer, TokenLayout, VqpipeError
from vqpipe.data import ImageStream, TokenDataset, open_images


def main(folder: Path) -> torch.Tensor:
    tokenizer = Tokenizer.from_pretrained("tokenizer", device="auto").to(dtype=torch.bfloat16)
    layout: TokenLayout = tokenizer.layout(256)
    ids: torch.Tensor = tokenizer.encode(torch.zeros(1, 3, 256, 256))
    rows: list[torch.Tensor] = tokenizer.encode([Image.open("a.png"), folder / "b.png"], image_size=256)
    names: list[torch.Tensor] = tokenizer.encode(["a.png", "b.png"], image_size=(128, 256))
    image: torch.Tensor = tokenizer.encode("a.png", image_size=256)
    decoded: list[torch.Tensor] = tokenizer.decode(rows, 256)
    artifact = tokenizer.write_tokens(open_images(folder), "tokens")
    print(artifact.path, layout.num_tokens, tokenizer.codebook.shape, names, image, decoded)
    for batch in DataLoader(TokenDataset("tokens"), batch_size=4):
        print(batch["ids"])
    print(next(iter(ImageStream("images", image_size=256, seed=0, batch_size=4)))["image"])
    try:
        return tokenizer.decode(ids, image_size=256)
    except VqpipeError as error:
        raise SystemExit(str(error)) from None
"""


@pytest.mark.slow
def test_script_of_a_user_passes_mypy_strict(tmp_path: Path) -> None:
    mypy = pytest.importorskip("mypy.api")
    (tmp_path / "script.py").write_text(SCRIPT_OF_A_USER)
    root = Path(vqpipe.__file__).parents[1]
    config = ["--config-file=", "--strict", "--cache-dir", str(root / ".mypy_cache" / "script")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("MYPYPATH", str(root))
        report, errors, _ = mypy.run([*config, "--follow-imports", "silent", "script.py"])
    assert (report, errors) == ("Success: no issues found in 1 source file\n", "")
