"""
Headless Chromium, and what is asked of every page in it.

Playwright brings only its driver: the browser is the machine's own (Debian: `apt install chromium`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

#: Where a browser may be, the quickest to start first. The variable CHROMIUM names another one.
_PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
_AXE = Path(__file__).parent / "vendor" / "axe.min.js"
#: The sizes at which pages are looked at, in pixels.
SIZES = {"wide": (1280, 860), "narrow": (390, 844)}
SCHEMES = ("light", "dark")
#: Milliseconds until a page shows what is expected, on a machine that does much else.
PATIENCE_MS = 30_000


class BrowserMissing(Exception):
    """There is no browser; the message says what to install."""


def find() -> str:
    """Return the path of Chromium. Raises BrowserMissing."""
    try:
        import playwright  # noqa: F401 an extra that only these tests need
    except ImportError:
        raise BrowserMissing("the package playwright is missing: pip install playwright") from None
    names = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else _PROGRAMS
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise BrowserMissing(f"no Chromium was found ({', '.join(names)}): apt install chromium, or set CHROMIUM")
    return found


@contextmanager
def browser() -> Iterator[Browser]:
    """A running browser. Raises BrowserMissing."""
    program = find()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # The sandbox of Chromium refuses to run as root, as in containers.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        made = driver.chromium.launch(executable_path=program, args=arguments)
        yield made
        made.close()


@dataclass
class Visit:
    """A page in a browser, and what went wrong in it."""

    page: Page
    #: The address of the installation.
    url: str
    #: Errors and warnings of the console, exceptions of scripts, and answers that say 4xx or 5xx.
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Listen to the page."""
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        self.page.on("requestfailed", self._on_failed)

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text} ({message.location.get('url', '')})")

    def _on_failed(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # a stream that is left, or a page that is left while it loads
            self.complaints.append(f"{request.url}: {request.failure}")

    def open(self, path: str) -> Page:
        """Go to a path, and return the page when it is loaded."""
        answer = self.page.goto(self.url + path, wait_until="load")
        assert answer is not None
        assert answer.ok, f"{path}: {answer.status}\n{self.page.content()[:2000]}"
        return self.page

    def login(self, key: str) -> None:
        """Log in with an API key."""
        self.open("/ui/login")
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Log in").click()
        self.page.wait_for_url(lambda url: "/ui/login" not in url)


@contextmanager
def visit(
    running: Browser, url: str, size: str = "wide", scheme: str = "light", *, errors_expected: bool = False
) -> Iterator[Visit]:
    """A page of its own, without cookies. Fails at its end when the console is not clean."""
    width, height = SIZES[size]
    context = running.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        timezone_id="Europe/Madrid",
        locale="en-GB",
        reduced_motion="reduce",
    )
    made = Visit(context.new_page(), url)
    try:
        yield made
        if not errors_expected:
            console_is_clean(made)
    finally:
        context.close()


def console_is_clean(made: Visit) -> None:
    """Fail when the page has complained: a script that failed, the security policy, a request without an answer."""
    assert not made.complaints, "\n".join(made.complaints)


def axe_is_clean(made: Visit) -> None:
    """Fail when axe-core has serious or critical findings about the page."""
    # `evaluate` runs outside of the page's content security policy; a script element would be refused.
    made.page.evaluate(_AXE.read_text())
    found = made.page.evaluate("async () => (await axe.run(document, {resultTypes: ['violations']})).violations")
    serious = [
        f"{one['id']} ({one['impact']}): {one['help']}: " + "; ".join(node["html"][:200] for node in one["nodes"][:5])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert not serious, f"{made.page.url}\n" + "\n".join(serious)


def fits_its_width(made: Visit) -> None:
    """Fail when the page scrolls sideways."""
    wider = made.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wider <= 0, f"{made.page.url} is {wider} pixels wider than the window"
