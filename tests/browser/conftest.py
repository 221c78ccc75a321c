"""Fixtures of the tests in a browser: an installation with data, and pages in headless Chromium."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser import chromium
from tests.browser.chromium import Visit
from tests.browser.tree import Tree, running_tree

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Only `make test-ui` runs these."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def chrome() -> Iterator[Browser]:
    """A browser, or the reason why there is none."""
    try:
        chromium.find()
    except chromium.BrowserMissing as missing:
        pytest.skip(str(missing))
    with chromium.browser() as made:
        yield made


@pytest.fixture(scope="session")
def tree(chrome: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    """An installation with data. It is asked for after the browser, because it takes longer to start."""
    with running_tree(tmp_path_factory.mktemp("ui")) as made:
        yield made


@pytest.fixture
def visit(chrome: Browser, tree: Tree) -> Iterator[Visit]:
    """A page whose user has logged in with a key that may do everything. Its console must stay clean."""
    with chromium.visit(chrome, tree.url) as made:
        made.login(tree.keys["admin"])
        yield made


@pytest.fixture
def visit_as(chrome: Browser, tree: Tree) -> Iterator[Callable[..., Visit]]:
    """A factory of pages of other users, by the names of their keys."""
    with ExitStack() as stack:

        def make(name: str, *, size: str = "wide", errors_expected: bool = False) -> Visit:
            made = stack.enter_context(chromium.visit(chrome, tree.url, size, errors_expected=errors_expected))
            made.login(tree.keys[name])
            return made

        yield make
