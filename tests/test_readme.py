"""README and the other pages: commands parse, paths and links exist, quantizer pages agree with the code.

Links work on GitHub and on the site. So no page links to a page that only the build of the site writes, such as
settings.md.
"""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from stages import cli, recipe
from vqpipe.config import all_subclasses
from vqpipe.losses.objective import QUANTIZER_TERMS
from vqpipe.presets import heads
from vqpipe.quantizers import QuantizerConfig, build_quantizer

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROOT_PAGES = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*ROOT_PAGES, *sorted(DOCS.rglob("*.md"))]
QUANTIZER_PAGES = {path.stem: path for path in sorted((DOCS / "quantizers").glob("*.md")) if path.stem != "index"}
QUANTIZERS = {
    config.kind: config
    for config in all_subclasses(QuantizerConfig)
    if config.__module__.startswith("vqpipe.") and isinstance(getattr(config, "kind", None), str)
}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands_of(page: Path) -> list[str]:
    """Every `vqpipe` command line of a page's shell blocks, also those that torchrun or the guide's example start."""
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", text_of(page), flags=re.DOTALL)).replace("\\\n", " ")
    found = [
        re.search(r"^(?:vqpipe(?: --import \S+)?|torchrun .* -m stages) (.*)", line) for line in shell.splitlines()
    ]
    return [re.sub(r"\s+#.*", "", match[1]) for match in found if match]


COMMANDS = {f"{page.stem}: {line}": line for page in PAGES for line in commands_of(page)}
COMMANDS |= {f"preset {name}": head["command"].removeprefix("vqpipe ") for name, head in heads()}


def parse(line: str) -> tuple[str, dict[str, Any]]:
    """The name of a command and its parameters; raises on an unknown option or a missing argument."""
    name, *words = shlex.split(line)
    return name, cli.load(name).make_context(name, words).params


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_command_parses(line: str) -> None:
    assert parse(line)[0] in cli.COMMANDS


def test_commands_of_every_page_are_found() -> None:
    for name in ("README", "train-vqgan-lc", "add-a-quantizer", "how-it-works"):
        assert sum(key.startswith(f"{name}: ") for key in COMMANDS) >= 4, name
    assert len(COMMANDS) > 150


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_line_is_the_first_line_of_the_docstring(name: str) -> None:
    command = cli.COMMANDS[name]
    assert (command.load().__doc__ or "").splitlines()[0] == command.help


def test_readme_and_its_guides_name_every_command() -> None:
    text = "\n".join(text_of(page) for page in PAGES)
    assert {name for name in cli.COMMANDS if f"vqpipe {name}" not in text} == set()


def test_readme_is_short_and_begins_with_the_two_commands() -> None:
    assert len(README.splitlines()) < 200
    first, second = commands_of(ROOT / "README.md")[:2]
    assert first.startswith("reconstruct photo.jpg --tokenizer builtin:photos-f8")
    assert second == "tokenize --images photos --tokenizer builtin:photos-f8 --out tokens"


def test_files_named_in_the_pages_exist() -> None:
    """Paths are relative to the repository, or to `vqpipe`; other paths are a user's."""
    paths = {path for page in PAGES for path in re.findall(r"`((?:\w+/)+[\w.-]*)`", text_of(page))}
    roots = {
        "docs",
        "stages",
        "tests",
        "vqpipe",
        "data_manifests",
        *(path.name for path in (ROOT / "vqpipe").iterdir()),
    }
    named = {path for path in paths if path.split("/")[0] in roots and "NAME" not in path}
    assert len(named) > 50
    assert [path for path in named if not (ROOT / path).exists() and not (ROOT / "vqpipe" / path).exists()] == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings that GitHub and MkDocs make alike."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return {slug for slug in slugs if "--" not in slug}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_pages_and_headings_that_exist(page: Path) -> None:
    missing = []
    text = re.sub(r"<!--.*?-->", "", text_of(page), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(target)
    assert missing == []


def test_glossary_has_the_terms_in_alphabetical_order() -> None:
    terms = re.findall(r"^## (.*)$", text_of(DOCS / "glossary.md"), flags=re.MULTILINE)
    assert terms == sorted(terms, key=str.casefold)
    asked = {"Artifact", "Downsample factor", "Utilization", "Perplexity", "Protocol", "Patch-pca", "Nested masking"}
    assert asked - set(terms) == set()


def test_every_guide_is_linked_from_the_readme() -> None:
    assert [page.name for page in (DOCS / "guides").glob("*.md") if f"docs/guides/{page.name}" not in README] == []


def test_every_quantizer_has_a_page_and_a_row() -> None:
    assert QUANTIZER_PAGES.keys() == QUANTIZERS.keys()
    index = text_of(DOCS / "quantizers" / "index.md")
    assert [kind for kind in QUANTIZERS if f"[`{kind}`]({kind}.md)" not in index] == []
    assert f"[{len(QUANTIZERS)} quantizers]" in README


def toml(value: Any) -> str:
    """A default as a page shows it."""
    if dataclasses.is_dataclass(value):
        return f'kind = "{value.kind}"'  # type: ignore[attr-defined]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_page_of_a_quantizer_lists_its_settings_and_defaults(kind: str) -> None:
    expected = {}
    for field in dataclasses.fields(QUANTIZERS[kind]):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        expected[field.name] = "required" if default is dataclasses.MISSING else f"`{toml(default)}`"
    settings = text_of(QUANTIZER_PAGES[kind]).split("## Settings")[1].split("## When to use it")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", settings, flags=re.MULTILINE)) == expected


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_page_of_a_quantizer_has_presets_that_exist_and_a_command_that_trains_it(kind: str) -> None:
    text = text_of(QUANTIZER_PAGES[kind])
    named = re.findall(r"`([\w-]+)`", re.search(r"^- Presets: (.*)$", text, flags=re.MULTILINE)[1])  # type: ignore[index]
    assert named
    for name in named:
        quantizer = recipe.load_tokenizer(name).model.quantizer
        assert kind in (quantizer.kind, getattr(getattr(quantizer, "group", None), "kind", None)), name
    parsed = [parse(line)[1] for line in commands_of(QUANTIZER_PAGES[kind])]
    assert parsed
    for options in parsed:
        chosen = recipe.load_tokenizer(options["preset"], options["overrides"])
        assert chosen.model.quantizer.kind == kind
        needed = set(build_quantizer(chosen.model.quantizer).loss_names)
        assert {name for name, weight in chosen.objective.weights(QUANTIZER_TERMS).items() if weight > 0} >= needed
