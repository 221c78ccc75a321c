"""What people do on the pages, by clicks and keys, against a live installation. The API says what came of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import expect

from tests.browser.chromium import Visit
from tests.browser.tree import LARGE, SMALL, Tree
from tests.live.conftest import until


def test_a_workflow_is_tried_with_inputs(visit: Visit, tree: Tree) -> None:
    page = visit.open("/ui/workflows/ticket-triage")
    page.get_by_label("message").fill("My lamp is broken.")
    with page.expect_request("**/v1/runs") as sent:
        page.get_by_role("button", name="Run", exact=True).click()
    body = sent.value.post_data_json
    assert body["inputs"] == {"message": "My lamp is broken."}
    assert body["version"] == 2
    page.wait_for_url("**/ui/runs/*")
    run = page.url.rpartition("/")[2]
    until(lambda: tree.state_of(run) == "succeeded")
    visit.complaints.clear()  # the page of the run belongs to others


def test_the_editor_checks_while_one_types_and_stores(visit: Visit, tree: Tree) -> None:
    page = visit.open("/ui/workflows/new")
    text = page.get_by_label("Definition", exact=False)
    expect(page.get_by_role("heading", name="It is valid")).to_be_visible()
    text.fill("workflow: typed-flow\nsteps:\n  - {id: a, kind: nope}\n")
    expect(page.get_by_role("button", name="line 3").first).to_be_visible()
    text.fill("workflow: typed-flow\nsteps:\n  - {id: a, kind: noop}\n")
    expect(page.get_by_role("heading", name="It is valid")).to_be_visible()
    page.get_by_role("button", name="Save").click()
    page.wait_for_url("**/ui/workflows/typed-flow")
    assert tree.call("GET", "/v1/workflows/typed-flow")["version"] == 1


def test_a_schedule_is_fired_paused_and_resumed(visit: Visit, tree: Tree) -> None:
    page = visit.open("/ui/schedules/morning-triage")
    before = len(tree.call("GET", "/v1/schedules/morning-triage/fires")["fires"])
    with page.expect_navigation():
        page.get_by_role("button", name="Fire now").click()
    assert len(tree.call("GET", "/v1/schedules/morning-triage/fires")["fires"]) == before + 1
    page.get_by_label("Reason").fill("Holidays")
    with page.expect_navigation():
        page.get_by_role("button", name="Pause").click()
    expect(page.get_by_text("Holidays")).to_be_visible()
    with page.expect_navigation():
        page.get_by_role("button", name="Resume").click()
    assert tree.call("GET", "/v1/schedules/morning-triage")["state"] == "active"


def test_two_models_answer_side_by_side(visit: Visit) -> None:
    page = visit.open(f"/ui/playground?model={SMALL}&second={LARGE}")
    page.get_by_label("Most tokens").fill("16")
    page.get_by_label("Message", exact=True).fill("Say hello.")
    page.keyboard.press("Enter")
    for name in ("first", "second"):
        log = page.get_by_role("log", name=f"Chat with the {name} model")
        expect(log.get_by_text("16 written")).to_be_visible()
        expect(log.get_by_text("[simulated]")).to_be_visible()
        expect(log.get_by_role("link", name="its run")).to_be_visible()


def test_an_answer_has_the_form_of_a_schema(visit: Visit) -> None:
    page = visit.open(f"/ui/playground?model={SMALL}")
    page.get_by_text("JSON schema of the answer").click()
    page.get_by_role("button", name="an example").first.click()
    page.get_by_label("Message", exact=True).fill("The lamp is broken.")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("log").first.get_by_text('"kind":')).to_be_visible()


def test_a_schema_that_is_no_json_is_refused_at_once(visit: Visit) -> None:
    page = visit.open(f"/ui/playground?model={SMALL}")
    page.get_by_text("JSON schema of the answer").click()
    page.get_by_role("textbox", name="JSON schema of the answer").fill("{")
    page.get_by_label("Message", exact=True).fill("Hello")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_contain_text("JSON schema")


def test_a_model_calls_a_function_and_goes_on(visit: Visit) -> None:
    page = visit.open(f"/ui/playground?model={SMALL}")
    page.get_by_text("Functions that it may call").click()
    page.get_by_role("button", name="an example").last.click()
    page.get_by_role("combobox", name="Functions").select_option("required")
    page.get_by_label("Message", exact=True).fill("Call weather")
    page.get_by_role("button", name="Send").click()
    log = page.get_by_role("log").first
    expect(log.get_by_text("weather(")).to_be_visible()
    log.get_by_role("textbox").fill("It rains.")
    log.get_by_role("button", name="Give the results").click()
    expect(log.get_by_text("It rains.", exact=True).last).to_be_visible()
    expect(log.get_by_text("[simulated]").last).to_be_visible()


def test_an_alert_is_acknowledged(visit: Visit, tree: Tree) -> None:
    page = visit.open("/ui/alerts")
    page.get_by_role("link", name="chat-busy").first.click()
    page.get_by_label("Note").fill("I look at it")
    with page.expect_navigation():
        page.get_by_role("button", name="Acknowledge").click()
    expect(page.get_by_text("I look at it")).to_be_visible()
    states = {one["state"] for one in tree.call("GET", "/v1/alerts")["alerts"]}
    assert "acknowledged" in states


def test_alerts_are_silenced_and_the_silence_is_ended(visit: Visit, tree: Tree) -> None:
    page = visit.open("/ui/alerts")
    page.get_by_text("Silence alerts").click()
    page.get_by_label("Labels, one a line").fill("rule=chat-busy\nmodel=sim-*")
    page.get_by_label("Why").fill("a test")
    with page.expect_navigation():
        page.get_by_role("button", name="Silence").click()
    mine = [one for one in tree.call("GET", "/v1/alerts/silences")["silences"] if one["comment"] == "a test"]
    assert mine[0]["matchers"] == {"rule": "chat-busy", "model": "sim-*"}
    with page.expect_navigation():
        page.get_by_role("row", name="a test").get_by_role("button", name="End now").click()
    assert "a test" not in {one["comment"] for one in tree.call("GET", "/v1/alerts/silences")["silences"]}


def test_a_rule_is_tested_against_history(visit: Visit) -> None:
    page = visit.open("/ui/rules/chat-busy")
    page.get_by_role("combobox", name="the last").select_option("1h")
    page.get_by_role("button", name="Test").click()
    expect(page.get_by_role("img", name="When it would have fired")).to_be_visible()


def test_a_conversation_shows_what_the_model_was_told(visit: Visit, tree: Tree) -> None:
    page = visit.open(f"/ui/conversations/{tree.ids['conversation']}")
    page.get_by_text("What the model was told, and why").click()
    told = page.locator("details.recalled[open] table")
    expect(told.get_by_role("row").filter(has_text="recent")).to_contain_text("messages 1 to 4")
    expect(told.get_by_role("link", name="human")).to_be_visible()


def test_what_was_said_is_found(visit: Visit) -> None:
    page = visit.open("/ui/conversations")
    page.get_by_label("Search what was said").fill("invoice")
    page.keyboard.press("Enter")
    expect(page.get_by_text("I pay by invoice").first).to_be_visible()


def test_a_memory_is_forgotten_in_two_steps(visit: Visit, tree: Tree) -> None:
    body = {"text": "Grace collects stamps.", "user": "grace"}
    made = tree.call("POST", "/v1/memories", json=body)["id"]
    page = visit.open("/ui/memories")
    page.locator("#forget summary").click()
    page.get_by_label("That have to do with").fill("stamps")
    page.get_by_role("button", name="Look for them").click()
    with page.expect_navigation():
        page.get_by_role("button", name="Forget it").click()
    tree.call("GET", f"/v1/memories/{made}", expect=404)


def test_a_block_is_rolled_back(visit: Visit, tree: Tree) -> None:
    page = visit.open(f"/ui/blocks/{tree.ids['block']}")
    page.on("dialog", lambda dialog: dialog.accept())
    with page.expect_navigation():
        page.get_by_role("button", name="Roll back to 1").click()
    assert tree.call("GET", f"/v1/blocks/{tree.ids['block']}")["value"] == "Name: Ada.\nLives in Jaca."


def test_a_chart_is_zoomed_by_dragging(visit: Visit) -> None:
    page = visit.open("/ui/trends?window=15m")
    over = page.locator("#memory_reserved .u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 40, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 50, steps=5)
    page.mouse.up()
    expect(page.locator("#zoomed")).to_be_visible()
    page.get_by_role("button", name="Show all").click()
    expect(page.locator("#zoomed")).to_be_hidden()


def test_what_a_namespace_costs_is_found_in_two_clicks(visit: Visit) -> None:
    page = visit.open("/ui/keys")
    page.get_by_role("link", name="what it costs").first.click()
    expect(page.get_by_role("heading", name="Cost by namespace")).to_be_visible()
    expect(page.get_by_role("row", name="default").last).to_be_visible()


def test_a_batch_is_started_from_a_file(visit: Visit, tmp_path: Path) -> None:
    line = (
        '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "%s", "messages": []}}'
    )
    file = tmp_path / "requests.jsonl"
    file.write_text(line.replace("%s", SMALL))
    page = visit.open("/ui/batches")
    page.get_by_text("New batch").click()
    page.get_by_label("File of requests, JSON Lines").set_input_files(file)
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/ui/batches/batch_*")


def test_a_key_is_made_shown_once_and_revoked(visit: Visit, tree: Tree) -> None:
    page = visit.open("/ui/keys")
    page.get_by_text("New key").click()
    page.get_by_label("Name", exact=True).fill("made-here")
    page.get_by_role("checkbox", name="read").check()
    page.get_by_role("button", name="Create").click()
    expect(page.locator("#new-key-text")).to_contain_text("arr_")
    key = page.locator("#new-key-text").inner_text()
    assert tree.call("GET", "/v1/workflows", key=key)["workflows"]
    page.get_by_role("link", name="Done").click()
    page.on("dialog", lambda dialog: dialog.accept())
    with page.expect_navigation():
        page.get_by_role("row", name="made-here").get_by_role("button", name="Revoke").click()
    tree.call("GET", "/v1/workflows", key=key, expect=401)


def test_a_setting_is_changed_with_a_reason_and_reverted(visit: Visit, tree: Tree) -> None:
    page = visit.open("/ui/settings?q=log.level")
    page.locator("td details summary").first.click()
    page.get_by_label("New value, as JSON").fill('"debug"')
    page.get_by_label("Why").fill("to see more")
    with page.expect_navigation():
        page.get_by_role("button", name="Change").click()
    expect(page.get_by_text("to see more")).to_be_visible()
    body = {"version": 0, "reason": "the test is over"}
    tree.call("POST", "/v1/admin/settings/revert", json=body)


def test_a_refusal_is_in_words(visit: Visit) -> None:
    page = visit.open("/ui/settings?q=log.level")
    page.locator("td details summary").first.click()
    page.get_by_label("New value, as JSON").fill('"loud"')
    page.get_by_label("Why").fill("a mistake")
    page.get_by_role("button", name="Change").click()
    expect(page.get_by_role("alert")).to_contain_text("log.level")
    visit.complaints.clear()  # the browser notes each refusal


def test_the_audit_log_says_who_did_it(visit: Visit, tree: Tree) -> None:
    tree.call("POST", "/v1/workflows/review-digest/pause", json={}, key=tree.keys["admin"])
    tree.call("POST", "/v1/workflows/review-digest/resume", json={}, key=tree.keys["admin"])
    page = visit.open("/ui/audit?target=review-digest")
    expect(page.get_by_role("row").filter(has_text="pause").first).to_contain_text("admin")


def test_a_namespace_sees_its_own(visit_as: Callable[..., Visit], tree: Tree) -> None:
    mine = visit_as("shop", errors_expected=True)
    page = mine.open("/ui/workflows")
    expect(page.get_by_role("link", name="shop-only")).to_be_visible()
    assert page.get_by_role("link", name="ticket-triage").count() == 0
    answer = page.goto(f"{tree.url}/ui/conversations/{tree.ids['conversation']}")
    assert answer is not None
    assert answer.status == 404


def test_the_keyboard_alone_is_enough(visit: Visit) -> None:
    page = visit.open("/ui/workflows")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="To the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
