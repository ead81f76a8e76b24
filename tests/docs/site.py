"""MkDocs' hook: README.md and the other pages at the root become pages of the site."""

import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
# Pages outside docs/, and their names on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "WORKSPACE.md": "workspace.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(\]\()([^)#:]+)([)#])")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of PAGES to those of docs/."""
    from mkdocs.structure.files import File

    for path, name in PAGES.items():
        text = with_moved_links((ROOT / path).read_text(encoding="utf-8"))
        files.append(File.generated(config, name, content=text))
    return files


def with_moved_links(text: str) -> str:
    """A root page's text with the links that it has on the site."""

    def moved(link: re.Match) -> str:
        target = PAGES.get(link[2], link[2].removeprefix("docs/"))
        return f"{link[1]}{target}{link[3]}"

    return _LINK.sub(moved, text)
