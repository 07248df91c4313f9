"""`vqpipe import-checkpoint`: released weights -> tokenizer."""

import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console, options
from stages.options import UnusedDevice, UnusedSeed
from vqpipe import downloads, zoo
from vqpipe.config import nearest_name
from vqpipe.downloads import Address
from vqpipe.errors import ConfigError, WeightsError
from vqpipe.files import hash_file
from vqpipe.progress import Progress
from vqpipe.zoo import Entry, fetch

if TYPE_CHECKING:
    from vqpipe.artifacts import Artifact

Source = Annotated[
    str,
    typer.Argument(
        help="A name of `vqpipe zoo`, hf:OWNER/NAME/FILE@REVISION, a URL, or a file of released weights, PyTorch or"
        " safetensors.",
        metavar="NAME|hf:...|URL|FILE",
    ),
]
OptionalOut = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="The artifact to publish; never overwritten. Required without --dry-run.",
        metavar="DIR",
        callback=lambda path: None if path is None else options.out_path(path),
    ),
]
FamilyName = Annotated[
    str | None,
    typer.Option(
        "--family",
        help="vqgan-lc, mgvq, llamagen, var, taming, ibq, open-magvit2, wetok, bitdance, simvq (also DimVQ), fvq, gsq,"
        " unitok or auto, to detect it from names and shapes of tensors. An ibq file without moving averages looks like"
        " a taming file.",
        metavar="NAME",
    ),
]
Codebook = Annotated[
    Path | None,
    typer.Option("--codebook", help="The codebook, if the file does not contain it.", metavar="DIR|FILE"),
]
OwnFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--file",
        help="With a name of `vqpipe zoo`: your copy of its file, instead of a download; repeatable.",
        metavar="FILE",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be downloaded, and its licence; needs no network.")
]


def import_checkpoint(
    source: Source,
    out: OptionalOut = None,
    family: FamilyName = None,
    codebook: Codebook = None,
    own_files: OwnFiles = None,
    dry_run: DryRun = False,
    device: UnusedDevice = "auto",
    seed: UnusedSeed = 0,
) -> None:
    """Convert released weights to a tokenizer.

    A name of `vqpipe zoo`, an address on the model hub or a URL is downloaded once,
    into the cache of the hub or $XDG_CACHE_HOME/vqpipe, and checked by its sha256
    where that is known. Autoencoders with continuous latents (sd-vae, sdxl-vae,
    taef2) become a directory for `vqpipe eval --tokenizer`.

    No code in the file is executed. Every weight in it must have a place in the model.
    """
    family = None if family == "auto" else family
    wanted = recognize(str(source), own_files or [])
    check_options(wanted, family, codebook)
    if dry_run:
        print(describe(wanted, own_files or [], family), flush=True)
        return None
    if out is None:
        raise typer.BadParameter("it is required without --dry-run", param_hint="--out")
    with console.session("cpu", seed):
        from vqpipe import artifacts, distributed
        from vqpipe.codebooks.codebook import codebook_input, load_codebook
        from vqpipe.continuous import KINDS
        from vqpipe.models.released import read_released
        from vqpipe.tokenizer_files import model_facts, write_tokenizer

        if (done := published_before(wanted, out, family, codebook)) is not None:
            return console.finished(done, again=True)
        with console.ProgressBar() as progress:
            checkpoint = obtain(wanted, own_files or [], out, family, progress)
        console.say(*checkpoint.lines)
        if checkpoint.family in KINDS:
            return import_continuous(checkpoint, out)
        file, digest = checkpoint.paths[0], checkpoint.digests[0]
        inputs: dict[str, artifacts.Input | str] = {"checkpoint": digest}
        if codebook is not None:
            inputs["codebook"] = codebook_input(codebook)
        family = family or checkpoint.family
        draft = artifacts.start(out, "tokenizer", {"family": family, **checkpoint.request}, inputs)
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            released = read_released(file, family, None if codebook is None else load_codebook(codebook))
            console.say(*released.notes)
            if distributed.is_main():
                rows = {"family": released.family, "imported from": file.name, "sha256": digest, **checkpoint.facts}
                if released.notes:
                    rows["notes"] = "; ".join(released.notes)
                write_tokenizer(draft, released.autoencoder, released.image_size, released.discriminator, **rows)
            facts = {"family": released.family, **model_facts(released.autoencoder), **checkpoint.facts}
            published = draft.publish(facts)
        return console.finished(published)


@dataclass(frozen=True)
class Checkpoint:
    """The files of released weights on this machine, and what is known about them."""

    paths: list[Path]
    digests: list[str]
    """The sha256 of each."""
    family: str | None = None
    request: dict[str, str] = field(default_factory=dict)
    """What the request of the artifact holds besides the family and the hashes."""
    facts: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    """For the user."""


def recognize(source: str, own_files: Sequence[Path]) -> Path | Address | Entry:
    """What the argument of the command names: a file, a remote file, or an entry of the zoo.

    Raises:
        WeightsError: nothing of these, or an entry that cannot be imported.
    """
    path = Path(source)
    entry = zoo.get(source)
    if own_files and entry is None:
        raise ConfigError(f"--file was given, but {source} is no name of vqpipe zoo", "Pass the file in its place")
    if path.is_file() and not own_files:
        return path
    if entry is not None:
        return entry
    address = downloads.parse(source)
    if address is not None:
        return address
    if path.is_dir():
        from vqpipe.artifacts import is_artifact

        if is_artifact(path):
            raise WeightsError(f"{source} is a vqpipe artifact, not a file of weights", "It needs no import")
        raise WeightsError(f"{source} is a folder", "Name the file of weights in it")
    hint = "Pass the released file of weights, a name of vqpipe zoo, hf:OWNER/NAME/FILE or a URL"
    if re.fullmatch(r"[\w-]+", source):
        hint = nearest_name(source, [known.name for known in zoo.entries()])
        hint = hint if hint.endswith("?") else "Pass a file of weights, or a name that vqpipe zoo lists"
    raise WeightsError(f"{source} is neither a file nor a name of vqpipe zoo", hint)


def check_options(wanted: Path | Address | Entry, family: str | None, codebook: Path | None) -> None:
    """Raise a ConfigError for options that the import cannot use, before a download."""
    if family is None and codebook is None:
        return
    from vqpipe.continuous import KINDS
    from vqpipe.models.released import check_family

    if isinstance(wanted, Entry) and wanted.family in KINDS:
        raise ConfigError(f"{wanted.name} is imported without --family and --codebook", "Leave them out")
    check_family(family)


def published_before(
    wanted: Path | Address | Entry, out: Path, family: str | None, codebook: Path | None
) -> "Artifact | None":
    """The artifact `out`, if it was imported from this entry, whose hash is known: the file is not needed again.

    Raises:
        ArtifactError: `out` is there, and is something else.
    """
    from vqpipe import artifacts
    from vqpipe.codebooks.codebook import codebook_input
    from vqpipe.continuous import KINDS

    if not isinstance(wanted, Entry) or wanted.family in KINDS or not out.exists():
        return None
    hashes = [file.sha256 for file in wanted.files]
    if len(hashes) != 1 or not hashes[0]:
        return None
    inputs: dict[str, artifacts.Input | str] = {"checkpoint": hashes[0]}
    if codebook is not None:
        inputs["codebook"] = codebook_input(codebook)
    found = artifacts.start(out, "tokenizer", {"family": family or wanted.family, "zoo": wanted.name}, inputs)
    return found if isinstance(found, artifacts.Artifact) else None


def obtain(
    wanted: Path | Address | Entry, own_files: Sequence[Path], out: Path, family: str | None, progress: Progress
) -> Checkpoint:
    """The files on this machine, downloaded by rank 0 if they have to be. Every rank calls it."""
    from vqpipe import distributed

    if isinstance(wanted, Path):
        return Checkpoint([wanted], [hash_file(wanted)])
    if not isinstance(wanted, Entry):
        words = ["vqpipe", "import-checkpoint", Path(wanted.path).name, "--out", str(out)]
        words += ["--family", family] if family else []
        hint = f"Run `{shlex.join(words)}` after downloading the file from {wanted.page} in a browser"
        found = Path(distributed.on_main(lambda: str(downloads.fetch(wanted, hint, progress=progress))))
        digest = hash_file(found)
        lines = [f"sha256 {digest}, not checked: none is known for it", f"licence: see {wanted.page}"]
        return Checkpoint([found], [digest], facts={"source": origin(wanted, found)}, lines=lines)
    entry = wanted
    if entry.refused:
        raise WeightsError(f"{entry.name} cannot be imported: {entry.refused}", f"Its page is {entry.page}")

    def get() -> list[str]:
        paths = fetch.check_own_files(entry, own_files) if own_files else fetch.fetch(entry, out, progress)
        return [str(path) for path in paths]

    paths = [Path(path) for path in distributed.on_main(get)]
    where = entry.page if own_files else origin(fetch.address(entry.files[-1]), paths[-1])
    facts = {"zoo": entry.name, "source": where, "licence": entry.licence}
    known = [file.sha256 for file in entry.files] or [""]  # those of the files that were found: they are checked
    digests = [sha256 or hash_file(path) for sha256, path in zip(known, paths, strict=True)]
    lines = [
        f"{path.name}: sha256 {digest}, not checked: none is known for it"
        for path, digest, sha256 in zip(paths, digests, known, strict=True)
        if not sha256
    ]
    return Checkpoint(paths, digests, entry.family, {"zoo": entry.name}, facts, [*lines, f"licence: {licence(entry)}"])


def origin(address: Address, path: Path) -> str:
    """The address of a downloaded file, with the commit of its repository."""
    commit = downloads.commit_of(path)
    if not isinstance(address, downloads.HubFile) or commit is None:
        return str(address)
    return str(downloads.HubFile(address.repository, address.path, commit))


def licence(entry: Entry) -> str:
    """The licence of an entry, for the user."""
    if entry.licence == zoo.NOT_STATED:
        return f"{entry.licence} at {entry.page}: ask its authors before you use or share it"
    return f"{entry.licence} ({entry.page})"


def import_continuous(checkpoint: Checkpoint, out: Path) -> None:
    """Publish an autoencoder with continuous latents in the layout of diffusers."""
    from vqpipe import artifacts, distributed
    from vqpipe.continuous import ContinuousAutoencoder, write_continuous

    inputs = {path.name: digest for path, digest in zip(checkpoint.paths, checkpoint.digests, strict=True)}
    draft = artifacts.start(out, "autoencoder", {"family": checkpoint.family, **checkpoint.request}, inputs)
    if isinstance(draft, artifacts.Artifact):
        return console.finished(draft, again=True)
    with draft:
        with tempfile.TemporaryDirectory() as together:
            for path in checkpoint.paths:
                (Path(together) / path.name).symlink_to(path.absolute())
            autoencoder = ContinuousAutoencoder.from_pretrained(together)
        if distributed.is_main():
            write_continuous(draft, autoencoder, {**checkpoint.facts, **inputs})
        facts: dict[str, Any] = {"family": checkpoint.family, "downsample_factor": autoencoder.downsample_factor}
        published = draft.publish({**facts, **checkpoint.facts})
    return console.finished(published)


def describe(wanted: Path | Address | Entry, own_files: Sequence[Path], family: str | None) -> str:
    """What an import would read, from where, how large it is, and its licence."""
    if isinstance(wanted, Path):
        return describe_own(wanted)
    if not isinstance(wanted, Entry):
        lines = [f"{wanted}: {place(wanted)}", "size: not known before the download", f"licence: see {wanted.page}"]
        return "\n".join([*lines, f"family: {family or 'found out from the file'}"])
    entry = wanted
    lines = [f"{entry.name}: {entry.title}. {entry.paper}", f"licence: {licence(entry)}"]
    if own_files and not entry.refused:
        lines += map(describe_own, fetch.check_own_files(entry, own_files))
        return "\n".join([*lines, f"family: {family or entry.family}"])
    for file in entry.files:
        about = "size unknown" if file.size is None else f"{'about ' * file.size_is_rounded}{file.size:,} bytes"
        lines.append(f"file: {file.name}, {about}, sha256 {file.sha256 or 'unknown: printed after the download'}")
        if file.sha256_of:
            lines.append(f"  the sha256 was read from {file.sha256_of}")
        if file.source:
            lines.append(f"  from {file.source}: {place(fetch.address(file))}")
    if entry.notes:
        lines.append(f"note: {entry.notes}")
    if entry.refused:
        lines.append(f"cannot be imported: {entry.refused}")
    elif not entry.files or not all(file.source for file in entry.files):
        lines.append(f"cannot be downloaded by a program. {fetch.by_hand(entry, None)}")
    else:
        lines.append(f"family: {family or entry.family}")
    return "\n".join(lines)


def describe_own(path: Path) -> str:
    """The size of a file that the user has."""
    return f"{path}: {path.stat().st_size:,} bytes, on this machine; nothing is downloaded"


def place(address: Address) -> str:
    """Whether a remote file is in the cache, and where, or where it would be downloaded from."""
    found = downloads.cached(address)
    return f"in the cache as {found}" if found else f"would be downloaded from {downloads.server(address)}"
