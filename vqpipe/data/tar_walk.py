"""A tar file, walked strictly forward from its first byte to its last.

The format is read here, not by `tarfile`: that module ends silently at a damaged or missing header, so a shard cut at a
member's boundary reads as a shorter shard. Here every byte of a shard is accounted for, up to its end mark.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from vqpipe.errors import DataError

BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 20
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
COPY_AGAIN = "Copy or download it again"
LONGEST_TEXT = 1 << 20
"""Bytes of a long name, a pax header or a label: what is read into memory whole."""
LARGEST_MEMBER = 1 << 43
"""8 TiB; the format's numbers go to 2**88, and below zero."""


@dataclass(frozen=True)
class Member:
    path: str
    offset: int
    size: int
    refused: str = ""
    """Why it is not looked into: "link", "device"."""


class Walk:
    """Reads a tar strictly forward, hashing on its way, and yields its members."""

    def __init__(self, file: BinaryIO, name: str, hashed: bool) -> None:
        self.file, self.name, self.hashed = file, name, hashed
        self.hash = hashlib.sha256()
        self.position = 0
        self.pending = 0  # bytes of the current member's data not yet passed

    def members(self) -> Iterator[Member]:
        """Every member in order, its long name resolved; a DataError at the first byte that is not a tar's."""
        long_path, pax = "", dict[str, str]()
        while (header := self.header()) is not None:
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                body = self.text(header).rstrip(b"\0").decode("utf-8", "backslashreplace")
                long_path = body if header.type == tarfile.GNUTYPE_LONGNAME else long_path
                continue
            if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
                body_bytes = self.text(header)
                pax = parse_pax(self.name, body_bytes) if header.type != tarfile.XGLTYPE else pax
                continue
            path = pax.get("path") or long_path or header.name
            if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in pax):
                raise DataError(f"{self.name}: {path} is a sparse member", "Pack the shard without --sparse")
            size = self.size_of(header, pax.get("size"))
            if header.isreg():
                self.pending = -(-size // BLOCK) * BLOCK
                yield Member(path, self.position, size)
                self.skip(self.pending)
                self.pending = 0
            elif not header.isdir():
                yield Member(path, self.position, 0, "link" if header.issym() or header.islnk() else "device")
            long_path, pax = "", {}

    def text(self, header: tarfile.TarInfo) -> bytes:
        """The data of a header that is itself a text."""
        size = self.size_of(header)
        if size > LONGEST_TEXT:
            raise DataError(f"{self.name} has a header of {size:,} bytes before byte {self.position}", COPY_AGAIN)
        return self.read(-(-size // BLOCK) * BLOCK)[:size]

    def size_of(self, header: tarfile.TarInfo, said: str | None = None) -> int:
        """How many bytes follow a header; `said` by the pax header before it, if by any."""
        size = header.size if said is None else int(said) if said.isascii() and said.isdigit() else -1
        if not 0 <= size <= LARGEST_MEMBER:
            raise DataError(f"{self.name} has a member of impossible size before byte {self.position}", COPY_AGAIN)
        return size

    def body(self, member: Member) -> bytes:
        """The data of the member just yielded, which holds a text."""
        if member.size > LONGEST_TEXT:
            raise DataError(f"{self.name}: {member.path} has {member.size:,} bytes and is to be a text", COPY_AGAIN)
        data = self.read(self.pending)[: member.size]
        self.pending = 0
        return data

    def header(self) -> tarfile.TarInfo | None:
        """The next header; None at the archive's end mark, after which only padding may follow."""
        start = self.position
        block = self.file.read(BLOCK)
        if start == 0:
            for magic, kind in COMPRESSED.items():
                if block.startswith(magic):
                    raise DataError(
                        f"{self.name} is compressed with {kind}", "Uncompress it: images do not shrink again"
                    )
        self.advance(block)
        if not block:
            what = "is empty" if start == 0 else f"is cut short: no end mark at byte {start}"
            raise DataError(f"{self.name} {what}", COPY_AGAIN)
        if len(block) < BLOCK:
            raise DataError(f"{self.name} is cut short inside the header at byte {start}", COPY_AGAIN)
        if not any(block):
            if any(self.read(BLOCK)):
                raise DataError(f"{self.name} is damaged: half an end mark at byte {start}", COPY_AGAIN)
            while rest := self.file.read(CHUNK):
                if rest.count(0) != len(rest):
                    raise DataError(
                        f"{self.name} goes on after its end mark at byte {start}", "Two tars joined? Give them apart"
                    )
                self.advance(rest)
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            raise DataError(f"{self.name} has no tar header at byte {start}: {error}", COPY_AGAIN) from None

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.advance(data)
        if len(data) < size:
            raise DataError(f"{self.name} is cut short at byte {self.position}", COPY_AGAIN)
        return data

    def skip(self, size: int) -> None:
        if self.hashed:
            for start in range(0, size, CHUNK):
                self.read(min(CHUNK, size - start))
        elif size:
            self.file.seek(size - 1, os.SEEK_CUR)
            self.position += size - 1
            self.read(1)

    def advance(self, data: bytes) -> None:
        self.position += len(data)
        if self.hashed:
            self.hash.update(data)


def parse_pax(name: str, body: bytes) -> dict[str, str]:
    """A pax header's records, each `LENGTH KEY=VALUE\\n` with its own length in decimal."""
    records, position = dict[str, str](), 0
    try:
        while position < len(body):
            length = int(body[position : body.index(b" ", position)])
            record = body[position : position + length]
            if length < 1 or len(record) < length:
                raise ValueError(length)
            key, _, value = record.partition(b" ")[2].rstrip(b"\n").partition(b"=")
            records[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
            position += length
    except ValueError:
        raise DataError(f"{name} has a damaged pax header", COPY_AGAIN) from None
    return records
