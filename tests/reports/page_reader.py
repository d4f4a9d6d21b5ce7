"""Read a rendered page as strictly as a careful reader: nesting, ids, links, headings, tables, labels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br", "circle", "rect", "path", "use"}
HEADINGS = {f"h{level}": level for level in range(1, 7)}


@dataclass
class Element:
    """A tag with its attributes and, once closed, its whole text."""

    tag: str
    attributes: dict[str, str]
    text: str = ""

    @property
    def classes(self) -> list[str]:
        """Its CSS classes."""
        return self.attributes.get("class", "").split()


@dataclass
class Reader(HTMLParser):
    """Collects elements and what is wrong with the page."""

    elements: list[Element] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take an element that closes itself."""
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost element."""
        if tag in VOID:
            return
        if not self.open or self.open[-1].tag != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1].tag if self.open else 'nothing'}")
            return
        self.open.pop()

    def handle_data(self, data: str) -> None:
        """Give text to every element that is open."""
        for element in self.open:
            element.text += data


def read(html: str) -> Reader:
    """Parse a page and list its faults.

    Returns:
        The elements, with `faults`: bad nesting, doubled ids, links to nowhere, network resources, skipped
        heading levels, header cells without scope, matrix cells without text, chips without sign and word.
    """
    page = Reader()
    page.feed(html)
    page.close()
    faults = page.faults
    faults += [f"<{element.tag}> is never closed" for element in page.open]
    ids = Counter(element.attributes["id"] for element in page.elements if "id" in element.attributes)
    faults += [f"id {name} occurs {n} times" for name, n in ids.items() if n > 1]
    level = 0
    for element in page.elements:
        attributes = element.attributes
        link = attributes.get("href", "") or attributes.get("xlink:href", "")
        if link.startswith("#") and "=" not in link and link[1:] not in ids:
            faults.append(f"link to nowhere: {link}")
        if element.tag in ("script", "img", "iframe", "source") and "src" in attributes:
            faults.append(f"<{element.tag}> loads {attributes['src']}")
        if element.tag == "link" and not link.startswith("data:"):
            faults.append(f"<link> loads {link}")
        if element.tag in HEADINGS:
            if HEADINGS[element.tag] > level + 1:
                faults.append(f"{element.tag} {element.text!r} follows h{level}")
            level = HEADINGS[element.tag]
            if not element.text.strip():
                faults.append(f"{element.tag} is empty")
        if element.tag == "th" and "scope" not in attributes:
            faults.append(f"<th> {element.text!r} has no scope")
        if element.tag == "td" and {"none", "na"} & set(element.classes) and not element.text.strip():
            faults.append("an empty cell in the matrix")
        if "chip" in element.classes and len(element.text.split()) < 2:
            faults.append(f"a chip that says only {element.text!r}")
        for name in ("aria-labelledby", "aria-describedby"):
            if attributes.get(name) and attributes[name] not in ids:
                faults.append(f"{name} names {attributes[name]}, which is nowhere")
    return page
