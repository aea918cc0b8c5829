"""Before / after, as a person uses it: look, compare, choose blind."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Page, Route, expect
from served import Served, Wire


def run_named(served: Served, name: str) -> str:
    return next(run.id for run in served.store.runs() if run.name == name)


def open_gallery(page: Page, served: Served, name: str = "First", **args: str) -> str:
    run_id = run_named(served, name)
    query = "".join(f"&{key}={value}" for key, value in args.items())
    page.goto(f"{served.url}/#gallery?run={run_id}{query}")
    expect(page.locator(".g-gallery-headline .g-gallery-big").first).to_be_visible()
    return run_id


def test_every_prompt_stands_with_its_three_arms_and_filters_keep_their_word(page: Page, served: Served) -> None:
    open_gallery(page, served)
    cards = page.locator(".g-gallery-card")
    expect(cards).to_have_count(6)
    for card in cards.all():
        expect(card.locator("figcaption")).to_have_text(["Original", "Untrained", "Trained"])
        expect(card.locator("img.g-picture")).to_have_count(3)
    page.wait_for_function("document.querySelector('.g-gallery-shot img').naturalWidth > 0")
    change = page.get_by_role("group", name="Change")
    for word in ("Gained", "Same", "Lost"):
        button = change.get_by_role("button", name=word)
        button.click()
        expect(cards).to_have_count(int(button.inner_text().split()[-1]))
    change.get_by_role("button", name="All").click()
    expect(cards).to_have_count(6)
    text = cards.first.locator(".g-gallery-prompt").inner_text()
    page.get_by_label("Search prompts and rewrites").fill(text)
    expect(cards).to_have_count(1)
    expect(cards.locator(".g-gallery-prompt")).to_have_text(text)


def test_the_large_view_is_worked_by_keys_and_restored_by_its_address(page: Page, served: Served) -> None:
    open_gallery(page, served)
    second = page.locator(".g-gallery-card").nth(1)
    second.locator(".g-gallery-shot").last.click()
    view = page.locator("dialog.g-gallery-dialog")
    prompt = second.locator(".g-gallery-prompt").inner_text()
    expect(view.locator(".g-gallery-asked")).to_have_text(prompt)
    expect(view.locator(".g-gallery-texts h3")).to_have_text(["Untrained", "Trained"])

    divider = view.get_by_role("slider")
    divider.focus()
    page.keyboard.press("ArrowLeft")
    expect(divider).to_have_attribute("aria-valuenow", "45")
    box = view.locator(".g-gallery-frame").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 20, steps=3)
    page.mouse.up()
    expect(divider).to_have_attribute("aria-valuenow", "80")

    view.locator(".g-gallery-compare").focus()
    page.keyboard.press("1")
    expect(view.locator(".g-gallery-texts h3")).to_have_text(["Original", "Trained"])
    page.keyboard.press("f")
    tag = view.locator(".g-gallery-tag")
    first = tag.inner_text()
    page.keyboard.press("Space")
    expect(tag).not_to_have_text(first)
    page.keyboard.press("Space")
    expect(tag).to_have_text(first)

    page.keyboard.press("ArrowRight")
    expect(view.locator(".g-gallery-asked")).not_to_have_text(prompt)
    page.keyboard.press("ArrowLeft")
    expect(view.locator(".g-gallery-asked")).to_have_text(prompt)
    page.reload()
    expect(page.locator("dialog.g-gallery-dialog .g-gallery-asked")).to_have_text(prompt)
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    assert "prompt=" not in page.url


def test_a_blind_choice_reveals_nothing_before_it_and_outlives_a_reload(page: Page, served: Served) -> None:
    open_gallery(page, served, "Second", view="blind")
    stage = page.locator(".g-gallery-blind")
    expect(stage.locator(".g-gallery-pair img")).to_have_count(2)
    expect(stage.locator(".g-gallery-pair")).not_to_contain_text(re.compile("trained|CLIP", re.IGNORECASE))
    before = served.store.revision()
    stage.get_by_label("Show the answer after each choice").check()
    page.keyboard.press("ArrowLeft")
    expect(stage.locator(".g-gallery-pair figcaption strong")).to_have_count(2)
    expect(stage.locator(".chosen")).to_contain_text("your choice")
    assert served.store.revision() > before
    page.keyboard.press("Enter")
    expect(stage.locator(".g-gallery-pair figcaption")).to_have_count(0)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(stage.get_by_text(re.compile(r"^2 of \d+ pairs answered"))).to_be_visible()
    page.reload()
    expect(stage.get_by_text(re.compile(r"^2 of \d+ pairs answered"))).to_be_visible()
    expect(stage.get_by_text(re.compile(r"You preferred the trained rewrite in [01] of 1 .*once"))).to_be_visible()


def choose_run(page: Page, run_id: str, wire: Wire, held: str) -> None:
    """Choose another run while such answers are held back, and leave the list: it keeps the arrow keys to itself."""
    wire.hold(held)
    chooser = page.get_by_label("Run", exact=True)
    chooser.select_option(run_id)
    chooser.blur()
    wire.held()


def test_a_pair_is_gone_once_another_run_is_chosen(page: Page, served: Served) -> None:
    open_gallery(page, served, view="blind")
    second, stage = run_named(served, "Second"), page.locator(".g-gallery-blind")
    pictures = stage.locator(".g-gallery-pair img")
    expect(pictures).to_have_count(2)
    answered: list[str] = []
    page.on("request", lambda request: answered.append(request.url) if "gallery/choose" in request.url else None)
    wire, height = Wire(page), stage.evaluate("node => node.offsetHeight")
    choose_run(page, second, wire, "gallery/blind")
    expect(pictures).to_have_count(0)
    assert stage.evaluate("node => node.offsetHeight") == pytest.approx(height, abs=60)  # its place is kept
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    wire.release()
    expect(pictures).to_have_count(2)
    expect(pictures.first).to_have_attribute("src", re.compile(second))
    assert answered == []


def test_an_answer_counts_for_the_run_whose_pair_was_shown(page: Page, served: Served) -> None:
    first, second = open_gallery(page, served, view="blind"), run_named(served, "Second")
    pictures = page.locator(".g-gallery-blind .g-gallery-pair img")
    expect(pictures).to_have_count(2)
    wire = Wire(page)
    choose_run(page, second, wire, "gallery/overview")
    with page.expect_request("**/grpo/gallery/choose") as asked:
        page.keyboard.press("ArrowLeft")  # the other run's headline is not here yet
    assert asked.value.post_data_json["run"] == first
    wire.release()
    expect(pictures.first).to_have_attribute("src", re.compile(second))


def test_pairs_that_can_not_be_had_are_told_and_can_be_asked_for_again(page: Page, served: Served) -> None:
    page.route(
        "**/grpo/gallery/blind?*", lambda route: route.fulfill(status=404, json={"error": "The disk is asleep."})
    )
    open_gallery(page, served, view="blind")
    stage = page.locator(".g-gallery-blind")
    expect(stage.get_by_text("The disk is asleep.")).to_be_visible()
    page.unroute("**/grpo/gallery/blind?*")
    stage.get_by_role("button", name="Try again").click()
    expect(stage.locator(".g-gallery-pair img")).to_have_count(2)


def test_a_tier_that_the_next_run_does_not_have_is_not_asked_of_it(page: Page, served: Served) -> None:
    first, second = open_gallery(page, served), run_named(served, "Second")
    cards = page.locator(".g-gallery-card")
    page.get_by_role("group", name="Tier", exact=True).get_by_role("button").nth(1).click()
    expect(cards).not_to_have_count(6)

    def other_tiers(route: Route) -> None:
        query = parse_qs(urlsplit(route.request.url).query)
        answer = route.fetch()
        told = answer.json()
        if query["run"] == [second]:
            told |= {"tiers": ["unheard-of"]} | ({"rows": [], "total": 0} if "tier" in query else {})
        route.fulfill(response=answer, json=told)

    page.route("**/grpo/gallery/prompts?*", other_tiers)
    page.get_by_label("Run", exact=True).select_option(second)
    expect(cards).to_have_count(6)
    page.get_by_label("Run", exact=True).select_option(first)
    expect(page.get_by_role("group", name="Tier", exact=True).get_by_role("button").first).to_have_attribute(
        "aria-pressed", "true"
    )
    expect(cards).to_have_count(6)


def test_cards_of_another_run_go_when_those_of_the_next_can_not_be_had(page: Page, served: Served) -> None:
    open_gallery(page, served)
    cards = page.locator(".g-gallery-card")
    expect(cards).to_have_count(6)
    page.route(
        "**/grpo/gallery/prompts?*", lambda route: route.fulfill(status=404, json={"error": "The disk is asleep."})
    )
    page.get_by_label("Run", exact=True).select_option(run_named(served, "Second"))
    expect(page.locator(".g-gallery-foot")).to_have_text("The disk is asleep.")
    expect(cards).to_have_count(0)
    page.unroute("**/grpo/gallery/prompts?*")
    page.get_by_role("group", name="View", exact=True).get_by_role("button", name="Pictures").click()
    expect(cards).to_have_count(6)


def test_a_point_of_the_scatter_opens_its_prompt(page: Page, served: Served) -> None:
    open_gallery(page, served, view="judge")
    point = page.locator(".g-gallery-judge .scatterlayer .point").first
    expect(point).to_be_visible()
    point.scroll_into_view_if_needed()  # one without a gain may lie at the lower edge, below the window's
    box = point.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator("dialog.g-gallery-dialog .g-gallery-asked")).to_be_visible()


def test_a_run_without_validation_offers_its_training_prompts_over_the_steps(page: Page, served: Served) -> None:
    run_id = open_gallery(page, served, view="film")
    expect(page.get_by_text("evaluation.every")).to_be_visible()
    prompt_id, text, visits = served.store.visited_prompts(run_id)[0]
    expect(page.locator(".g-gallery-film .g-gallery-asked")).to_have_text(text)
    steps = [f"Step {visit.step}" for visit in served.store.prompt_visits(run_id, prompt_id)]
    expect(page.locator(".g-gallery-strip strong")).to_have_text(steps)
    assert len(steps) == visits


def test_the_large_view_fits_a_phone(new_page: Callable[..., Page], served: Served) -> None:
    page = new_page(width=390, height=844)
    open_gallery(page, served)
    page.locator(".g-gallery-card .g-gallery-shot").first.click()
    frame = page.locator("dialog .g-gallery-frame").bounding_box()
    assert frame is not None and frame["x"] >= 0 and frame["x"] + frame["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_end_of_a_text_that_the_image_model_does_not_read_is_marked(page: Page, served: Served) -> None:
    open_gallery(page, served)
    marked = """([text, rewrite, unread, arm]) => {
        const node = grpo.gallery.rewrite(text, arm, { rewrite, unread, cut: 3 });
        const parts = [...node.querySelectorAll('.g-unread')];
        return [parts.map((part) => part.textContent), node.textContent, parts[0]?.title];
    }"""
    said = "The image model does not read its last 3 tokens."
    parts, text, title = page.evaluate(marked, ["a red ring", "a red ring by two stars", "o stars", "trained"])
    assert (parts, title) == (["o", "stars"], said)
    assert text == f"a red ring by two stars {said}"
    parts, text, _ = page.evaluate(marked, ["a red ring", "a red ring", "ring", "original"])
    assert (parts, text) == (["ring"], f"a red ring{said}")
    parts, text, _ = page.evaluate(marked, ["a red ring", "a red ring", "", "original"])
    assert (parts, text) == ([], "as written")
