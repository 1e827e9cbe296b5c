"""Hooks of mkdocs: what lies outside of docs/ has a page too (README, recipes, profiles), and links lead to it.

On a page of the repository a link is relative to its file; on the site all pages are those of docs/ and these.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
SHOWN = re.compile(r"^(recipes|slurm|tests)/.*\.(yaml|py|md)$")
"""Files that get a page where a page links to them: text as it is, or code."""
sources: dict[str, str] = {}
"""By the page of a file outside of docs/, where that file is."""
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside of docs/ that some page links to."""
    wanted = dict(PAGES)
    for source in [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]:
        wanted |= {target: _uri(target) for target in _targets(source) if SHOWN.match(target)}
    for source, uri in wanted.items():
        sources[uri] = source
        files.append(File.generated(config, uri, content=_content(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001  mkdocs' names
    """Have each link lead to the page of the file that it names."""
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        uri = posixpath.relpath(_uri(target), posixpath.dirname(page.file.src_uri))
        return f"]({uri}{match[2] or ''})"

    return LINK.sub(rewritten, markdown)


def _targets(source: str) -> list[str]:
    """Files that a page links to, from the repository's root."""
    text = (ROOT / source).read_text(encoding="utf-8")
    folder = posixpath.dirname(source)
    return [posixpath.normpath(posixpath.join(folder, match[1])) for match in LINK.finditer(text)]


def _uri(target: str) -> str:
    """Of a file of the repository on the site."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    name = target.removesuffix(".md").removesuffix("/README") if target.endswith(".md") else target
    return f"files/{name}.md"


def _content(source: str) -> str:
    text = (ROOT / source).read_text(encoding="utf-8")
    if source.endswith(".md"):
        return text
    language = "yaml" if source.endswith(".yaml") else "python"
    return f"# {source}\n\n```{language}\n{text}```\n"
