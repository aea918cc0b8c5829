"""The playground in a real browser: a try by clicks and keys, a rewrite by hand, a link."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from engine_runs import small
from playwright.sync_api import Page, expect
from served import Served

START = 120_000  # ms until the first try of an app on a busy machine has its models


def test_a_prompt_is_rewritten_drawn_edited_and_drawn_again(page: Page, served: Served) -> None:
    revision = served.store.revision()
    page.goto(f"{served.url}/#playground")
    prompt = page.get_by_role("textbox", name="Prompt")
    example = page.locator(".g-playground-example").first
    expect(example).to_be_visible()
    example.click()
    expect(prompt).to_have_value(example.get_attribute("title") or "")
    expect(page.get_by_role("button", name="Remove Second, last")).to_be_visible()  # the newest run's, by itself
    page.get_by_label("Add a column").select_option(label="First, step 4")
    prompt.press("Control+Enter")

    card = page.get_by_role("article")
    expect(card.locator("img")).to_have_count(4 * 2, timeout=START)
    expect(card).to_have_attribute("aria-busy", "false")
    sizes = card.locator("img").evaluate_all("all => all.map(one => [one.naturalWidth, one.clientWidth])")
    assert all(natural == 96 and shown in (192, 288, 384) for natural, shown in sizes), sizes
    expect(card.get_by_role("heading", name="First, step 4")).to_be_visible()
    tops = card.locator("section").evaluate_all(
        "all => all.map(one => one.querySelector('img').getBoundingClientRect().top)"
    )
    assert len(set(tops)) == 1, "the pictures of one latent stand in one line"

    section = card.locator("section").nth(1)
    section.get_by_role("button", name="Edit").click()
    by_hand = section.get_by_role("textbox")
    by_hand.fill("a big blue circle <b>bold</b>")
    by_hand.press("Control+Enter")
    edited = card.locator("section").nth(2)
    expect(edited.get_by_role("heading")).to_have_text("edited from Untrained policy")
    expect(edited.locator("img")).to_have_count(2, timeout=START)
    expect(edited.locator(".g-diff")).to_contain_text("<b>bold</b>")  # as text, never as markup
    expect(edited).to_contain_text("against no rewriting")
    assert served.store.revision() == revision


def test_the_address_restores_what_was_asked_and_use_again_brings_a_try_back(page: Page, served: Served) -> None:
    run = next(run for run in served.store.runs() if run.name == "First")
    asked = f"prompt=a+red+disc&columns=original,{run.id}:best&pictures=1&latent=77&sample=greedy"
    page.goto(f"{served.url}/#playground?{asked}")
    expect(page.get_by_role("button", name="Remove First, best")).to_be_visible()
    page.get_by_role("button", name="Another latent seed").click()
    page.get_by_label("Latent seed", exact=True).fill("78")
    page.get_by_label("Latent seed", exact=True).press("Tab")
    page.reload()
    expect(page.get_by_role("button", name="Remove First, best")).to_be_visible()
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("a red disc")
    expect(page.get_by_label("Latent seed", exact=True)).to_have_value("78")
    expect(page.get_by_role("button", name="Likeliest")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_label("Sampling seed", exact=True)).to_be_disabled()

    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("article").locator("img")).to_have_count(2, timeout=START)
    page.get_by_role("textbox", name="Prompt").fill("something else")
    page.get_by_role("button", name="Use again").click()
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("a red disc")
    page.get_by_role("button", name="Remove this try").click()
    expect(page.get_by_role("article")).to_have_count(0)


def test_an_empty_prompt_is_refused_at_its_field(page: Page, served: Served) -> None:
    page.goto(f"{served.url}/#playground")
    prompt = page.get_by_role("textbox", name="Prompt")
    expect(page.locator(".g-playground-example").first).to_be_visible()
    prompt.press("Control+Enter")
    expect(page.get_by_role("alert")).to_have_text("Write a prompt first, or take one of the examples.")
    expect(prompt).to_have_attribute("aria-invalid", "true")
    expect(prompt).to_be_focused()


def test_the_end_of_a_run_is_seen_though_it_comes_right_after_a_look(page: Page, served: Served) -> None:
    first = next(run for run in served.store.runs() if run.name == "First")
    run_id = served.store.create_run(small("training.steps=40", "recording.name=Going on"), prompt_set="tiny")
    for state in ("loading", "baseline", "training"):
        served.store.set_state(run_id, state)
    shutil.copytree(served.store.run_dir(first.id) / "checkpoints", served.store.run_dir(run_id) / "checkpoints")
    page.goto(f"{served.url}/#playground")
    column = page.locator(".g-playground-chip", has_text="Going on")
    expect(column).to_have_text("Going on, last so far, step 6")
    page.wait_for_function("grpo.pulse.worker.engine === 'ready'")  # from here on nothing but the run changes
    page.reload()
    expect(column).to_have_text("Going on, last so far, step 6")
    served.store.set_state(run_id, "stopped")
    expect(column).to_have_text("Going on, last, step 6")
    served.store.delete(run_id)


def test_on_a_phone_the_columns_stand_below_each_other(new_page: Callable[..., Page], served: Served) -> None:
    page = new_page()  # opened wide: where the tabs are folded away is not this test's business
    page.goto(f"{served.url}/#playground?prompt=a+red+disc&columns=original,untrained&pictures=2")
    expect(page.get_by_role("button", name="Remove Untrained policy")).to_be_visible()
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("article").locator("img")).to_have_count(4, timeout=START)
    sections = page.get_by_role("article").locator("section")
    lefts = sections.evaluate_all("all => all.map(one => one.getBoundingClientRect().left)")
    assert len(set(lefts)) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
