"""Addresses of remote files: hf:OWNER/NAME/FILE[@REVISION], and http:// and https:// URLs."""

import re
import urllib.parse
from dataclasses import dataclass
from pathlib import PurePosixPath

from vqpipe.errors import ConfigError

HUB = "hf:"
FILE_PAGE = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/(?:resolve|blob)/([^/?#]+)/([^?#]+)")
"""The address of a file on the web pages of the hub: repository, revision, path."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository of the model hub."""

    repository: str
    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{HUB}{self.repository}/{self.path}" + (f"@{self.revision}" if self.revision else "")

    @property
    def page(self) -> str:
        """The web page of the repository."""
        return f"https://huggingface.co/{self.repository}"


@dataclass(frozen=True)
class Url:
    """A file of a web server."""

    address: str

    def __str__(self) -> str:
        """The address without password and query, which may be secret."""
        parts = urllib.parse.urlsplit(self.address)
        return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    @property
    def page(self) -> str:
        """The address, to open in a browser."""
        return str(self)

    @property
    def path(self) -> str:
        """The name of the file: the end of the address, without characters that are special in paths."""
        name = PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(self.address).path)).name
        return re.sub(r"[^\w.+-]", "_", name).lstrip(".")[-200:] or "download"


Address = HubFile | Url


def parse(text: str) -> Address | None:
    """The address of a remote file; None if `text` is not one.

    Raises:
        ConfigError: it begins like one, but has no repository or no file.
    """
    if found := FILE_PAGE.fullmatch(text.partition("?")[0]):
        revision = urllib.parse.unquote(found[2])
        return HubFile(found[1], urllib.parse.unquote(found[3]), None if revision == "main" else revision)
    if text.startswith(("http://", "https://")):
        if not urllib.parse.urlsplit(text).hostname:
            raise ConfigError(f"{text} has no host", "Write https://HOST/PATH")
        if "@" in urllib.parse.urlsplit(text).netloc:
            raise ConfigError(f"{Url(text)} was given with a password", "Download the file, and pass its path")
        return Url(text)
    if not text.startswith(HUB):
        return None
    path, _, revision = text.removeprefix(HUB).partition("@")
    parts = path.split("/")
    if len(parts) < 3 or not all(parts) or ".." in parts:
        raise ConfigError(f"{text} does not name a file of a repository", "Write hf:OWNER/NAME/FILE, or ...@REVISION")
    return HubFile("/".join(parts[:2]), "/".join(parts[2:]), revision or None)


def split_repository(text: str) -> tuple[str, str | None]:
    """`OWNER/NAME@REVISION`, with or without "hf:", -> OWNER/NAME and the revision, if there is one."""
    repository, _, revision = text.removeprefix(HUB).partition("@")
    return repository, revision or None
