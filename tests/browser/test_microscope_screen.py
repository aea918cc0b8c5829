"""The group microscope in a real browser: which step it shows, how it is worked, what a token tells."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Locator, Page, expect
from served import Served, Wire


def open_microscope(page: Page, served: Served) -> Locator:
    """A microscope of its own on the live screen; ``page`` has it as ``microscope``, what it told in ``told``."""
    page.goto(f"{served.url}/#live")
    expect(page.locator(".g-live")).to_be_visible()
    page.evaluate(
        """() => {
            const host = document.createElement('div');
            host.id = 'tested';
            document.querySelector('.g-live').replaceChildren(host);
            window.microscope = grpo.microscope(host);
            window.told = [];
            microscope.onStep = (step) => told.push(step);
        }"""
    )
    return page.locator("#tested")


def first_run(served: Served) -> str:
    return next(run.id for run in served.store.runs() if run.name == "First")


def test_the_newest_step_is_followed_until_the_person_picks_one(page: Page, served: Served) -> None:
    shown, run = open_microscope(page, served), first_run(served)
    expect(shown).to_contain_text("No run chosen")
    page.evaluate("run => microscope.latest(run, 3)", run)
    number, follow = shown.get_by_label("Step number"), shown.get_by_role("button", name="Follow newest")
    expect(number).to_have_value("3")
    expect(follow).to_have_attribute("aria-pressed", "true")
    prompts = [row.prompt for row in served.store.rollouts(run, 3) if row.k == 0]
    expect(shown.locator("header h3")).to_have_text(prompts)
    page.evaluate("run => microscope.latest(run, 4)", run)
    expect(number).to_have_value("4")

    slider = shown.get_by_role("slider", name="Step shown")
    slider.focus()
    page.keyboard.press("Home")
    expect(number).to_have_value("1")
    page.keyboard.press("ArrowRight")
    expect(number).to_have_value("2")
    expect(shown.locator("header h3")).to_have_text([row.prompt for row in served.store.rollouts(run, 2) if row.k == 0])
    page.wait_for_function("told.at(-1) === 2")
    page.evaluate("run => microscope.latest(run, 6)", run)
    expect(slider).to_have_attribute("max", "6")
    expect(number).to_have_value("2")
    page.keyboard.press("End")
    expect(number).to_have_value("6")
    shown.get_by_role("button", name="Step before").click()
    expect(number).to_have_value("5")
    expect(follow).to_have_attribute("aria-pressed", "false")
    follow.click()
    expect(number).to_have_value("6")
    expect(follow).to_have_attribute("aria-pressed", "true")


def test_a_step_asked_for_is_shown_and_stays_and_one_that_is_not_there_is_told(page: Page, served: Served) -> None:
    shown, run = open_microscope(page, served), first_run(served)
    page.evaluate("run => { microscope.show(run, 2); microscope.latest(run, 6); }", run)
    expect(shown.get_by_label("Step number")).to_have_value("2")
    expect(shown.locator("article")).to_have_count(9)
    page.evaluate("run => microscope.show(run, 500)", run)
    expect(shown).to_contain_text("has no step 500; it has steps 1 to 6")
    page.evaluate("run => microscope.show(run, 3)", run)
    expect(shown.locator("article").first).to_be_visible()
    page.evaluate("microscope.clear()")
    expect(shown).to_contain_text("No run chosen")


def test_a_step_whose_answer_was_lost_is_shown_when_it_is_chosen_again(page: Page, served: Served) -> None:
    shown, run = open_microscope(page, served), first_run(served)
    page.evaluate("run => microscope.latest(run, 6)", run)
    expect(shown.locator("article").first).to_be_visible()
    wire = Wire(page)
    wire.lose("microscope/step")
    page.evaluate("microscope.pick(5)")
    expect(shown.get_by_label("Group microscope")).not_to_have_attribute("aria-busy", "true")
    wire.mend()
    page.evaluate("microscope.pick(5)")
    expect(shown.locator("header h3")).to_have_text([row.prompt for row in served.store.rollouts(run, 5) if row.k == 0])


def test_rewrites_stand_by_reward_or_as_sampled_each_with_its_figures_and_picture(page: Page, served: Served) -> None:
    shown, run = open_microscope(page, served), first_run(served)
    page.evaluate("run => microscope.show(run, 6)", run)
    rows = [row for row in served.store.rollouts(run, 6) if row.g == 0]
    cards = shown.locator("section[data-g='0'] article")
    expect(cards).to_have_count(3)
    best = sorted(rows, key=lambda row: (-(row.reward or 0.0), row.k))
    assert [card.get_attribute("data-k") for card in cards.all()] == [str(row.k) for row in best]
    for card, row in zip(cards.all(), best, strict=True):
        assert row.advantage is not None and row.token_ids is not None
        expect(card).to_contain_text(f"{row.advantage:+.2f}".replace("-", "\u2212"))
        expect(card).to_contain_text(f"{len(row.token_ids)} tokens")
        assert card.locator("img").evaluate("img => img.decode().then(() => img.naturalWidth)") == 96
    shown.get_by_role("button", name="As sampled").click()
    assert [card.get_attribute("data-k") for card in cards.all()] == ["0", "1", "2"]
    shown.get_by_role("button", name="Plain").click()
    for card, row in zip(cards.all(), rows, strict=True):
        expect(card).to_contain_text(row.rewrite or row.completion)


def test_tokens_are_reached_by_keys_and_tell_their_figures(page: Page, served: Served) -> None:
    shown, run = open_microscope(page, served), first_run(served)
    page.evaluate("run => microscope.show(run, 6)", run)
    shown.get_by_role("button", name="Tokens").click()
    expect(shown).to_contain_text("Training so far agrees with this group")
    card = shown.locator("section[data-g='0'] article").first
    row = served.store.rollouts(run, 6)[int(card.get_attribute("data-k") or 0)]
    assert row.tokens is not None and row.logprobs is not None and row.shift is not None
    tokens = card.locator(".g-microscope-token")
    assert tokens.all_text_contents() == list(row.tokens)
    tip = page.locator(".g-microscope-tip")
    expect(tip).to_be_hidden()
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(tip).to_be_visible()
    expect(tip).to_contain_text(f"{round(float(row.shift[1]), 4):+.3f}".replace("-", "\u2212"))
    shown.get_by_role("button", name="Plain").focus()
    expect(tip).to_be_hidden()


def test_what_did_not_change_is_not_drawn_again(page: Page, served: Served) -> None:
    shown, run = open_microscope(page, served), first_run(served)
    page.evaluate("run => microscope.latest(run, 6)", run)
    expect(shown.locator("article")).to_have_count(9)
    page.evaluate(
        """() => {
            window.changes = 0;
            new MutationObserver((list) => { changes += list.length; }).observe(
                document.querySelector('#tested'),
                {subtree: true, childList: true, characterData: true, attributes: true});
        }"""
    )
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for _ in range(3):
        page.evaluate("run => microscope.latest(run, 6)", run)
        page.wait_for_timeout(100)
    # the screen's own microscope is behind this one, at the newest run, and may still be asking for its step
    assert not [url for url in asked if f"microscope/step?run={run}" in url]
    assert page.evaluate("changes") == 0


def test_a_picture_opens_large_and_arrow_keys_go_through_the_rewrites(page: Page, served: Served) -> None:
    shown, run = open_microscope(page, served), first_run(served)
    page.evaluate("run => microscope.show(run, 6)", run)
    rows = [row for row in served.store.rollouts(run, 6) if row.g == 0]
    best = sorted(rows, key=lambda row: (-(row.reward or 0.0), row.k))
    first = shown.get_by_role("button", name=f"Open rewrite {best[0].k + 1}").first
    first.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("1 of 9")
    expect(dialog).to_contain_text(best[0].prompt)
    page.keyboard.press("ArrowRight")
    expect(dialog).to_contain_text("2 of 9")
    expect(dialog).to_contain_text(f"rewrite {best[1].k + 1}")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(dialog).to_contain_text("9 of 9")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(first).to_be_focused()


def test_an_arrow_on_a_token_of_the_large_view_moves_between_tokens_only(page: Page, served: Served) -> None:
    shown, run = open_microscope(page, served), first_run(served)
    page.evaluate("run => microscope.show(run, 6)", run)
    shown.locator("article button").first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("1 of 9")
    tokens = dialog.locator(".g-microscope-token")
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # before the first token there is none: the key is the tokens' all the same
    expect(tokens.first).to_be_focused()
    expect(dialog).to_contain_text("1 of 9")


@pytest.mark.parametrize("width", [1440, 1024, 390])
def test_the_microscope_is_never_wider_than_its_window(
    new_page: Callable[..., Page], served: Served, width: int
) -> None:
    page = new_page(width=width)
    shown = open_microscope(page, served)
    page.evaluate("run => microscope.show(run, 6)", first_run(served))
    for view in ("Changes", "Tokens", "Plain"):
        shown.get_by_role("button", name=view).click()
        expect(shown.locator("article")).to_have_count(9)
        overhang = "node => Math.max(...[...node.querySelectorAll('*')].map((n) => n.getBoundingClientRect().right))"
        assert shown.evaluate(overhang) <= width
