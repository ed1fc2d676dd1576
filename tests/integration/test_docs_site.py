"""The documentation as a site: MkDocs builds it without a warning, and it needs no network."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not find_spec("material"), reason="mkdocs-material is not installed (extra `docs`)")


class Page(HTMLParser):
    """The text of a page, and what a browser loads with it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.loaded, self.links = "", list[str](), list[str]()
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and (name in ("src", "srcset", "data", "poster") or (name, tag) == ("href", "link")):
                self.loaded.append(value)
            elif value and name == "href":
                self.links.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory


def test_every_document_is_a_page(site: Path) -> None:
    documents = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    assert len(documents) > 6
    added = {"index.html", "recipes.html", "changelog.html", "contributing.html"}
    assert {path.name for path in site.glob("*.html")} == documents | added | {"404.html"}


def test_recipes_are_shown_as_they_are(site: Path) -> None:
    shown = Page((site / "recipes.html").read_text(encoding="utf-8")).text
    recipes = list((ROOT / "yaml_examples").iterdir())
    assert recipes
    for recipe in recipes:
        assert recipe.read_text(encoding="utf-8") in shown


def test_links_of_the_readme_lead_to_the_site(site: Path) -> None:
    links = Page((site / "index.html").read_text(encoding="utf-8")).links
    for expected in (
        "guide.html#a-judge",
        "contributing.html",
        "recipes.html#spin-lora-24gbyml",
        "faq.html#environments",
    ):
        assert expected in links


def test_site_loads_nothing_from_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert pages
    for path in pages:
        html = path.read_text(encoding="utf-8")
        loaded = Page(html).loaded
        assert any(name.endswith(".css") for name in loaded)
        assert not [name for name in loaded if re.match(r"(https?:)?//", name)]
        assert "mermaid" not in html, "the theme would load it from the network"
    styles = list(site.rglob("*.css"))
    assert styles
    assert not [style for style in styles if re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text())]
