"""What `mkdocs` needs beyond mkdocs.yml: pages made from the code, the entries of folders in `nav`, links out of docs/.

A page a command from its options and its docstring, settings from the dataclasses, presets from their heads.
"""

import inspect
import os
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stages import cli
from stages.recipe import ClassifierRecipe, GeneratorRecipe, PipelineRecipe
from vqpipe import config, presets
from vqpipe.settings import field_docs

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Files of the repository that are pages of the site."""
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s]+)\)")
"""A link or a picture: its text with brackets, its target."""
FENCE = re.compile(r"^(```.*?^```[^\n]*$)", flags=re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^(```bash\n)(.*?)(^```)", flags=re.DOTALL | re.MULTILINE)
WIDTH = 84
"""Characters of a code block that fit the page."""

EXAMPLES = {
    "demo": ["vqpipe demo"],
    "prepare-data": [
        "vqpipe prepare-data imagenette --source imagenette2 --out data",
        "vqpipe prepare-data folder --source 'data/train-*.parquet' --out packed",
    ],
    "extract-features": [
        "vqpipe extract-features --images data --encoder patch-pca --out features",
        "vqpipe extract-features --images data --encoder open_clip:ViT-L-14/openai --download --pool 4 --out clip",
    ],
    "kmeans": ["vqpipe kmeans --features features --k 4096 --out codebook"],
    "train": [
        "vqpipe train --images data --codebook codebook --preset small --out tokenizer",
        "vqpipe train --images data --validation held-out --preset small --publish best --out best",
        "vqpipe train --images data --from tokenizer --preset small --set 'train.freeze=[\"encoder\"]' --out finetuned",
    ],
    "import-checkpoint": [
        "vqpipe import-checkpoint llamagen-f16 --dry-run",
        "vqpipe import-checkpoint llamagen-f16 --out llamagen",
        "vqpipe import-checkpoint vqgan-lc-100K-f16-dim8.pth --out released",
    ],
    "tokenize": [
        "vqpipe tokenize --images data --tokenizer tokenizer --out tokens",
        "vqpipe tokenize --images data --tokenizer tokenizer --crops ten --out ten-crops",
    ],
    "detokenize": ["vqpipe detokenize --tokens tokens --tokenizer tokenizer --out images"],
    "eval": [
        "vqpipe eval --images data --tokenizer tokenizer --out report",
        "vqpipe eval --images data --tokenizer tokenizer --weights weights --protocol adm --metrics kid,prc --out fid",
    ],
    "reconstruct": ["vqpipe reconstruct photo.jpg --tokenizer tokenizer --out pairs"],
    "train-generator": [
        "vqpipe train-generator --preset gpt-tiny --tokens tokens --tokenizer tokenizer --out generator",
        "vqpipe train-generator --preset sit-tiny --images data --image-size 64 --tokenizer tokenizer --out sit",
    ],
    "generate": ["vqpipe generate --generator generator --num-images 64 --cfg-scale 2 --out samples"],
    "eval-generation": ["vqpipe eval-generation --images samples --reference data --out samples-report"],
    "train-classifier": [
        "vqpipe train-classifier --preset vit-tiny --tokens tokens --tokenizer tokenizer --out classifier"
    ],
    "compare": ["vqpipe compare report other-report --out comparison"],
    "inspect": ["vqpipe inspect tokens --verify"],
    "push": ["vqpipe push tokenizer OWNER/NAME --report report --licence apache-2.0"],
    "zoo": ["vqpipe zoo", "vqpipe zoo llamagen-f16", "vqpipe zoo llamagen --json"],
    "presets": ["vqpipe presets", "vqpipe presets small > mine.toml"],
    "settings": ["vqpipe settings train", "vqpipe settings kmeans --json"],
    "plan": ["vqpipe plan train --preset vqgan-lc-f16-100k --gpu a100-80 --gpus 8"],
    "bench": ["vqpipe bench --out machine"],
}
"""Command -> command lines for its page. tests/test_docs.py parses them."""


# The hooks


def on_config(config: Any) -> Any:
    """Replace the folders in `nav` by their pages."""
    named = set(names_in(config.nav))
    others = [each.name for each in sorted((ROOT / "docs").glob("*.md")) if each.name not in named]
    config.nav = [entry for item in config.nav for entry in expanded(item, others)]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from the code, and those of the repository's root."""
    from mkdocs.structure.files import File

    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page of docs/ that lead out of it, and fold the long command lines of all pages."""
    path = page.file.src_uri
    if not page.file.generated_by:
        markdown = with_site_links(markdown, f"docs/{path}", path)
    return SHELL.sub(lambda block: f"{block[1]}{folded_block(block[2])}{block[3]}", markdown)


def generated_pages() -> dict[str, str]:
    """Path -> Markdown of each page that is no file of docs/."""
    pages = {f"commands/{name}.md": command_page(name) for name in cli.COMMANDS}
    pages |= {"commands/index.md": commands_page(), "settings.md": settings_page(), "presets.md": presets_page()}
    for source, path in ROOT_PAGES.items():
        pages[path] = with_site_links((ROOT / source).read_text(encoding="utf-8"), source, path)
    return pages


def names_in(nav: Any) -> Iterator[str]:
    """The paths of a `nav`."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from names_in(item)


def expanded(item: Any, others: list[str]) -> list[Any]:
    """An item of `nav` as the items that it stands for: "*" as `others`, a folder as a list of its pages, those that
    README links to first and in its order."""
    if item == "*":
        return others
    if isinstance(item, str):
        return [item]
    ((title, value),) = item.items()
    if isinstance(value, list):
        return [{title: [entry for each in value for entry in expanded(each, others)]}]
    if not value.endswith("/"):
        return [item]
    if value == "commands/":
        pages: list[Any] = ["commands/index.md", *({name: f"commands/{name}.md"} for name in cli.COMMANDS)]
    else:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        found = [value + each.name for each in (ROOT / "docs" / value).glob("*.md") if each.name != "index.md"]
        linked = sorted((name for name in found if f"](docs/{name})" in readme), key=lambda name: readme.index(name))
        others = sorted(name for name in found if name not in linked)
        pages = [*(f"{value}index.md" for _ in (ROOT / "docs" / value).glob("index.md")), *linked, *others]
    return [{title: pages}] if pages else []


def with_site_links(markdown: str, source: str, page: str) -> str:
    """The links of the file `source` of the repository for the `page` of the site: those to other pages are relative
    to it, and those to other files of the repository are plain text."""

    def replace(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        where = os.path.normpath(PurePosixPath(source).parent / path)
        if where in ROOT_PAGES:
            where = f"docs/{ROOT_PAGES[where]}"
        if not where.startswith("docs/"):
            return text.lstrip("!")[1:-1]
        relative = os.path.relpath(where.removeprefix("docs/"), PurePosixPath(page).parent)
        return f"{text}({relative}{'#' * bool(anchor)}{anchor})"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(replace, part) for part in parts)


def folded_block(code: str) -> str:
    """The command lines of a block in lines that fit the page. If one is too long, its comments stand above the lines,
    and long commands are split before options."""
    lines = code.splitlines()
    if all(len(line) <= WIDTH for line in lines):
        return code
    folded = []
    for line in lines:
        command, _, comment = line.partition(" # ")
        folded += [f"# {comment.strip()}"] if comment and command.strip() else []
        folded.append(folded_command(command.rstrip()) if command.strip() else line)
    return "\n".join(folded) + "\n"


def folded_command(line: str) -> str:
    """A command line in lines that fit the page, all but the first of which begin with an option."""
    parts = [""]
    for word in re.split(r" (?=-{1,2}[a-z])", line):
        if parts[-1] and len(f"{parts[-1]} {word} \\") > WIDTH:
            parts.append("   ")
        parts[-1] = f"{parts[-1]} {word}" if parts[-1] else word
    return " \\\n".join(parts)


# Commands


def commands_page() -> str:
    """The page that lists the commands."""
    rows = [f"| [`{name}`]({name}.md) | {command.help} |" for name, command in cli.COMMANDS.items()]
    return "\n".join(["# Commands", "", COMMANDS_TEXT, "| command | |", "|---|---|", *rows, "", COMMANDS_NOTES])


COMMANDS_TEXT = """\
Most commands read finished directories and publish one, `--out`. Run a command again: it reports that it is done, or
resumes. `vqpipe COMMAND --help` prints what is on these pages.
"""
COMMANDS_NOTES = """\
## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | an error, which is explained in one line on stderr |
| 2 | wrong usage |
| 129, 130, 143 | the terminal was closed, Ctrl+C, SIGTERM: run the same command again to resume |

## Completion

`vqpipe --install-completion` installs completion of commands and options for the current shell (bash, zsh, fish or
PowerShell); `vqpipe --show-completion` prints it. Options take a few seconds to complete, because PyTorch is imported.

## Several GPUs

Commands that compute also run under torchrun, on any number of processes:

```bash
torchrun --nproc-per-node 8 -m stages train --images data --codebook codebook --preset small --out tokenizer
```
"""


def command_page(name: str) -> str:
    """The page of a command: its docstring, examples, arguments and options."""
    command = cli.load(name)
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(["vqpipe", name, *command.collect_usage_pieces(context)])
    lines = [f"# vqpipe {name}", "", prose(command.help), "", "```text", usage, "```", ""]
    lines += ["## Examples", "", "```bash", "\n\n".join(EXAMPLES[name]), "```", ""]
    records = [(each.param_type_name, each.get_help_record(context)) for each in command.params]
    for kind, heading in (("argument", "Arguments"), ("option", "Options")):
        shown = [record for own, record in records if own == kind and record]
        lines += [f"## {heading}", "", *map(option, shown)] if shown else []
    return "\n".join(lines)


def option(record: tuple[str, str]) -> str:
    """An argument or option as an item of a definition list; `record` is that of `--help`."""
    names, text = record
    text, _, notes = text.rpartition("  [") if text.endswith("]") else (text, "", "")
    names = names.replace(" <list[Path]>", "...").replace(" <list[str]>", "")
    return definition(names, ", ".join(fact(note) for note in notes.removesuffix("]").split("; ")), prose(text))


def fact(note: str) -> str:
    """`default: small`, `x>=1` or `0<=x<=1` in words."""
    if note.startswith("default: "):
        return f"default `{note.removeprefix('default: ')}`"
    if between := re.fullmatch(r"(\S+)<=x<=(\S+)", note):
        return f"from {between[1]} to {between[2]}"
    return note.replace("x>=", "at least ")


def definition(name: str, facts: str, text: str) -> str:
    """An item of a definition list: the name as code, facts beside it, the text below."""
    return f"`{name}`" + f" *{facts}*" * bool(facts) + f"\n:   {text}\n"


CODE = re.compile(
    r"(`[^`]*`)"  # what is code already
    r"|(--[a-z][\w-]*(?: '[^']*'| [a-z_]+\.[\w.]+=[^\s,;]+)?"  # an option, with a quoted value or a setting
    r"|\b[A-Za-z_][\w/-]*(?:\.[A-Za-z_][\w*/-]*)+(?:=[^\s,;]+)?)"  # a setting or a file
)


def prose(text: str) -> str:
    """A help text as Markdown: paragraphs joined, and options, settings and files as code."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text or "")]
    return "\n\n".join(code_marked(paragraph) for paragraph in paragraphs)


def code_marked(text: str) -> str:
    """The options, settings and files of a text as code, and everything else escaped."""
    parts, end = [], 0
    for match in CODE.finditer(text):
        parts.append(escaped(text[end : match.start()]))
        parts.append(match[1] or f"`{match[2]}`")
        end = match.end()
    return "".join([*parts, escaped(text[end:])])


def escaped(text: str) -> str:
    """A text in which nothing is Markdown or HTML."""
    return re.sub(r"([*\[\]\\|])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


# Settings

SECTIONS: list[tuple[str, type, tuple[str, ...]]] = [
    ("features", PipelineRecipe, ("extract-features",)),
    ("kmeans", PipelineRecipe, ("kmeans",)),
    ("model", PipelineRecipe, ("train",)),
    ("model.quantizer", PipelineRecipe, ("train",)),
    ("discriminator", PipelineRecipe, ("train",)),
    ("objective", PipelineRecipe, ("train",)),
    ("data", PipelineRecipe, ("train",)),
    ("train", GeneratorRecipe, ("train", "train-generator", "train-classifier")),
    ("eval", PipelineRecipe, ("eval",)),
    ("generator", GeneratorRecipe, ("train-generator",)),
    ("examples", GeneratorRecipe, ("train-generator", "train-classifier")),
    ("generate", GeneratorRecipe, ("train-generator", "generate")),
    ("classifier", ClassifierRecipe, ("train-classifier",)),
]
"""Each section of presets, a recipe that has it, and the commands that read it. tests/test_docs.py checks that none is
missing."""

SETTINGS_TEXT = """\
# Settings

The settings of [presets](presets.md). `--preset FILE.toml` takes a file with these sections, which may begin with
`extends = "NAME"` of a preset and then holds only what differs from it:

```toml
extends = "small"

[train]
steps = 20_000

[model.quantizer]
kind = "simvq"
```

`--set section.key=value` changes one setting for one run: `--set train.steps=20000 --set model.quantizer.kind=simvq`. A
key that does not exist and a value of the wrong type are errors. In a section with a `kind`, it decides which other
settings there are. A setting that is marked *may change on resume* may have another value when a run is resumed.
"""


def settings_page() -> str:
    """The page of all settings of presets, from their dataclasses."""
    return "\n".join([SETTINGS_TEXT, *map(section, *zip(*SECTIONS, strict=True))])


def section(name: str, recipe: type, commands: tuple[str, ...]) -> str:
    """A section of presets: the settings of every kind, then those of each kind and of what several kinds share."""
    base = recipe
    for key in name.split("."):
        base = typing.get_type_hints(base)[key]
    links = [f"[`vqpipe {each}`](commands/{each}.md)" for each in commands]
    lines = [f"## \\[{name}\\] {{ #{name.replace('.', '-')} }}", "", f"Read by {', '.join(links)}.", ""]
    lines += [description(base), "", *map(setting, own_fields(base))]
    subclasses = {each for sub in config.all_subclasses(base) for each in sub.__mro__ if is_dataclass(each)} - {base}
    own = [each for each in subclasses if each.__module__.startswith("vqpipe.") and each is not object]
    for cls in sorted(own, key=lambda cls: (own_kind(cls), cls.__name__)):
        title = f'kind = "{own_kind(cls)}"' if own_kind(cls) else cls.__name__
        lines += [f"### {title} {{ #{cls.__name__.lower()} }}", "", description(cls), ""]
        shared = [f"[{each.__name__}](#{each.__name__.lower()})" for each in cls.__mro__[1:] if each in subclasses]
        lines += [f"Also the settings of {' and '.join(shared)}.", ""] if shared else []
        lines += map(setting, own_fields(cls))
    return "\n".join(lines)


def own_kind(cls: type) -> str:
    """The `kind` that a dataclass is chosen by; "" if it has none of its own."""
    kind = vars(cls).get("kind", "")
    return kind if isinstance(kind, str) else ""


def description(cls: type) -> str:
    """The docstring of a dataclass as Markdown, without the name of its section, which the heading has."""
    text = re.sub(r"^Section \[[\w.]+\][.:;]?\s*", "", inspect.getdoc(cls) or "")
    return prose(text[:1].upper() + text[1:])


def own_fields(cls: type) -> list[tuple[Any, str, str]]:
    """The fields that a dataclass adds to its bases or changes: field, type in words, docstring."""
    hints, texts = typing.get_type_hints(cls), field_docs(cls)
    own = [each for each in fields(cls) if each.name in vars(cls).get("__annotations__", {})]
    return [(each, type_in_words(hints[each.name]), texts.get(each.name, "")) for each in own]


def setting(item: tuple[Any, str, str]) -> str:
    """A setting as an item of a definition list."""
    field, kind, text = item
    facts = f"{kind}, {default_in_words(field)}" + ", may change on resume" * bool(field.metadata.get(config.RESUMABLE))
    return definition(field.name, facts, prose(text))


def type_in_words(hint: Any, plural: bool = False) -> str:
    """The values of a type annotation, as TOML has them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_in_words(each, plural) for each in arguments if each is not types.NoneType)
    if origin is typing.Literal:
        return " or ".join(f"`{config.toml_value(each)}`" for each in arguments)
    if origin is tuple:
        number = "" if arguments[-1] is ... else f"{len(arguments)} "
        return f"list of {number}{type_in_words(arguments[0], plural=True)}"
    if is_dataclass(hint):
        return "tables" if plural else "table"
    name = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}[hint]
    return name + "s" * (plural and hint is not bool)


def default_in_words(field: Any) -> str:
    """The default of a field, as TOML has it."""
    if field.default is field.default_factory is MISSING:
        return "required"
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is None:
        return "not set by default"
    if is_dataclass(value):
        table = config.to_table(value).items()
        return f"default `{{{', '.join(f'{key} = {config.toml_value(each)}' for key, each in table)}}}`"
    return f"default `{config.toml_value(value)}`"


# Presets

PRESETS_TEXT = """\
# Presets

`vqpipe presets` prints this list, `vqpipe presets NAME` one of them with all its [settings](settings.md).
`--preset NAME` uses one, and `--set section.key=value` changes a setting of it.
"""


def presets_page() -> str:
    """The page of all presets, by paper."""
    papers: dict[str, list[str]] = {}
    for name, head in presets.heads():
        paper = papers.setdefault(head.get("paper", "Small, for a CPU"), [])
        row = f" {code_marked(head['row'])}." if "row" in head else ""
        what = head["what"].rstrip(".")
        paper += [f"### {name}", "", f"{code_marked(what[:1].upper() + what[1:])}.{row}", ""]
        paper += [f"Expected: {code_marked(head['expected'])}", "", "```bash", head["command"], "```", ""]
    ordered = sorted(papers.items(), key=lambda item: -len(item[1]))
    return "\n".join(
        [PRESETS_TEXT, *(line for paper, lines in ordered for line in (f"## {escaped(paper)}", "", *lines))]
    )
