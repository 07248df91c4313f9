"""The numbers of a report as Markdown, for the model card of its tokenizer."""

from vqpipe.artifacts import Artifact, Input
from vqpipe.errors import ArtifactError
from vqpipe.model_card import cell
from vqpipe.reports.evaluation import by_protocol, input_of, name_of, number_rows, size_in_words
from vqpipe.words import counted


def metrics_section(report: Artifact, tokenizer: Input | str) -> str:
    """A table of measures for each protocol of a report, with the images, the reference and what was not computed.

    Args:
        tokenizer: `Tokenizer.source` of the tokenizer that the report must be of.

    Raises:
        ArtifactError: the report is not of `eval`, or of another tokenizer.
    """
    metrics = report.read_json("metrics.json")
    if "protocol" not in metrics or "rfid" not in metrics:
        raise ArtifactError(f"{report.path} is not a report of vqpipe eval", "Pass a report that vqpipe eval made")
    own = tokenizer if isinstance(tokenizer, str) else tokenizer.digest
    if report.inputs.get("tokenizer") != own:
        made_by = str(report.inputs.get("tokenizer"))[:12]
        raise ArtifactError(
            f"{report.path} measures tokenizer {made_by}, not {own[:12]}", "Run vqpipe eval with this tokenizer"
        )
    images = input_of(report.lineage, "images")
    parts = []
    for table in by_protocol(metrics):
        rows = [f"| {cell(label)} | {value} | {cell(convention)} |" for label, value, convention in number_rows(table)]
        parts.append(
            f"Protocol `{table['protocol']}`: {counted(metrics['num_images'], 'images')} of {size_in_words(metrics)}, "
            f"{cell(images.get('name') or 'images')} `{str(images.get('content', ''))[:12]}`.\n\n"
            + "\n".join(["| measure | value | convention |", "|---|---:|---|", *rows])
        )
    missing = [f"- {cell(name_of(key))}: {cell(reason)}" for key, reason in metrics.get("not_computed", {}).items()]
    if missing:
        parts.append("\n".join(["Not computed:", "", *missing]))
    return "\n\n".join(parts)
