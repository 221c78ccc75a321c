"""The work of people on the main pages: a decision, a failure, a run that moves, a model that must go."""

from __future__ import annotations

from tests.browser.chromium import Visit
from tests.browser.tree import SMALL, Tree
from tests.live.conftest import until


def test_a_waiting_step_is_approved_and_its_page_follows(visit: Visit, tree: Tree) -> None:
    run = tree.call("POST", "/v1/runs", json={"workflow": "refund-approval", "inputs": {"order": "B-7"}})["id"]
    page = visit.open(f"/ui/runs/{run}")
    page.get_by_role("heading", name="ok waits for a decision").wait_for()
    page.get_by_placeholder("A comment").fill("Paid twice.")
    page.get_by_role("button", name="Approve").click()
    page.locator("h1 .state-succeeded").wait_for()
    answer = next(one for one in tree.call("GET", f"/v1/runs/{run}")["steps"] if one["key"] == "ok")["output"]
    assert (answer["approved"], answer["comment"], answer["by"]) == (True, "Paid twice.", "admin")


def test_a_rejected_step_takes_the_other_way(visit: Visit, tree: Tree) -> None:
    run = tree.call("POST", "/v1/runs", json={"workflow": "refund-approval", "inputs": {"order": "B-8"}})["id"]
    page = visit.open(f"/ui/runs/{run}")
    page.get_by_role("button", name="Reject").click()
    page.locator("h1 .state-succeeded").wait_for()
    steps = {one["key"]: one["state"] for one in tree.call("GET", f"/v1/runs/{run}")["steps"]}
    assert (steps["pay"], steps["decline"]) == ("skipped", "succeeded")


def test_why_a_run_failed_is_two_clicks_away_and_it_is_run_again(visit: Visit, tree: Tree) -> None:
    page = visit.open("/ui/overview")
    page.locator("section", has=page.get_by_role("heading", name="Failed lately")).get_by_role("link").nth(1).click()
    page.get_by_role("heading", name="Why it failed").wait_for()
    assert "the name cannot be resolved" in page.locator(".failure").inner_text()
    page.locator(".failure a").first.click()
    page.get_by_role("button", name="Run again from here").click()
    page.wait_for_url(lambda url: "step=" not in url)
    assert tree.call("GET", f"/v1/runs/{page.url.rpartition('/')[2]}")["forked_from"]


def test_a_step_of_the_graph_is_opened_by_keyboard(visit: Visit, tree: Tree) -> None:
    page = visit.open(f"/ui/runs/{tree.ids['succeeded']}")
    page.locator(".graph a").nth(2).focus()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="What it asks").wait_for()


def test_a_model_is_unloaded_and_loaded_again(visit: Visit, tree: Tree) -> None:
    page = visit.open("/ui/fleet")
    page.on("dialog", lambda dialog: dialog.accept())
    row = page.locator("tr", has_text=SMALL)
    with page.expect_navigation():
        row.get_by_role("button", name="Stop").click()
    until(lambda: not _serves(tree))
    page.locator("#load select").first.select_option(SMALL)
    page.get_by_role("button", name="Load", exact=True).click()
    until(lambda: _serves(tree))
    page.locator("tr", has_text=SMALL).locator(".state-serving").wait_for()


def test_light_and_dark_are_chosen_and_kept(visit: Visit) -> None:
    page = visit.open("/ui/overview")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Dark").click()
    visit.open("/ui/runs")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.get_by_role("button", name="Light").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == before


def test_nothing_is_asked_while_nobody_looks(visit: Visit, tree: Tree) -> None:
    page = visit.open(f"/ui/runs/{tree.ids['approval']}")
    asked: list[str] = []
    page.evaluate("Object.defineProperty(document, 'hidden', {get: () => true})")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.on("request", lambda request: asked.append(request.url))
    page.clock.install()
    page.clock.fast_forward("01:00:00")
    assert asked == []


def _serves(tree: Tree) -> bool:
    return any(one["model"] == SMALL and one["state"] == "serving" for one in tree.call("GET", "/v1/pools")["pools"])
