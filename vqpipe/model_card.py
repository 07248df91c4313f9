"""The README.md of a tokenizer, in Hugging Face's format: a YAML head, then Markdown."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TAGS = ("image-tokenizer", "vector-quantization", "image-reconstruction")
LICENCES = (
    *("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"),
    *("cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail", "unlicense"),
)
"""Names of licences that the hub knows; others are `other` with a name."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The card of a tokenizer on the model hub."""

    repository: str
    """OWNER/NAME."""
    properties: Mapping[str, Any]
    """Rows of the table of properties."""
    downsample_factor: int
    image_size: int | None
    licence: str = ""
    datasets: Sequence[str] = ()
    """Data sets of the training, by their names on the hub."""
    metrics: str = ""
    """Markdown of the measured numbers, with their protocol."""
    lineage: Mapping[str, Any] | None = None
    """That of the artifact."""
    tags: Sequence[str] = field(default=TAGS)

    def text(self) -> str:
        """The content of README.md."""
        sections = [
            self.head(),
            f"# {self.repository.rpartition('/')[2]}",
            "An image tokenizer: images to discrete tokens and back. It was made with vqpipe.",
            table_of({**self.properties, "licence": self.licence or "none stated"}),
            "## How to use",
            self.usage(),
            *(["## Results", self.metrics.strip()] if self.metrics else []),
            *(["## Lineage", "\n".join(lineage_lines(self.lineage))] if self.lineage else []),
            "## Limits",
            self.limits(),
        ]
        return "\n\n".join(sections) + "\n"

    def head(self) -> str:
        """The YAML head. (A JSON string or list is YAML.)"""
        lines = ["library_name: vqpipe", f"tags: {json.dumps(list(self.tags))}"]
        if self.licence.lower() in LICENCES:
            lines.append(f"license: {self.licence.lower()}")
        elif self.licence:
            lines += ["license: other", f"license_name: {json.dumps(self.licence)}"]
        if self.datasets:
            lines.append(f"datasets: {json.dumps(list(self.datasets))}")
        return "\n".join(["---", *lines, "---"])

    def usage(self) -> str:
        """Examples in Python and on the command line."""
        side = self.image_size or 256
        return f"""```python
from vqpipe import Tokenizer

tokenizer = Tokenizer.from_pretrained("hf:{self.repository}")  # revision="..." pins a version
ids = tokenizer.encode(images)                          # uint8[B, 3, {side}, {side}] -> int64[B, N]
images = tokenizer.decode(ids, image_size=({side}, {side})) # -> uint8[B, 3, {side}, {side}]
```

```bash
vqpipe tokenize --images IMAGES --tokenizer hf:{self.repository} --out tokens
vqpipe reconstruct photo.jpg --tokenizer hf:{self.repository} --out pairs
vqpipe eval --images IMAGES --tokenizer hf:{self.repository} --out report
```"""

    def limits(self) -> str:
        """What the tokenizer cannot do, as a list."""
        factor = self.downsample_factor
        trained = (
            f"It was trained at {self.image_size} px" if self.image_size else "The size of its training is unknown"
        )
        measured = (
            "The numbers above hold for their images and protocol only, and are not comparable to those of another "
            "protocol."
            if self.metrics
            else "No measured numbers were published with it."
        )
        return f"""- The sides of an image must be multiples of {factor} pixels.
- {trained}; images of other sizes may be reconstructed worse.
- Reconstruction is lossy: small text, faces and fine textures may change.
- {measured}
- Ids are those of these weights and of float32. `precision="bf16"` changes a few percent of them."""


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
