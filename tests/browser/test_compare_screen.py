"""The compare screen in a real browser: runs side by side, and what a person does to the table."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect
from served import Served

from grpo_engine.bundle import read_bundle, write_bundle
from grpo_engine.config import RunConfig
from grpo_engine.store import Store


def both(store: Store) -> tuple[str, str]:
    """The two recorded runs."""
    return store.resolve("First").id, store.resolve("Second").id


@pytest.fixture
def extra(served: Served) -> Iterator[str]:
    """A copy of the first run, made by another program while the app serves; gone at the end."""
    target = served.db.parent / "extra.zip"
    write_bundle(served.store, both(served.store)[0], target, images="none", checkpoint=None)
    run_id = read_bundle(served.store, target, again=True, name_suffix=" copy")
    target.unlink()
    yield run_id
    if any(run.id == run_id for run in served.store.runs()):
        served.store.delete(run_id)


def lines(page: Page, metric: str) -> list[str]:
    """Names of the runs that a chart has a line of."""
    found: list[str] = page.evaluate(
        """metric => [...document.querySelectorAll(`[data-chart="${metric}"] .g-plot`)].flatMap(
            plot => (plot.data || []).filter(trace => trace.mode === 'lines').map(trace => trace.name))""",
        metric,
    )
    return found


def open_both(page: Page, served: Served) -> tuple[str, str]:
    first, second = both(served.store)
    page.goto(f"{served.url}/#compare?runs={first},{second}")
    expect(page.locator(".g-compare .js-plotly-plot").first).to_be_visible()
    return first, second


def test_two_finished_runs_are_compared_by_curves_gains_settings_and_pictures(page: Page, served: Served) -> None:
    first, second = open_both(page, served)
    page.wait_for_function("document.querySelectorAll('.g-compare .js-plotly-plot').length === 4")
    assert lines(page, "reward_mean") == ["First", "Second"]
    gains = page.get_by_role("region", name="Gains")
    expect(gains.get_by_role("img", name=re.compile("^First: .*6 prompts$"))).to_be_visible()
    settings = page.get_by_role("region", name="Settings that differ")
    expect(settings.get_by_role("row", name=re.compile("^training.learning_rate .* 0.001 0.002$"))).to_be_visible()
    pictures = page.get_by_role("region", name="The same prompt in all runs")
    expect(pictures).to_contain_text("different seeds (0, 1)")
    cells = pictures.locator(".g-compare-cell img")
    expect(cells).to_have_count(6)
    cells.last.scroll_into_view_if_needed()
    page.wait_for_function("[...document.querySelectorAll('.g-compare-cell img')].at(-1).naturalWidth > 0")
    assert f"runs={first}%2C{second}" in page.url


def test_a_run_can_be_left_out_and_the_address_follows(page: Page, served: Served) -> None:
    first, second = open_both(page, served)
    page.get_by_role("checkbox", name="Compare First").uncheck()
    expect(page.get_by_role("group", name="Chosen runs")).not_to_contain_text("First")
    page.wait_for_function("location.hash.includes('runs=') && !location.hash.includes('%2C')")
    page.reload()
    expect(page.get_by_role("checkbox", name="Compare Second")).to_be_checked()
    expect(page.get_by_role("checkbox", name="Compare First")).not_to_be_checked()


def test_a_zoom_outlives_smoothing_and_another_run(page: Page, served: Served) -> None:
    first, _ = open_both(page, served)
    page.evaluate("Plotly.relayout(document.querySelector('.g-compare .js-plotly-plot'), {'xaxis.range': [2, 4]})")
    page.get_by_role("slider", name="Smoothing").fill("0.6")
    page.get_by_role("button", name="Leave out Second").click()
    page.wait_for_function("!document.querySelector('.g-compare .js-plotly-plot').data.some(t => t.name === 'Second')")
    shown = page.evaluate("document.querySelector('.g-compare .js-plotly-plot').layout.xaxis.range")
    assert shown == [2, 4]


def test_charts_that_are_thrown_away_leave_nothing_behind(page: Page, served: Served) -> None:
    page.add_init_script(
        """window.listening = 0;
        const add = document.addEventListener;
        document.addEventListener = function (kind, heard, options) {
            if (kind === 'grpo-theme') {
                listening += 1;
                if (options && options.signal) options.signal.addEventListener('abort', () => { listening -= 1; });
            }
            return add.call(document, kind, heard, options);
        };"""
    )
    open_both(page, served)
    four = "document.querySelectorAll('.g-compare .js-plotly-plot').length === 4"
    page.wait_for_function(four)
    before = page.evaluate("listening")
    page.evaluate("window.old = document.querySelector('.g-compare .js-plotly-plot')")
    page.get_by_role("group", name="Horizontal axis").get_by_role("button", name="Minutes").click()
    page.wait_for_function(f"!old.isConnected && {four}")
    assert page.evaluate("listening") == before
    assert page.evaluate("old._fullLayout === undefined")


def test_a_rename_is_seen_in_another_browser_and_escape_changes_nothing(
    new_page: Callable[..., Page], served: Served, extra: str
) -> None:
    name = "<b>Third</b> & <i>co</i>"
    one, other = new_page(), new_page()
    for page in (one, other):
        page.goto(f"{served.url}/#compare?runs={extra}")
        expect(page.locator(f'tr[data-run="{extra}"]')).to_be_visible()
    before = served.store.run(extra).name
    row = one.locator(f'tr[data-run="{extra}"]')
    row.hover()
    row.get_by_role("button", name="Rename").click()
    box = row.get_by_role("textbox")
    box.fill("not this")
    box.press("Escape")
    expect(row.get_by_role("link", name=before)).to_be_visible()
    assert served.store.run(extra).name == before
    row.get_by_role("button", name="Rename").click()
    box.fill(name)
    box.press("Enter")
    expect(other.locator(f'tr[data-run="{extra}"]')).to_contain_text(name)  # as text, no markup
    other.wait_for_function(  # escaped for plotly, which would take it for markup
        "document.querySelector('.g-compare .js-plotly-plot').data.some(t => t.name.startsWith('&lt;b&gt;Third'))"
    )


def test_a_name_being_typed_stays_as_it_is_while_rows_change_places_around_it(
    page: Page, served: Served, extra: str
) -> None:
    before = served.store.run(extra).name  # "First copy": between First and Second
    page.goto(f"{served.url}/#compare?runs={extra}")
    head = page.get_by_role("columnheader", name="Run", exact=True)
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "ascending")
    row, links = page.locator(f'tr[data-run="{extra}"]'), page.locator(".g-compare tbody .g-compare-c-name a")
    row.hover()
    row.get_by_role("button", name="Rename").click()
    box = row.get_by_role("textbox")
    box.fill("half a na")
    moving = served.store.create_run(RunConfig.load("tiny", ["recording.name=Aaa"]))
    try:
        expect(links.first).to_have_text("Aaa")
        expect(box).to_be_focused()
        served.store.rename(moving, "Zzz")
        expect(links.last).to_have_text("Zzz")
        expect(box).to_be_focused()
        expect(box).to_have_value("half a na")
        assert served.store.run(extra).name == before
        names = links.all_inner_texts()
        assert names == sorted(names, key=str.lower)
        box.press("Escape")
        expect(row.get_by_role("link", name=before)).to_be_visible()
    finally:
        served.store.set_state(moving, "stopped")
        served.store.delete(moving)


def test_a_run_deleted_elsewhere_leaves_the_page_that_shows_it_working(page: Page, served: Served, extra: str) -> None:
    first, _ = both(served.store)
    page.goto(f"{served.url}/#compare?runs={first},{extra}")
    page.wait_for_function("(document.querySelector('.g-compare .js-plotly-plot') || {data: []}).data.length > 1")
    served.store.delete(extra)
    expect(page.locator("#g-toasts")).to_contain_text("was deleted")
    expect(page.locator(f'tr[data-run="{extra}"]')).to_have_count(0)
    assert extra not in page.url
    page.get_by_role("checkbox", name="Compare Second").check()
    page.wait_for_function("document.querySelector('.g-compare .js-plotly-plot').data.some(t => t.name === 'Second')")


def test_an_address_of_unknown_runs_says_so_and_shows_the_rest(page: Page, served: Served) -> None:
    first, _ = both(served.store)
    page.goto(f"{served.url}/#compare?runs={first},0099-none-zzzz")
    expect(page.locator("#g-toasts")).to_contain_text("There is no run 0099-none-zzzz")
    expect(page.get_by_role("checkbox", name="Compare First")).to_be_checked()


def test_sorting_is_said_and_a_filter_hides_rows(page: Page, served: Served) -> None:
    open_both(page, served)
    head = page.get_by_role("columnheader", name="Run", exact=True)
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "ascending")
    links = page.locator(".g-compare tbody .g-compare-c-name a")
    names = links.all_inner_texts()
    assert names == sorted(names, key=str.lower) and names.index("First") < names.index("Second")
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "descending")
    assert links.all_inner_texts() == names[::-1]
    page.get_by_role("searchbox", name="Filter runs").fill("second")
    expect(page.get_by_role("row", name=re.compile("^Compare First"))).to_be_hidden()
    expect(page.get_by_role("row", name=re.compile("^Compare Second"))).to_be_visible()


def test_a_waiting_run_can_not_be_deleted_and_the_button_says_why(page: Page, served: Served) -> None:
    run_id = served.store.create_run(RunConfig.load("tiny", ["recording.name=Waiting"]))
    try:
        open_both(page, served)
        page.get_by_role("checkbox", name="Compare Waiting").check()
        button = page.get_by_role("button", name="Delete", exact=True)
        expect(button).to_be_disabled()
        expect(button).to_have_attribute("title", re.compile("Waiting is queued: stop it"))
    finally:
        served.store.set_state(run_id, "stopped")
        served.store.delete(run_id)


def test_new_points_of_a_run_that_goes_on_move_its_curve_without_a_new_chart(page: Page, served: Served) -> None:
    run_id = served.store.create_run(RunConfig.load("tiny", ["recording.name=Going on"]))
    try:
        for state in ("loading", "training"):
            served.store.set_state(run_id, state)
        served.store.add_step(run_id, 1, {"reward_mean": 20.0, "seconds": 1.0}, [])
        page.goto(f"{served.url}/#compare?runs={run_id}")
        page.wait_for_function("document.querySelector('.g-compare .js-plotly-plot') !== null")
        page.evaluate("window.kept = document.querySelector('.g-compare .js-plotly-plot')")
        for step in range(2, 6):
            served.store.add_step(run_id, step, {"reward_mean": 20.0 + step, "seconds": 1.0}, [])
            time.sleep(0.3)
        page.wait_for_function("kept.isConnected && kept.data[0].x.join() === '1,2,3,4,5'")
    finally:
        served.store.set_state(run_id, "stopped")
        served.store.delete(run_id)
