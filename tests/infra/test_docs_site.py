"""The pages of docs/ as a site: every page, link, anchor and image is there, and nothing comes from the network."""

import logging
import os
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

os.environ["NO_MKDOCS_2_WARNING"] = "1"
build = pytest.importorskip("mkdocs.commands.build", reason="mkdocs is not installed")

from mkdocs.config import load_config  # noqa: E402
from mkdocs.exceptions import Abort  # noqa: E402

from tests.browser import complaints, open_browser  # noqa: E402

ROOT = Path(__file__).parents[2]
FETCHED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")


def build_site(root: Path, site: Path) -> None:
    build.build(load_config(str(root / "mkdocs.yml"), site_dir=str(site)))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build_site(ROOT, folder)
    return folder


def test_it_is_built_strictly_with_every_page_and_those_beside_docs(site):
    pages = {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.name for path in site.iterdir()}
    assert (site / "infra/index.html").exists()
    assert (site / "CONTRIBUTING.html").exists()
    assert 'href="infra/index.html"' in (site / "index.html").read_text()
    assert 'href="../operating.html"' in (site / "infra/index.html").read_text()


def test_nothing_that_a_page_shows_comes_from_the_network(site):
    pages = list(site.rglob("*.html"))
    fetched = {found for page in pages for found in FETCHED.findall(page.read_text())}
    assert {address for address in fetched if not address.startswith("https://squidfunk.github.io")} == set()
    assert len(pages) > 20
    assert "unpkg" not in "".join(page.read_text() for page in pages)
    assert 'class="mermaid"' not in (site / "architecture.html").read_text()


def test_the_diagram_of_the_folders_is_a_table_of_its_arrows(site):
    text = re.sub(r"<[^>]+>", " ", (site / "architecture.html").read_text())
    diagram = (ROOT / "docs/architecture.md").read_text()
    assert "flowchart" in diagram
    assert "flowchart" not in text
    assert "flows/build_dataset.py" in text


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("[there](page.md#nowhere)", "does not contain an anchor '#nowhere'"),
        ("[there](nowhere.md)", "is not found among documentation files"),
        ("![there](nowhere.png)", "is not found among documentation files"),
        (None, 'not included in the "nav"'),
    ],
)
def test_a_link_an_anchor_an_image_and_a_page_that_the_index_lacks_stop_it(change, complaint, tmp_path, caplog):
    index = f"# Start\n\n## Data\n\n- [Page](page.md): {change}\n" if change else "# Start\n"
    _small_repository(tmp_path, index)
    with caplog.at_level(logging.WARNING, "mkdocs"), pytest.raises(Abort, match="warning"):
        build_site(tmp_path, tmp_path / "site")
    assert complaint in caplog.text


@pytest.mark.slow
def test_a_browser_finds_nothing_wrong_with_it(site):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with open_browser() as browser:
            for page in ("index.html", "building.html", "architecture.html", "infra/index.html"):
                assert complaints(browser, f"http://127.0.0.1:{server.server_port}/{page}") == []
        server.shutdown()


def _small_repository(folder: Path, index: str) -> None:
    for name in ("mkdocs.yml", "tests/infra/docs_site.py", "docs/site.css"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "docs/index.md").write_text(index)
    (folder / "docs/page.md").write_text("# Page\n\n## Somewhere\n")
