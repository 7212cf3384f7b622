"""Hooks of mkdocs: pages and files of the repository outside `docs`, and its address.

README.md, CHANGELOG.md and CONTRIBUTING.md are pages of the site, and so is the notebook. A relative link to a page of
the site leads there, a link to a picture leads to a copy of it, and a link to another file leads to the repository. A
link to a missing file is an error.
"""

import json
import os
import re
import tomllib
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "notebook.md": "notebooks/quickstart.ipynb",
}
SITE = {path: page for page, path in PAGES.items()}
PICTURES = {".png", ".svg"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
ELSEWHERE = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed|object|link\b(?![^>]*rel="?canonical))\b[^>]*"""
    r"""\b(?:src|href|data)=["']?(?:https?:)?//[^>]*>"""
)
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = METADATA["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]


def on_config(config):
    """Set the repository's address as a plain link; with `repo_url`, the theme would load its stars."""
    config.extra["social"] = [{"icon": "material/source-repository", "link": REPOSITORY, "name": "Repository"}]
    return config


def on_files(files, config):
    """Add the pages and pictures outside `docs`."""
    for page, path in PAGES.items():
        files.append(File.generated(config, page, content=_markdown(ROOT / path)))
    for path in sorted({path for source in _sources() for path in _pictures(source)}):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links of the repository into links of the site."""
    here = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = CODE.split(markdown)
    parts[::2] = (LINK.sub(lambda link: _target(link, here, page), part) for part in parts[::2])
    return "".join(parts)


def on_post_page(output, page, config):
    """Refuse pages that would load anything from the network.  Raises: PluginError."""
    if elsewhere := ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from the network: {elsewhere[0]}")
    return output


def _markdown(path):
    """The text of a page; a notebook's cells one after another, without outputs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells)


def _target(link, here, page):
    file = Path(os.path.normpath((ROOT / here).parent / link[1]))
    if not file.exists() and file.suffix != ".jsonl":  # a source distribution has no rows of results
        raise PluginError(f"{here} links to {link[1]}, which does not exist")
    path, anchor = file.relative_to(ROOT).as_posix(), link[2] or ""
    if path in SITE:
        path = SITE[path]
    elif path.startswith("docs/"):
        path = path.removeprefix("docs/")
    elif file.suffix not in PICTURES:
        return f"{REPOSITORY}/blob/main/{path}{anchor}"
    return os.path.relpath(path, os.path.dirname(page.file.src_uri)) + anchor


def _sources():
    yield from (ROOT / path for path in PAGES.values())
    yield from (ROOT / "docs").rglob("*.md")


def _pictures(source):
    for link in LINK.finditer(source.read_text(encoding="utf-8")):
        path = Path(os.path.normpath(source.parent / link[1]))
        if path.suffix in PICTURES and not path.is_relative_to(ROOT / "docs"):
            yield path
