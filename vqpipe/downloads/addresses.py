"""Addresses of remote files: hf:OWNER/NAME/FILE[@REVISION], and http:// and https:// URLs."""

import re
import urllib.parse
from dataclasses import dataclass
from pathlib import PurePosixPath

from vqpipe.errors import ConfigError
from vqpipe.provenance import without_secrets

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
        repository, revision, path = found[1], *map(urllib.parse.unquote, found.groups()[1:])
        return hub_file(text, f"{repository}/{path}", "" if revision == "main" else revision)
    if text.lower().startswith(("http://", "https://")):
        try:
            parts = urllib.parse.urlsplit(text)
            usable = parts.hostname and parts.port != 0 and not re.search(r"\s", parts.netloc)
        except ValueError:  # no such port, or brackets that hold no address
            usable = False
        if not usable:
            raise ConfigError(f"{without_secrets(text)} is not a URL", "Write https://HOST/PATH")
        if "@" in parts.netloc:
            raise ConfigError(f"{Url(text)} was given with a password", "Download the file, and pass its path")
        return Url(text)
    if not text.startswith(HUB):
        return None
    path, _, revision = text.removeprefix(HUB).partition("@")
    return hub_file(text, path, revision)


def hub_file(text: str, path: str, revision: str) -> HubFile:
    """The file OWNER/NAME/FILE of the hub, which `text` names; of the default revision if that is empty."""
    parts = path.split("/")
    if len(parts) < 3 or not all(parts) or ".." in parts:
        raise ConfigError(f"{text} does not name a file of a repository", "Write hf:OWNER/NAME/FILE, or ...@REVISION")
    return HubFile("/".join(parts[:2]), "/".join(parts[2:]), revision or None)


def check_repository(name: str) -> str:
    """The name of a repository to upload to; a ConfigError unless it is OWNER/NAME."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        raise ConfigError(f"{name!r} is not the name of a repository", "Write OWNER/NAME, without spaces")
    return name


def split_repository(text: str) -> tuple[str, str | None]:
    """`OWNER/NAME@REVISION`, with or without "hf:", -> OWNER/NAME and the revision, if there is one."""
    repository, _, revision = text.removeprefix(HUB).partition("@")
    return repository, revision or None
