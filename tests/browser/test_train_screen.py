"""The train screen as a person uses it: changing settings, faults at their fields, prompt sets, starting once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_runs import SMALL
from playwright.sync_api import Locator, Page, expect
from served import Served, Wire

LONG = 60_000  # ms; the engine's imports on a busy machine


def open_train(page: Page, served: Served) -> None:
    page.goto(f"{served.url}/#train")
    expect(page.get_by_role("button", name=re.compile("^(Start|Queue behind)"))).to_be_visible()


def setting(page: Page, label: str) -> Locator:
    return page.get_by_label(label, exact=True)


def start_button(page: Page) -> Locator:
    return page.locator(".g-train-start")


def tiny_steps(page: Page) -> None:
    """The smallest run there is, typed into the form's draft rather than field by field."""
    values = dict(entry.split("=", 1) for entry in SMALL)
    page.evaluate("values => grpo.remember('train.draft', {preset: 'tiny', values})", values)
    page.reload()
    expect(page.get_by_text(re.compile(r"^\d+ changes$"))).to_be_visible()


def stop_all(served: Served) -> None:
    """Those that wait are told too: they end as soon as their turn comes."""
    for run in served.store.active_runs():
        served.store.post_command(run.id, "stop")
    deadline = time.monotonic() + 120
    while served.store.active_runs():
        assert time.monotonic() < deadline, "a run did not stop"
        time.sleep(0.2)


def test_a_fault_stands_at_its_field_and_start_leads_to_it(page: Page, served: Served) -> None:
    open_train(page, served)
    before = len(served.store.runs())
    setting(page, "Learning rate").fill("1e-6")
    setting(page, "KL penalty").fill("lots")
    expect(setting(page, "KL penalty")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_text("Should be a valid number.")).to_be_visible()
    expect(page.get_by_text("One setting needs a correction first.")).to_be_visible()
    start_button(page).click()
    expect(setting(page, "KL penalty")).to_be_focused()
    assert len(served.store.runs()) == before
    expect(setting(page, "Learning rate")).to_have_value("1e-6")  # as typed
    expect(page.get_by_text("2 changes")).to_be_visible()
    page.get_by_role("button", name="KL penalty is changed; back to 0.05, as in the preset").click()
    expect(setting(page, "KL penalty")).to_have_value("0.05")
    expect(page.get_by_text("1 change", exact=True)).to_be_visible()
    page.reload()
    expect(setting(page, "Learning rate")).to_have_value("1e-6")  # a reload loses nothing
    page.get_by_role("button", name="Reset all").click()
    expect(setting(page, "Learning rate")).to_have_value("0.001")
    expect(page.get_by_text("As it is", exact=True)).to_be_visible()


def test_any_setting_is_found_by_a_word_and_marked_when_changed(page: Page, served: Served) -> None:
    open_train(page, served)
    page.get_by_text("All settings").click()
    page.get_by_label("Search all settings").fill("wider warm")
    expect(page.get_by_text("No setting has these words")).to_be_visible()
    page.get_by_label("Search all settings").fill("rate")
    expect(setting(page, "Warmup steps")).to_be_visible()
    expect(setting(page, "Weight decay")).to_be_hidden()
    setting(page, "Warmup steps").fill("7")
    expect(page.get_by_label("Warmup steps: 5 becomes 7")).to_be_visible()
    page.locator(".g-train-rest").get_by_role("button", name="Learning rate").click()  # it stands above
    expect(setting(page, "Learning rate")).to_be_focused()


def test_a_method_sets_its_parts_and_is_told_by_them(page: Page, served: Served) -> None:
    open_train(page, served)
    method, scaling = setting(page, "Method"), setting(page, "Reward scaling")
    expect(method).to_have_value("grpo")
    method.select_option("Dr. GRPO")
    expect(scaling).to_have_value("none")
    expect(page.get_by_label("Aggregation: sequence becomes constant")).to_be_visible()
    method.select_option("DAPO")
    expect(scaling).to_have_value("group")
    expect(setting(page, "KL penalty")).to_have_value("0")
    setting(page, "KL penalty").fill("0.01")
    expect(method).to_have_value("")
    expect(method.locator("option:checked")).to_have_text("own mix")
    page.reload()
    expect(method.locator("option:checked")).to_have_text("own mix")
    method.select_option("GRPO")
    expect(page.get_by_label(re.compile("^Clip high: "))).to_have_count(0)


def test_switching_the_preset_asks_before_changes_are_dropped(page: Page, served: Served) -> None:
    open_train(page, served)
    setting(page, "Steps").fill("7")
    setting(page, "Preset").select_option("three-gpu")
    page.get_by_role("button", name="Cancel").click()
    expect(setting(page, "Preset")).to_have_value("tiny")
    expect(setting(page, "Steps")).to_have_value("7")
    setting(page, "Preset").select_option("three-gpu")
    page.get_by_role("button", name="Switch").click()
    expect(setting(page, "Steps")).to_have_value("200")
    expect(setting(page, "Learning rate")).to_have_value("1e-6")


def test_a_set_is_uploaded_edited_and_saved_without_touching_the_one_it_came_from(
    page: Page, served: Served, tmp_path: Path
) -> None:
    open_train(page, served)
    file = tmp_path / "cats & <b>dogs<.txt"
    file.write_text("a <i>red</i> cat\na blue dog\nA BLUE DOG\n", encoding="utf-8")
    upload = page.get_by_label("Prompt file")
    upload.set_input_files(file)
    expect(page.get_by_text("line 3:")).to_be_visible()
    file.write_text("a <i>red</i> cat\na blue dog\na green frog\n", encoding="utf-8")
    upload.set_input_files(file)
    expect(page.locator("#g-train-prompts")).to_have_value(re.compile(r"prompts.cats-b-dogs\.jsonl$"))
    page.get_by_role("button", name="View and edit").click()
    expect(page.get_by_label("Text of prompt 1")).to_have_value("a <i>red</i> cat")
    page.get_by_label("Text of prompt 3").fill("a blue dog.")
    page.get_by_role("button", name="Add a prompt").click()
    page.get_by_label("Text of prompt 4").fill("two purple cows")
    page.get_by_role("button", name="Save as a new set").click()
    page.get_by_label("Name", exact=True).fill("farm")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_role("alert").get_by_text("Row 3:")).to_be_visible()
    page.get_by_label("Text of prompt 3").fill("a green frog")
    page.get_by_role("button", name="Save as a new set").click()
    page.get_by_label("Name", exact=True).fill("farm")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator("#g-train-prompts")).to_have_value(re.compile(r"prompts.farm\.jsonl$"))
    saved = (served.db.parent / "prompts" / "farm.jsonl").read_text(encoding="utf-8")
    assert saved.count("\n") == 4
    original = (served.db.parent / "prompts" / "cats-b-dogs.jsonl").read_text(encoding="utf-8")
    assert "two purple cows" not in original


def test_a_prompt_set_whose_question_was_lost_is_read_at_the_next_click(page: Page, served: Served) -> None:
    open_train(page, served)
    expect(page.get_by_role("table", name=re.compile("^Prompts of tiny"))).to_be_visible()
    wire = Wire(page)
    wire.lose(r"train/prompts\?")
    page.locator("#g-train-prompts").select_option("general")
    expect(page.locator(".g-train-problems").get_by_text("The app does not answer")).to_be_visible()
    wire.mend()
    page.get_by_role("button", name="View and edit").click()
    expect(page.get_by_role("dialog", name="Prompts: general")).to_be_visible()
    expect(page.get_by_text("The app does not answer")).to_have_count(0)


def test_an_answer_on_a_prompt_set_that_is_not_chosen_any_more_is_dropped(page: Page, served: Served) -> None:
    open_train(page, served)
    wire = Wire(page)
    wire.hold("value=general")
    page.locator("#g-train-prompts").select_option("general")
    wire.held()
    with page.expect_response(re.compile(r"train/prompts\?value=tiny")):
        page.locator("#g-train-prompts").select_option("tiny")
    page.wait_for_timeout(300)  # the page has read it
    wire.release()
    page.wait_for_timeout(300)
    page.get_by_role("button", name="View and edit").click()
    expect(page.get_by_role("dialog", name="Prompts: tiny")).to_be_visible()


def test_another_run_like_a_recorded_one_is_set_up_and_asks_before_changes_are_dropped(
    page: Page, served: Served
) -> None:
    runs = {run.name: run.id for run in served.store.runs()}
    page.goto(f"{served.url}/#live?run={runs['First']}")
    expect(page.locator(".g-live h1")).to_have_text("First")
    page.get_by_role("button", name="Train another like it").click()
    expect(setting(page, "Steps")).to_have_value("6")
    expect(setting(page, "Learning rate")).to_have_value("0.001")
    page.wait_for_function("location.hash === '#train'")  # a reload keeps what is changed from here on
    for answer, rate in (("Cancel", "0.001"), ("Take over", "0.002")):
        page.goto(f"{served.url}/#live?run={runs['Second']}")
        expect(page.locator(".g-live h1")).to_have_text("Second")
        page.get_by_role("button", name="Train another like it").click()
        page.get_by_role("dialog").get_by_role("button", name=answer, exact=True).click()
        expect(setting(page, "Learning rate")).to_have_value(rate)


def test_what_is_saved_as_a_preset_can_be_chosen_in_another_browser(
    new_page: Callable[..., Page], served: Served
) -> None:
    page = new_page()
    open_train(page, served)
    setting(page, "Temperature").fill("1.3")
    page.get_by_role("button", name="Save as preset").click()
    page.get_by_label("Name", exact=True).fill("Warm")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("can't be a preset's name")).to_be_visible()
    page.get_by_label("Name", exact=True).fill("warm")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(setting(page, "Preset")).to_have_value("warm")
    expect(page.get_by_text("As it is", exact=True)).to_be_visible()
    other = new_page()
    open_train(other, served)
    setting(other, "Preset").select_option("warm")
    expect(setting(other, "Temperature")).to_have_value("1.3")


def test_the_column_shows_where_the_models_go_and_what_the_run_takes(page: Page, served: Served) -> None:
    open_train(page, served)
    tiny_steps(page)
    placement = page.get_by_label("Placement and memory")
    expect(placement.get_by_text("Image model")).to_be_visible(timeout=LONG)
    expect(placement.get_by_text(re.compile("free, fits$"))).to_be_visible()
    expect(page.get_by_text(re.compile("^about "))).to_be_visible()  # from the recorded runs, scaled
    expect(page.get_by_text(re.compile("^Scaled from .* in proportion"))).to_be_visible()
    setting(page, "Prompts a step").fill("4000")  # more than the set has: only the engine knows
    expect(setting(page, "Prompts a step")).to_have_attribute("aria-invalid", "true", timeout=LONG)
    expect(page.get_by_text("It can\u2019t start like this: see Placement and memory.")).to_be_visible()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_double_click_starts_one_run_and_a_second_browser_queues_behind_it(
    new_page: Callable[..., Page], served: Served
) -> None:
    page = new_page()
    open_train(page, served)
    tiny_steps(page)
    before = {run.id for run in served.store.runs()}
    setting(page, "Steps").fill("400")
    page.get_by_label("Run name").fill("<b>Twice</b> clicked")
    start_button(page).dblclick()
    expect(page.locator("#tab-live-button")).to_have_attribute("aria-selected", "true", timeout=LONG)
    expect(page.get_by_text("<b>Twice</b> clicked has started.")).to_be_visible()
    fresh = [run for run in served.store.runs() if run.id not in before]
    assert [run.name for run in fresh] == ["<b>Twice</b> clicked"]
    other = new_page(width=390, height=844)
    open_train(other, served)
    tiny_steps(other)
    expect(start_button(other)).to_have_text("Queue behind <b>Twice</b> clicked")
    assert start_button(other).bounding_box()["y"] < 844  # type: ignore[index]
    start_button(other).click()
    expect(other.get_by_text(re.compile("is queued behind <b>Twice</b> clicked"))).to_be_visible(timeout=LONG)
    assert len(served.store.runs()) == len(before) + 2
    stop_all(served)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_empty_database_offers_a_first_run_that_starts_at_a_click_while_the_engine_loads(
    new_page: Callable[..., Page], serve: Callable[..., Served]
) -> None:
    fresh = serve()
    page = new_page()
    page.goto(fresh.url)
    card = page.get_by_label("First run")
    expect(card).to_be_visible()
    card.evaluate(
        """node => {
            window.said = [];
            new MutationObserver(() => window.said.push(node.querySelector('button').textContent))
                .observe(node, { subtree: true, childList: true, characterData: true });
        }"""
    )
    card.get_by_role("button", name="Start the first run").click()
    page.wait_for_function("window.said.length", timeout=LONG)
    assert page.evaluate("window.said[0]").startswith("Starting"), "a click is answered before the engine is there"
    expect(page.locator("#tab-live-button")).to_have_attribute("aria-selected", "true", timeout=2 * LONG)
    (run,) = [run for run in fresh.store.runs() if run.source == "local"]
    assert (run.name, run.total_steps) == ("First run", 20)
    page.goto(f"{fresh.url}/#train")
    expect(start_button(page)).to_have_text("Queue behind First run")
    expect(card).to_be_hidden()
    stop_all(fresh)
