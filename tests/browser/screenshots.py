"""
Screenshots of every page, wide and narrow, light and dark, with the data of `tree.py`.

    python -m tests.browser.screenshots docs/screenshots [PAGE …]

Each becomes FOLDER/PAGE-SIZE-SCHEME.webp.
"""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.browser import chromium
from tests.browser.pages import pages_of
from tests.browser.tree import Tree, running_tree

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

#: The quality of the pictures, of 100.
_QUALITY = 70


def main(folder: Path, names: list[str]) -> None:
    """Take the pictures of an installation of their own."""
    with tempfile.TemporaryDirectory() as place, chromium.browser() as running, running_tree(Path(place)) as tree:
        take(running, tree, folder, names)


def take(running: Browser, tree: Tree, folder: Path, names: list[str]) -> None:
    """Write the pictures of the named pages, or of all, to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for size in chromium.SIZES:
        for scheme in chromium.SCHEMES:
            with chromium.visit(running, tree.url, size, scheme, errors_expected=True) as made:
                made.login(tree.keys["admin"])
                for name, path in pages_of(tree).items():
                    if not names or name in names:
                        made.open(path)
                        settle(made.page)
                        save(made.page, folder / f"{name}-{size}-{scheme}.webp")


def settle(page: Page) -> None:
    """Wait until the page has its fonts and charts. Streams stay open, so the network is never idle."""
    page.evaluate("document.fonts.ready")
    page.wait_for_timeout(400)


def save(page: Page, path: Path) -> None:
    """Write what the window shows as WebP, by the protocol of the browser: Playwright knows PNG and JPEG only."""
    session: Any = page.context.new_cdp_session(page)

    answer = session.send("Page.captureScreenshot", {"format": "webp", "quality": _QUALITY})
    path.write_bytes(base64.b64decode(answer["data"]))
    session.detach()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/screenshots"), sys.argv[2:])
