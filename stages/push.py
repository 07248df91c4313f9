"""`vqpipe push`: upload a tokenizer to the model hub, with a model card."""

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages import console, options
from vqpipe.downloads import check_repository
from vqpipe.errors import ConfigError

if TYPE_CHECKING:
    from vqpipe.tokenizer import Tokenizer


def push(
    tokenizer: Annotated[Path, typer.Argument(help="A tokenizer artifact.", metavar="TOKENIZER")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if it is absent.", metavar="REPO")],
    report: Annotated[
        Path | None, typer.Option("--report", help="Its report of vqpipe eval, for the card.", metavar="DIR")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--licence", "--license", help="Licence of the weights, such as apache-2.0.", metavar="NAME"),
    ] = None,
    datasets: Annotated[
        list[str] | None,
        typer.Option("--dataset", help="A data set of the training, as the hub calls it; repeatable.", metavar="NAME"),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private; refuse a public one.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the files and the card, and upload nothing.")
    ] = False,
) -> None:
    """Upload a tokenizer to the model hub.

    The weights, their config and a model card are uploaded; with --report, the card
    has its numbers with their protocol. Log in first, by `hf auth login` or HF_TOKEN.
    Others then pass hf:OWNER/NAME, or hf:OWNER/NAME@REVISION, as a tokenizer.
    """
    repository = check_repository(repository.removeprefix("hf:"))
    options.check_artifacts(tokenizer, report)  # before PyTorch is loaded
    with console.session("cpu", 0):
        from stages.next_steps import beside
        from vqpipe import zoo
        from vqpipe.artifacts import open_artifact
        from vqpipe.reports.model_card import metrics_section
        from vqpipe.tokenizer import Tokenizer

        opened = Tokenizer.from_pretrained(tokenizer)
        facts = {} if opened.artifact is None else opened.artifact.facts
        if licence is None:
            licence = str(facts.get("licence", ""))
            if licence == zoo.NOT_STATED and not (private or dry_run):
                raise ConfigError(
                    f"{tokenizer} was imported from {facts.get('zoo')}, whose authors state no licence",
                    "Ask them; then pass --licence NAME, or --private",
                )
            licence = "" if licence == zoo.NOT_STATED else licence
        metrics = "" if report is None else metrics_section(open_artifact(report, "report"), opened.source)
        card = opened.hub_card(repository, licence=licence, metrics=metrics, datasets=datasets or ())
        if dry_run:
            for name, size in uploaded_files(opened, card).items():
                console.say(f"{name}: {size:,} bytes")
            print(card, end="", flush=True)
            return
        if not licence:
            console.say("the card states no licence: pass --licence to state one")
        address = opened.push_to_hub(repository, private=private, card=card)
        report_path = shlex.quote(str(beside(tokenizer, "report")))
        console.say(f"next: vqpipe eval --tokenizer hf:{repository} --images builtin:photos --out {report_path}")
        print(address, flush=True)


def uploaded_files(tokenizer: "Tokenizer", card: str) -> dict[str, int]:
    """The files that are uploaded with this card, and their sizes in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        sizes = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}
    return sizes | {"README.md": len(card.encode())}
