"""What people change from lists and by documents, and the keys that lead through the pages."""

from __future__ import annotations

from tests.browser.chromium import Visit
from tests.browser.tree import SMALL, Tree
from tests.live.conftest import until


def test_only_the_chosen_runs_are_cancelled(visit: Visit, tree: Tree) -> None:
    chosen, other = (
        tree.call("POST", "/v1/runs", json={"workflow": "refund-approval", "inputs": {"order": f"C-{number}"}})["id"]
        for number in range(2)
    )
    page = visit.open("/ui/runs?workflow=refund-approval&since=1h")
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#chosen-runs").get_by_role("button", name="Cancel").click()
    page.get_by_text("Nothing is chosen.").wait_for()
    page.locator(f"input[value='{chosen}']").check()
    with page.expect_navigation():
        page.locator("#chosen-runs").get_by_role("button", name="Cancel").click()
    assert tree.state_of(chosen) == "cancelled"
    assert tree.state_of(other) == "running"


def test_a_run_is_retried_paused_and_cancelled(visit: Visit, tree: Tree) -> None:
    page = visit.open(f"/ui/runs/{tree.ids['cancelled']}")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("button", name="Pause").click()
    page.locator("h1 .state-paused").wait_for()
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.locator("h1 .state-cancelled").wait_for()


def test_a_rule_and_a_schedule_are_written_here(visit: Visit, tree: Tree) -> None:
    page = visit.open("/ui/alerts")
    page.locator("#new-rule summary").click()
    page.get_by_role("button", name="Store the rule").click()
    page.wait_for_url("**/ui/rules/first-tokens-late*")
    assert tree.call("GET", "/v1/rules/first-tokens-late")["dry_run"]
    page = visit.open("/ui/schedules")
    page.locator("#new-schedule summary").click()
    text = page.locator("#new-schedule textarea")
    page.get_by_role("button", name="Store the schedule").click()
    page.locator("#new-schedule [role=alert]").get_by_text("name-of-a-workflow").wait_for()
    text.fill(text.input_value().replace("name-of-a-workflow", "price-lookup"))
    page.get_by_role("button", name="Store the schedule").click()
    page.wait_for_url("**/ui/schedules/nightly*")
    visit.complaints.clear()  # the console says that the first document was refused


def test_a_model_is_kept_pinned_and_let_go(visit: Visit, tree: Tree) -> None:
    tree.call("POST", "/v1/pools", json={"model": SMALL, "keep": True})
    page = visit.open("/ui/fleet")
    page.on("dialog", lambda dialog: dialog.accept())
    section = page.locator("section", has=page.get_by_role("heading", name="Kept running"))
    section.get_by_role("button", name="Pin", exact=True).click()
    section.get_by_role("button", name="Unpin").click()
    section.get_by_role("button", name="Pin", exact=True).wait_for()
    section.get_by_role("button", name="No longer").click()
    until(lambda: all(one["model"] != SMALL for one in tree.call("GET", "/v1/fleet")["targets"]))


def test_keys_lead_through_the_pages(visit: Visit) -> None:
    page = visit.open("/ui/overview")
    page.keyboard.press("?")
    page.get_by_role("dialog").get_by_text("Rules and alerts").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.press("r")
    page.wait_for_url("**/ui/runs")
    page.keyboard.press("/")
    page.keyboard.type("gr?")
    assert page.locator("input[type=search]").input_value() == "gr?"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement === document.body")
