"""The pages of the documentation: their code blocks, links and headings."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>(?:not run|run on): [^\n]*?) -->\n)?^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]+))?\)")
IDENTIFIER = re.compile(r"^::: ([\w.]+)$(\n    options:\n      members: false$)?", re.MULTILINE)


class Block(NamedTuple):
    """A code block. mark: `not run: REASON` or `run on: MODEL`, from the comment before it; empty without one."""

    page: str
    line: int
    mark: str
    language: str
    code: str

    @property
    def is_run(self) -> bool:
        return not self.mark.startswith("not run: ")

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README.md and all pages of docs, from the root of the repository."""
    return ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    text = text_of(page)
    return [
        Block(page, text.count("\n", 0, m.start()) + 1, m["mark"] or "", m["language"], m["code"])
        for m in BLOCK.finditer(text)
    ]


def links(page: str) -> Iterator[tuple[Path, str]]:
    """The file and the anchor of every relative link; the anchor may be empty."""
    for path, anchor in LINK.findall(FENCE.sub("", text_of(page))):
        yield ((ROOT / page).parent / path).resolve() if path else ROOT / page, anchor


def anchors(path: Path) -> set[str]:
    """What links can name of a page: its headings, as GitHub and mkdocs write them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def identifiers() -> dict[str, bool]:
    """What the API reference documents, and whether with all its members."""
    reference = (page for page in pages() if page.startswith("docs/reference/"))
    return {name: not alone for page in reference for name, alone in IDENTIFIER.findall(text_of(page))}
