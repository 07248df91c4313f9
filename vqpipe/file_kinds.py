"""What a file is, by its first bytes, so that a message can say what was given in place of images or weights."""

import re
import shlex
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

HEAD = 1024
"""Bytes that `kind_of` needs; fewer where the file is shorter."""
NAMES = {
    "empty": "an empty file",
    "tar": "a tar",
    "parquet": "a Parquet file",
    "zip": "a zip archive",
    "gzip": "compressed with gzip",
    "bzip2": "compressed with bzip2",
    "xz": "compressed with xz",
    "zstd": "compressed with zstd",
    "npy": "a NumPy array (npy)",
    "npz": "an archive of NumPy arrays (npz)",
    "safetensors": "a safetensors file",
    "pytorch": "a PyTorch checkpoint",
    "torchscript": "a TorchScript archive",
    "pickle": "a Python pickle",
    "html": "an HTML page",
    "xml": "an XML document",
    "lfs": "a Git LFS pointer",
    "json": "a JSON file",
    "text": "a text file",
    "pdf": "a PDF document",
    "hdf5": "an HDF5 file",
    "image": "one image",
    "unknown": "a file of an unknown kind",
}
"""Kind -> what the file is, after "is"."""
MAGIC = (
    (b"PAR1", "parquet"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x93NUMPY", "npy"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"%PDF-", "pdf"),
    (b"version https://git-lfs.github.com/spec/", "lfs"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),  # without members
    (b"PK\x07\x08", "zip"),  # split
    (b"\xff\xd8\xff", "image"),
    (b"\x89PNG\r\n\x1a\n", "image"),
    (b"GIF8", "image"),
    (b"II*\0", "image"),
    (b"MM\0*", "image"),
    (b"\0\0\0\x0cjP  ", "image"),
)
"""First bytes -> kind."""
TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The number at the start of a PyTorch checkpoint that is no zip, after the two bytes of the pickle protocol."""
UNPACK = {
    "gzip": ("gunzip", (".gz", ".tgz")),
    "bzip2": ("bunzip2", (".bz2", ".tbz2", ".tbz", ".bz")),
    "xz": ("unxz", (".xz", ".txz")),
    "zstd": ("unzstd", (".zst", ".tzst")),
}
"""Kind -> the command that unpacks it, and the extensions that the command knows."""


def kind_of(head: bytes) -> str:
    """The kind of a file, one of NAMES, from its first HEAD bytes.

    A zip is told apart by its first member only; see `kind_of_file`.
    """
    if not head:
        return "empty"
    if is_tar(head[: tarfile.BLOCKSIZE]):
        return "tar"
    for magic, kind in MAGIC:
        if head.startswith(magic):
            return kind_of_zip([first_member(head)]) if kind == "zip" else kind
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    if (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1"):
        return "image"
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":
        return "image"
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        return "pytorch" if head[2:].startswith(TORCH_MAGIC) else "pickle"
    return kind_of_text(head)


def is_tar(block: bytes) -> bool:
    """Whether this block is the header of a tar's member, with the right checksum."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return False
    return True


def first_member(head: bytes) -> str:
    """The name of the first member of a zip."""
    return head[30 : 30 + int.from_bytes(head[26:28], "little")].decode("utf-8", "replace")


def kind_of_zip(members: list[str]) -> str:
    """The kind of a zip from the names of its members."""
    if any(name.endswith("/constants.pkl") for name in members) and any("/code/" in name for name in members):
        return "torchscript"
    if any(name.endswith(("/data.pkl", "/data/0")) for name in members):
        return "pytorch"
    return "npz" if members and all(name.endswith(".npy") for name in members) else "zip"


def kind_of_text(head: bytes) -> str:
    """The kind of a file that may be a text."""
    text = head.decode("utf-8", "replace").removeprefix("\ufeff").lstrip()
    if "\0" in text or text.rstrip("\ufffd").count("\ufffd") > len(text) // 10:
        return "unknown"
    if re.search(r"[\x01-\x08\x0e-\x1a\x1c-\x1f]", text):
        return "unknown"
    lower = text.lower()
    if "<html" in lower or lower.startswith(("<!doctype html", "<head", "<script", "<body")):
        return "html"
    if lower.startswith("<?xml"):
        return "xml"
    return "json" if text.startswith(("{", "[")) else "text"


def kind_of_file(path: Path) -> str:
    """The kind of a local file, one of NAMES. An OSError where it cannot be read."""
    with path.open("rb") as file:
        kind = kind_of(file.read(HEAD))
        if kind in ("zip", "npz", "pytorch"):
            with suppress(Exception), zipfile.ZipFile(file) as archive:  # of many types, where the zip is damaged
                return kind_of_zip(archive.namelist())
    return kind


def explain(name: str, kind: str, wanted: str, hint: str) -> tuple[str, str]:
    """What to say of a file that is not `wanted`, and what to do; `hint` where the kind itself has no remedy."""
    if kind in ("html", "xml"):
        return f"{name} is {NAMES[kind]}, not {wanted}: the download failed, perhaps a login page", "Download it again"
    if kind == "lfs":
        return f"{name} is {NAMES[kind]}, not {wanted}", "Run `git lfs pull` in its repository"
    if kind in UNPACK:
        where = "where it is stored" if "://" in name else f"first: `{unpack_command(name, kind)}`"
        return f"{name} is {NAMES[kind]}", f"Unpack it {where}"
    if kind == "empty":
        return f"{name} is empty", "Copy or download it again"
    return f"{name} is {NAMES[kind]}, not {wanted}", hint


def unpack_command(name: str, kind: str) -> str:
    """The command that unpacks a compressed file and keeps it."""
    command, extensions = UNPACK[kind]
    if name.lower().endswith(extensions):
        return f"{command} -k {shlex.quote(name)}"
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.rpartition(".")
    target = f"{folder}{slash}{stem}-unpacked{dot}{extension}" if dot else f"{name}-unpacked"
    return f"{command} < {shlex.quote(name)} > {shlex.quote(target)}"
