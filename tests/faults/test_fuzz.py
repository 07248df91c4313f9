"""Fuzzing of the parsers: any bytes give a result or a VqpipeError in one line, within seconds.

Any other exception, a second line or a hang is a failure. What it has found are tests of their own at the end.
"""

import io
import json
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import save, save_file

from vqpipe import config as configs
from vqpipe.artifacts import Draft, open_artifact, start
from vqpipe.codebooks.features import open_matrix
from vqpipe.codebooks.kmeans import KmeansConfig
from vqpipe.data.tars import index_tar
from vqpipe.data.tokens import read_tokens, write_token_file
from vqpipe.data.transforms import DataConfig
from vqpipe.errors import ConfigError, DataError, VqpipeError
from vqpipe.models import AutoencoderConfig
from vqpipe.models.released import read_released

TIMEOUT = 20.0
"""Seconds after which a call counts as a hang."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A preset with numbers, choices, and a tagged choice."""

    kmeans: KmeansConfig = field(default_factory=KmeansConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: AutoencoderConfig | None = None


TOML = b"""
[kmeans]
k = 100
tolerance = 1e-3
init = "random"
[data]
crop = "center"
max_skipped = 0
[model]
kind = "vqgan"
channel_multipliers = [1, 2]
quantizer = { kind = "vq", codebook_size = 64, code_dim = 4 }
"""
NAMES = (
    *("encoder.conv_in.weight", "encoder.mid.block_1.conv1.weight", "encoder.down.0.block.0.conv1.weight"),
    *("tok_embeddings.weight", "discriminator.main.0.weight", "encoder.stages.0.0.conv1.conv.weight"),
    *("encoder.stages.1.op_list.0.weight", "encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"),
    *("quantize.codebook_used", "loss.logvar", "encoder.mid_block.0.conv1.weight", "decoder.adaptive.0.gamma.weight"),
    *("decoder.conv_out.weight", "quant_conv.weight", "post_quant_conv.bias", "module._orig_mod.encoder.mid", "x"),
    *("quantize.quant_resi.qresi_ls.0.weight", "quantize.quant_resi.qresi_ls.1.bias", "encoder.mid.attn_1.qkv.weight"),
)
"""Names of weights in released checkpoints."""


def tar_bytes(kind: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, data in {"a.png": b"A" * 700, "a.cls": b"3", f"{'d' * 60}/{'e' * 60}.png": b"B"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()[:6144]


def npy_bytes() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones((3, 2), np.float32))
    return file.getvalue()


def torch_bytes(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a published artifact in it."""
    return with_artifact(tmp_path_factory.mktemp("fuzz"))


def with_artifact(place: Path) -> Path:
    """The empty folder `place`, filled with the files that the parsers need."""
    draft = start(place / "out", "codebook", {"k": 3}, {"images": "0" * 64})
    assert isinstance(draft, Draft)
    with draft:
        with draft.write("a.bin") as path:
            path.write_bytes(b"a.bin")
        draft.publish({})
    (place / "manifest.seed").write_bytes((place / "out" / "manifest.json").read_bytes())  # fuzzing overwrites it
    write_token_file(place / "seed.parquet", ["a", "b"], [0, -1], np.array([[[1, 2]], [[3, 4]]], np.uint16))
    return place


@dataclass
class Parser:
    """A parser, and valid inputs as seeds."""

    seeds: Callable[[Path], list[bytes]]
    parse: Callable[[Path, bytes], object]


def manifest(folder: Path, data: bytes) -> None:
    (folder / "out" / "manifest.json").write_bytes(data)
    artifact = open_artifact(folder / "out")
    artifact.verify()
    json.dumps(artifact.lineage)


def toml(folder: Path, data: bytes) -> None:
    (folder / "x.toml").write_bytes(data)
    preset = configs.from_table(Preset, configs.read_toml(folder / "x.toml"))
    json.dumps(configs.to_table(preset), allow_nan=False)


def tar(folder: Path, data: bytes) -> None:
    for known in (None, "known"):
        index = index_tar(io.BytesIO(resealed(data)), "s.tar", known)
        assert all(0 <= at <= at + size <= len(data) for at, size in zip(index.offsets, index.sizes, strict=True))


def resealed(data: bytes) -> bytes:
    """Correct the checksum of every header block, so that its other fields are parsed."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    for number, block in enumerate(blocks):
        if len(block) == 512 and block[257:262] == b"ustar":
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            blocks[number] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


def weights(folder: Path, data: bytes) -> None:
    for name in ("x.safetensors", "x.ckpt"):
        (folder / name).write_bytes(data)
        read_released(folder / name)


def tokens(folder: Path, data: bytes) -> None:
    (folder / "x.parquet").write_bytes(data)
    found = read_tokens(folder / "x.parquet", 5)
    assert len(found.keys) == len(found.labels) == len(found.ids) == len(found.flipped)
    assert found.ids.numel() == 0 or 0 <= found.ids.min() <= found.ids.max() < 5


def matrix(folder: Path, data: bytes) -> None:
    (folder / "x.npy").write_bytes(data)
    assert open_matrix(folder / "x.npy").ndim == 2


WEIGHTS = {"encoder.conv_in.weight": torch.ones(2, 3), "quantize.embedding.weight": torch.ones(4, 2)}
PARSERS = {
    "manifest": Parser(lambda folder: [(folder / "manifest.seed").read_bytes()], manifest),
    "toml": Parser(lambda folder: [TOML], toml),
    "tar": Parser(lambda folder: [tar_bytes(tarfile.GNU_FORMAT), tar_bytes(tarfile.PAX_FORMAT)], tar),
    "weights": Parser(lambda folder: [save(WEIGHTS), torch_bytes({"state_dict": WEIGHTS})], weights),
    "tokens": Parser(lambda folder: [(folder / "seed.parquet").read_bytes()], tokens),
    "npy": Parser(lambda folder: [npy_bytes(), torch_bytes({"a": 1})], matrix),
}


TEXT = st.text("ab01.=-+_/\\ \"'[]{}\n\0é\ud800", max_size=12)
"""From a few letters: all of Unicode takes hypothesis seconds to list."""
PATCHES = [b"\xff" * 8, b"\x80" + b"\0" * 7, b"-1", b'"', b"\0" * 4]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
EDITS = st.lists(
    st.tuples(
        st.integers(0, 1 << 16),
        st.sampled_from(["set", "cut", "drop", "insert", "double"]),
        st.binary(min_size=1, max_size=12) | st.sampled_from(PATCHES),
    ),
    max_size=4,
)


def edited(seed: bytes, edits: list[tuple[int, str, bytes]]) -> bytes:
    """A valid file with parts of it overwritten, cut off, deleted, inserted or doubled."""
    for place, kind, patch in edits:
        at = place % (len(seed) + 1)
        if kind == "set":
            seed = seed[:at] + patch + seed[at + len(patch) :]
        elif kind == "cut":
            seed = seed[:at]
        elif kind == "drop":
            seed = seed[:at] + seed[at + len(patch) * 8 :]
        else:
            seed = seed[:at] + (patch if kind == "insert" else seed[:at]) + seed[at:]
    return seed


def with_value(seed: bytes, key: int, value: object) -> bytes:
    """A JSON table with one of its values replaced; another file as it is."""
    try:
        table = json.loads(seed)
    except ValueError:
        return seed
    return json.dumps({**table, list(table)[key % len(table)]: value}).encode()


def hostile(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    good = st.sampled_from(seeds)
    return st.one_of(
        st.builds(edited, good, EDITS),
        st.builds(with_value, good, st.integers(0, 20), JSON),
        st.binary(max_size=300),
    )


@contextmanager
def time_limit() -> Iterator[None]:
    """A context that raises an AssertionError after TIMEOUT seconds."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still running after {TIMEOUT} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def error_of(attempt: Callable[[], object]) -> str:
    """Run `attempt`; return the message of the VqpipeError that it raises, or "" for a result."""
    try:
        with time_limit():
            attempt()
    except VqpipeError as error:
        return str(error)
    return ""


def fuzz(strategy: st.SearchStrategy[Any], attempt: Callable[[Any], object], examples: int) -> int:
    """Assert that `attempt` gives a result or a VqpipeError in one line on up to `examples` examples: the same in every
    fast run, new ones in every long run. Returns the number of examples."""
    count = 0

    @settings(
        max_examples=examples,
        derandomize=examples < 1000,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example: Any) -> None:
        nonlocal count
        count += 1
        assert "\n" not in error_of(lambda: attempt(example))

    run()
    return count


COUNTS = pytest.mark.parametrize("examples", [12, pytest.param(3000, marks=pytest.mark.slow)])


@COUNTS
@pytest.mark.parametrize("name", PARSERS)
def test_any_bytes_give_a_result_or_a_one_line_error(name: str, examples: int, folder: Path) -> None:
    parser = PARSERS[name]
    seeds = parser.seeds(folder)
    parser.parse(folder, seeds[0]) if name != "weights" else None
    assert fuzz(hostile(seeds), lambda data: parser.parse(folder, data), examples) >= examples


@COUNTS
def test_any_names_and_shapes_of_weights_give_a_result_or_a_one_line_error(examples: int, folder: Path) -> None:
    def attempt(shapes: dict[str, list[int]]) -> None:
        save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "x.safetensors")
        read_released(folder / "x.safetensors")

    shapes = st.lists(st.integers(0, 4), max_size=4)
    tables = st.dictionaries(st.sampled_from(NAMES), shapes, min_size=1, max_size=8)
    assert fuzz(tables, attempt, examples) >= examples


@COUNTS
def test_any_assignment_gives_a_result_or_a_one_line_error(examples: int) -> None:
    def attempt(text: str) -> None:
        configs.from_table(Preset, configs.override(Preset, {"model": {"kind": "vqgan"}}, [text]))

    keys = st.sampled_from(
        ["kmeans.k", "kmeans.tolerance", "data.crop", "model.kind", "model.quantizer.kind", "model.x.y"]
    )
    values = st.sampled_from(["1e999", "nan", "[1, [2]]", "{a = 1}", "9" * 5000, "[" * 3000, "vq", "''"]) | st.text()
    assignments = st.text(max_size=30) | st.builds("{}={}".format, keys, values)
    assert fuzz(assignments, attempt, examples) >= examples


# What fuzzing has found.


def header(size: bytes, kind: bytes = b"0", name: bytes = b"a.png") -> bytes:
    """A tar header whose size field is as given."""
    block = bytearray(tar_bytes(tarfile.GNU_FORMAT)[:512])
    block[:100] = name.ljust(100, b"\0")
    block[124:136] = size
    block[156:157] = kind
    return resealed(bytes(block))


@pytest.mark.parametrize("known", [None, "known"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(header(b"\xff" * 10 + b"\xfc\x00"), "impossible size", id="negative size: an endless loop"),
        pytest.param(header(b"\x80" + b"\x7f" * 11), "impossible size", id="a size beyond 64 bits"),
        pytest.param(header(b"00017777777\0", b"L"), "header of 4,194,304 bytes", id="a name of 4 MB"),
        pytest.param(header(b"00017777777\0", name=b"a.cls"), "is truncated", id="a label of 4 MB is not read"),
        pytest.param(
            header(b"00000000015\0", b"x") + b"13 size=-512\n".ljust(512, b"\0") + header(b"00000000000\0"),
            "impossible size",
            id="a negative size in a pax header",
        ),
        pytest.param(
            header(b"00000000011\0", b"x") + b"0 size=1\n".ljust(512, b"\0"),
            "has no tar header",
            id="a record of no length",
        ),
    ],
)
def test_wrong_sizes_in_tar_headers_are_an_error(data: bytes, message: str, known: str | None) -> None:
    with pytest.raises(DataError, match=message):
        index_tar(io.BytesIO(data + bytes(2048)), "s.tar", known)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"[" * 100_000, id="nested beyond the recursion limit"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'{"schema": 1e999}', id="an infinite schema"),
        pytest.param(b"\xff", id="not UTF-8"),
    ],
)
def test_bytes_that_are_not_a_manifest_are_an_error(data: bytes, folder: Path) -> None:
    with pytest.raises(VqpipeError, match=r"is damaged|has schema"):
        manifest(folder, data)


@pytest.mark.parametrize(
    ("key", "value"),
    [("config", []), ("provenance", "x"), ("inputs", 3), ("facts", None), ("content", {}), ("files", {"n" * 300: {}})],
)
def test_manifest_values_of_wrong_types_are_an_error(key: str, value: object, folder: Path) -> None:
    table = {**json.loads((folder / "manifest.seed").read_bytes()), key: value}
    with pytest.raises(VqpipeError, match="is damaged"):
        manifest(folder, json.dumps(table).encode())


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[kmeans]\nk = " + "9" * 5000, id="a number of 5,000 digits"),
        pytest.param("x = " + "[" * 5000, id="lists nested beyond the recursion limit"),
        pytest.param("[kmeans]\ntolerance = nan", id="not a number"),
        pytest.param("[kmeans]\ntolerance = inf", id="infinity"),
        pytest.param("[kmeans]\ntolerance = " + "9" * 400, id="an integer beyond floats"),
    ],
)
def test_invalid_preset_values_are_an_error(text: str, folder: Path) -> None:
    with pytest.raises(ConfigError):
        toml(folder, text.encode())


KEY, LABEL = pa.array(["a"]), pa.array([1], pa.int32())
IDS = pa.FixedSizeListArray.from_arrays(pa.array([1, 2], pa.uint16()), 2)
SHARDS: dict[str, dict[str, pa.Array]] = {
    "ids that are numbers": {"ids": pa.array([1], pa.uint16())},
    "ids of any length": {"ids": pa.array([[1, 2]], pa.list_(pa.uint16()))},
    "ids below zero": {"ids": pa.FixedSizeListArray.from_arrays(pa.array([-1, 2], pa.int32()), 2)},
    "an id that is missing": {"ids": pa.FixedSizeListArray.from_arrays(pa.array([None, 2], pa.uint16()), 2)},
    "no ids at all": {"ids": pa.array([None], pa.list_(pa.uint16(), 2))},
    "a key that is missing": {"key": pa.array([None], pa.string())},
    "a key that is a number": {"key": pa.array([7])},
    "a label that is a word": {"label": pa.array(["cat"])},
    "a column more": {"another": LABEL},
    "flipped as a word": {"flipped": pa.array(["no"])},
}


@pytest.mark.parametrize("name", SHARDS)
def test_token_shards_with_wrong_columns_are_an_error(name: str, tmp_path: Path) -> None:
    columns = {"key": KEY, "label": LABEL, "ids": IDS}
    parquet.write_table(pa.table(columns), tmp_path / "good.parquet")
    assert read_tokens(tmp_path / "good.parquet", 3).ids.tolist() == [[1, 2]]
    parquet.write_table(pa.table(columns | SHARDS[name]), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match="is not a token shard"):
        read_tokens(tmp_path / "bad.parquet", 3)


def test_zip_file_named_npy_is_an_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(DataError, match=r"is not a \.npy array"):
        open_matrix(tmp_path / "x.npy")
