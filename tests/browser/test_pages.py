"""Every page in a browser: without errors in the console, without serious findings of axe-core, within its width."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.browser import chromium
from tests.browser.pages import NAMES, pages_of
from tests.browser.tree import Tree

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.mark.parametrize(("size", "scheme"), [("wide", "light"), ("narrow", "dark")])
@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_clean(chrome: Browser, tree: Tree, name: str, size: str, scheme: str) -> None:
    with chromium.visit(chrome, tree.url, size, scheme) as made:
        made.login(tree.keys["admin"])
        made.open(pages_of(tree)[name])
        chromium.axe_is_clean(made)
        chromium.fits_its_width(made)
