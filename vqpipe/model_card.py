"""The README.md of a tokenizer, in Hugging Face's format: a YAML head, then Markdown."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

TAGS = ("image-tokenizer", "vector-quantization", "image-reconstruction")
LICENCES = (
    *("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"),
    *("cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail", "unlicense"),
)
"""Names of licences that the hub knows; others are `other` with a name."""


def hub_card(
    repository: str,
    properties: Mapping[str, Any],
    *,
    downsample_factor: int,
    image_size: int | None,
    licence: str = "",
    datasets: Sequence[str] = (),
    metrics: str = "",
    lineage: Mapping[str, Any] | None = None,
) -> str:
    """The card of a tokenizer on the model hub.

    Args:
        repository: OWNER/NAME.
        properties: rows of the table of properties.
        datasets: data sets of the training, by their names on the hub.
        metrics: Markdown of the measured numbers, with their protocol.
        lineage: that of the artifact.
    """
    head = ["library_name: vqpipe", f"tags: {json.dumps(TAGS)}"]  # a JSON string or list is YAML
    if licence.lower() in LICENCES:
        head.append(f"license: {licence.lower()}")
    elif licence:
        head += ["license: other", f"license_name: {json.dumps(licence)}"]
    if datasets:
        head.append(f"datasets: {json.dumps(list(datasets))}")
    trained = f"It was trained at {image_size} px" if image_size else "The size of its training is unknown"
    measured = "No measured numbers were published with it."
    if metrics:
        measured = (
            "The numbers above hold for their images and protocol only, and are not comparable to those of another "
            "protocol."
        )
    side = image_size or 256
    sections = [
        "\n".join(["---", *head, "---"]),
        f"# {repository.rpartition('/')[2]}",
        "An image tokenizer: images to discrete tokens and back. It was made with vqpipe.",
        table_of({**properties, "licence": licence or "none stated"}),
        "## How to use",
        f"""```python
from vqpipe import Tokenizer

tokenizer = Tokenizer.from_pretrained("hf:{repository}")  # revision="..." pins a version
ids = tokenizer.encode(images)                          # uint8[B, 3, {side}, {side}] -> int64[B, N]
images = tokenizer.decode(ids, image_size=({side}, {side})) # -> uint8[B, 3, {side}, {side}]
```""",
        f"""```bash
vqpipe tokenize --images IMAGES --tokenizer hf:{repository} --out tokens
vqpipe reconstruct photo.jpg --tokenizer hf:{repository} --out pairs
vqpipe eval --images IMAGES --tokenizer hf:{repository} --out report
```""",
        *(["## Results", metrics.strip()] if metrics else []),
        *(["## Lineage", "\n".join(lineage_lines(lineage))] if lineage else []),
        "## Limits",
        f"""- The sides of an image must be multiples of {downsample_factor} pixels.
- {trained}; images of other sizes may be reconstructed worse.
- Reconstruction is lossy: small text, faces and fine textures may change.
- {measured}
- Ids are those of these weights and of float32. `precision="bf16"` changes a few percent of them.""",
    ]
    return "\n\n".join(sections) + "\n"


def local_card(rows: Mapping[str, Any]) -> str:
    """The card of a tokenizer in a directory: a table of properties, and an example."""
    return f"""---
library_name: vqpipe
tags: [image-tokenizer, vector-quantization]
---
# Image tokenizer

{table_of(rows)}

```python
from vqpipe import Tokenizer

tokenizer = Tokenizer.from_pretrained("this directory")
ids = tokenizer.encode(images)                        # uint8[B, 3, H, W] -> int64[B, N]
images = tokenizer.decode(ids, image_size=(256, 256)) # -> uint8[B, 3, 256, 256]
```
"""


def table_of(rows: Mapping[str, Any]) -> str:
    """A table of Markdown with two columns and an empty header."""
    return "\n".join(["| | |", "|---|---|", *(f"| {cell(key)} | {cell(value)} |" for key, value in rows.items())])


def cell(value: Any) -> str:
    """A value in a table of Markdown."""
    return " ".join(str(value).split()).replace("|", r"\|")


def lineage_lines(lineage: Mapping[str, Any], role: str = "", depth: int = 0) -> list[str]:
    """An artifact and what it was made from as a nested list, with the start of each hash."""
    name = f" {cell(lineage['name'])}" if lineage.get("name") else ""
    lines = [f"{'  ' * depth}- {f'{cell(role)}: ' if role else ''}{lineage['kind']}{name} `{lineage['content'][:12]}`"]
    for each, below in lineage.get("inputs", {}).items():
        lines += lineage_lines(below, each, depth + 1)
    return lines
