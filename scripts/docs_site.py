"""MkDocs hooks: puts the repository's Markdown files and recipes on the site, with their links (mkdocs.yml).

scripts/docs.sh
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Files outside of docs/, and the pages that show them.
OUTSIDE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
RECIPES = "recipes.md"
LINK = re.compile(r"(!?\[[^]]*\])\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")  # text, path, anchor


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose files are not in docs/."""
    pages = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in OUTSIDE.items()}
    for page, text in (pages | {RECIPES: recipes()}).items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the site's pages. What is not on the site, such as code, is named without a link."""
    origins = {page: name for name, page in OUTSIDE.items()}
    directory = posixpath.dirname(origins.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def on_site(match: re.Match[str]) -> str:
        text, path = match[1], posixpath.normpath(posixpath.join(directory, match[2]))
        folder, name = posixpath.split(path)
        if folder == "yaml_examples":
            return f"{text}({RECIPES}#{anchor(name)})"
        if folder == "docs" or path in OUTSIDE:
            return f"{text}({OUTSIDE.get(path, name)}{match[3] or ''})"
        return text.strip("[]")

    return LINK.sub(on_site, markdown)


def recipes() -> str:
    """Return the page of all recipes: a table of what each is for and the hardware it needs, then their texts."""
    files = sorted((ROOT / "yaml_examples").iterdir())
    rows, sections = ["| recipe | | hardware |", "|---|---|---|"], []
    for file in files:
        text = file.read_text(encoding="utf-8")
        if comment := " ".join(re.findall(r"^# (.+)", text.partition("\n\n")[0], re.MULTILINE)):
            link = f"[{file.name}](#{anchor(file.name)})"
            rows.append(f"| {link} | {sentence(comment)} | {sentence(comment, 'Hardware: ')} |")
        sections.append(f"## {file.name}\n\n```{file.suffix[1:]}\n{text}```")
    return "\n\n".join(["# Recipes", "\n".join(rows), *sections])


def sentence(text: str, after: str = "") -> str:
    """Return the first sentence after `after`; empty without any."""
    found = re.search(rf"{after}(.+?)\.(?= [A-Z]|$)", text)
    return found[1] if found else ""


def anchor(heading: str) -> str:
    """Return a heading's anchor, as forges and mkdocs.yml make it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
