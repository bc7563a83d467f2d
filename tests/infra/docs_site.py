"""Hooks of mkdocs.yml: the index is the navigation, and links to files beside docs/ lead to copies in the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = "docs/"
LINK = re.compile(r"(?<=\]\()(?!https?:)([^)#\s]+)")
MERMAID = re.compile(r"```mermaid\n(.*?)```", re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Makes the navigation of the index: a section for each heading, with the pages that are listed below it."""
    nav: list[dict[str, Any]] = [{"Start": "index.md"}]
    for section in (ROOT / "docs/index.md").read_text().split("\n## ")[1:]:
        pages = re.findall(r"^- \[(.+?)\]\((.+?)\)", section, re.MULTILINE)
        listed = [{title: in_site(target_of("index.md", target))} for title, target in pages]
        nav.append({section.split("\n")[0]: listed})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files beside docs/ that a page links to, and those that these link to."""
    pages = [file.src_uri for file in files.documentation_pages()]
    while pages:
        for target in linked(pages.pop()):
            if files.get_file_from_path(in_site(target)) is None and (ROOT / target).is_file():
                files.append(File.generated(config, in_site(target), abs_src_path=str(ROOT / target)))
                pages += [in_site(target)] * target.endswith(".md")
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between files of the site, and diagrams into tables."""
    here = page.file.src_uri

    def in_site_from_here(found: re.Match[str]) -> str:
        return posixpath.relpath(in_site(target_of(here, found[0])), posixpath.dirname(here))

    return LINK.sub(in_site_from_here, MERMAID.sub(lambda found: arrows(found[1]), markdown))


def arrows(diagram: str) -> str:
    """A table of a diagram's arrows: its drawing would need a script from the network."""
    labels, rows, folder = dict[str, str](), dict[str, list[str]](), ""
    for line in diagram.splitlines():
        if found := re.fullmatch(r'  subgraph "(.*)"', line):
            folder = found[1]
        elif found := re.fullmatch(r'    (\w+)\["(.*)"\]', line):
            labels[found[1]] = f"`{folder.removesuffix(found[2])}{found[2]}`"
        elif found := re.fullmatch(r"  (\w+) --> (\w+)", line):
            rows.setdefault(labels[found[1]], []).append(labels[found[2]])
    table = [f"| {start} | {', '.join(ends)} |" for start, ends in rows.items()]
    return "\n".join(["| from | to |", "|---|---|", *table])


def linked(page: str) -> list[str]:
    """The files of the repository, as paths from its root, that a page of the site links to."""
    return [target_of(page, link) for link in LINK.findall((ROOT / in_repository(page)).read_text())]


def target_of(page: str, link: str) -> str:
    """A link of a page of the site, as a path from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(page)), link))


def in_repository(page: str) -> str:
    """Where a page of the site lies in the repository."""
    return f"{DOCS}{page}" if (ROOT / DOCS / page).exists() else page


def in_site(path: str) -> str:
    """Where a file of the repository lies in the site, which begins with docs/."""
    return "index.md" if path == "README.md" else path.removeprefix(DOCS)
