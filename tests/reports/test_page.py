"""A page is one file that loads nothing, escapes all text, and describes every picture."""

from html.parser import HTMLParser

import torch

from vqpipe.reports import page, pictures, plots

HOSTILE = '<img src=x onerror=alert(1)> & "quotes"'


class Elements(HTMLParser):
    """Every start tag with its attributes, and all text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def every_section(text: str = "plain") -> page.ReportPage:
    original, again = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    png, error = pictures.to_png(original), pictures.error_map(original, again)
    counts = torch.tensor([[3, 0, 1, 7]])
    versions = [page.Version(text, png, text), page.Version("error", error)]
    leaf = {"kind": "data", "name": text, "content": "a" * 64, "inputs": {}}
    sections = [
        page.Numbers(text, [page.Number(text, "22.1", "dB", text)]),
        page.Maps(text, [page.Map(text, pictures.codebook_map(counts), text, text)], text),
        page.Pictures(text, [page.Picture(text, png, versions)], text),
        page.Plots(text, [plots.code_frequency(counts), plots.bars(text, {text: 0.5}, text)]),
        page.Table(text, [text], [[text, page.Cell(text, best=True), text]], text, folded=True),
        page.Reasons(text, {text: text}),
        page.Lineage(text, [{"kind": "report", "name": text, "content": "", "inputs": {text: leaf}}]),
        page.Commands(text, [text], text),
    ]
    return page.ReportPage(text, text, sections, text)


def test_a_page_loads_nothing() -> None:
    elements = Elements(page.render(every_section()))
    for tag, attributes in elements.tags:
        for name in ("src", "href", "srcset", "poster", "action", "data", "xlink:href"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:", "#")), (tag, name, address)
        assert tag not in ("iframe", "object", "embed", "base")


def test_names_from_data_are_escaped() -> None:
    html = page.render(every_section(HOSTILE))
    plain, hostile = Elements(page.render(every_section())), Elements(html)
    assert [tag for tag, _ in hostile.tags if tag in ("img", "script")] == [
        tag for tag, _ in plain.tags if tag in ("img", "script")
    ]
    assert not any("onerror" in attributes for _, attributes in hostile.tags)
    assert hostile.text.count(HOSTILE) >= 15


def test_every_picture_and_slider_has_a_label() -> None:
    elements = Elements(page.render(every_section()))
    drawn = [attributes for tag, attributes in elements.tags if tag == "img" and attributes.get("src")]
    assert len(drawn) == 4
    assert all(attributes.get("alt") for attributes in drawn)
    assert [attributes.get("aria-label") for _, attributes in elements.tags if attributes.get("role") == "slider"] == [
        "Share of the original"
    ]
    assert {"lang": "en"} in [attributes for tag, attributes in elements.tags if tag == "html"]


def test_every_kind_of_section_is_tested_here() -> None:
    assert {type(section) for section in every_section().sections} == set(page.Section.__subclasses__())


def test_a_page_states_its_own_size_and_links_its_sections() -> None:
    html = page.render(every_section())
    assert f"This file: {page.megabytes(len(html.encode()))}," in html
    assert "\0" not in html
    elements = Elements(html)
    targets = {attributes.get("id") for _, attributes in elements.tags}
    links = [attributes["href"] or "" for tag, attributes in elements.tags if tag == "a"]
    assert len(links) == 8
    assert all(link.removeprefix("#") in targets for link in links)
    assert page.megabytes(1) == "0.1 MB"
    assert page.megabytes(12_345_678) == "12.3 MB"


def test_pictures_have_a_size_and_tables_a_row_above_the_header() -> None:
    wide = pictures.to_png(torch.zeros(3, 20, 30, dtype=torch.uint8))
    assert page.Picture("wide", wide, []).size == (30, 20)
    table = page.Table("t", ["", "a", "b"], [["row", "1", "2"]], "one\ntwo", spans=[("", 1), ("both", 2)])
    html = page.render(page.ReportPage("x", "", [table]))
    assert '<th scope="colgroup" colspan="2">both</th>' in html
    assert html.count('<p class="caption">') == 2
