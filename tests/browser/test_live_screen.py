"""The live screen in a real browser, on a run that another process carries on: this one, step by step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_runs import small
from playwright.sync_api import Locator, Page, expect
from served import Served, Wire, later

from grpo_engine.recorder import STEP_METRICS
from grpo_engine.store import Store

NAME = "Watched <b>run</b>"


@dataclass
class Going:
    """A run in training; `step` records its next step, with the metrics and groups of a recorded run's."""

    store: Store
    id: str
    source: str

    def step(self, count: int = 1) -> None:
        for number in range(self.store.run(self.id).step + 1, self.store.run(self.id).step + 1 + count):
            of = (number - 1) % self.store.run(self.source).step + 1
            with self.store.read() as db:
                (metrics,) = db.query("SELECT * FROM steps WHERE run_id = ? AND step = ?", [self.source, of])
                rows = list(db.query("SELECT * FROM rollouts WHERE run_id = ? AND step = ?", [self.source, of]))
            rollouts = [{k: v for k, v in row.items() if k not in ("id", "run_id", "step")} for row in rows]
            self.store.add_step(self.id, number, {name: metrics[name] for name in STEP_METRICS}, rollouts)


@pytest.fixture
def going(served: Served) -> Iterator[Going]:
    """A run of this process in the served database; it is gone afterwards."""
    run_id = served.store.create_run(small("training.steps=40", f"recording.name={NAME}"), prompt_set="tiny")
    for state in ("loading", "baseline", "training"):
        served.store.set_state(run_id, state)
    run = Going(served.store, run_id, run_named(served, "First"))
    run.step(3)
    yield run
    if served.store.run(run_id).active:
        served.store.set_state(run_id, "stopped")
    served.store.delete(run_id)


def run_named(served: Served, name: str) -> str:
    return next(run.id for run in served.store.runs() if run.name == name)


def plot(page: Page, name: str) -> Locator:
    """The plotly element of a chart, once it is drawn."""
    found = page.locator(f"[data-chart={name}] .js-plotly-plot")
    expect(found.locator(".xaxislayer-above")).to_be_attached()
    return found


def curve(page: Page, chart: str, key: str) -> list[Any]:
    """[x of the trace, its visibility] as plotly has it."""
    found: list[Any] = plot(page, chart).evaluate(
        "(node, key) => { const t = node.data.find((d) => d.uid === key); return [[...t.x], t.visible ?? true]; }",
        key,
    )
    return found


def reaches(page: Page, chart: str, key: str, step: int) -> None:
    """Wait until a curve has come to ``step``."""
    page.wait_for_function(
        """([chart, key, step]) => {
            const node = document.querySelector(`[data-chart=${chart}] .js-plotly-plot`);
            const trace = node && node.data.find((d) => d.uid === key);
            return trace && trace.x.at(-1) === step;
        }""",
        arg=[chart, key, step],
    )


def zoom_in(page: Page, chart: str) -> None:
    """Drag over the middle of a chart, as a person zooms."""
    box = plot(page, chart).locator(".nsewdrag").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * 0.7, steps=5)
    page.mouse.up()
    page.wait_for_function(
        "chart => document.querySelector(`[data-chart=${chart}] .js-plotly-plot`).layout.xaxis.autorange !== true",
        arg=chart,
    )


def test_zoom_and_legend_are_kept_while_ten_updates_come_in(page: Page, served: Served, going: Going) -> None:
    page.goto(f"{served.url}/#live?run={going.id}")
    reaches(page, "reward", "reward.reward_mean", 3)
    reward = plot(page, "reward")
    reward.evaluate("node => { node.tested = true; }")
    zoom_in(page, "reward")
    zoom = "node => [...node.layout.xaxis.range, ...node.layout.yaxis.range]"
    before = reward.evaluate(zoom)
    plot(page, "loss").locator(".legendtoggle").nth(1).click()
    page.wait_for_function(
        "document.querySelector('[data-chart=loss] .js-plotly-plot').data.some((t) => t.visible === 'legendonly')"
    )
    for step in range(4, 14):
        going.step()
        reaches(page, "reward", "reward.reward_mean", step)
    assert reward.evaluate(zoom) == before
    assert reward.evaluate("node => node.tested") is True  # the same element: nothing was mounted anew
    reaches(page, "loss", "loss.policy_loss", 13)
    assert curve(page, "loss", "loss.policy_loss")[1] == "legendonly"
    assert curve(page, "loss", "loss.total_loss")[1] is True
    page.get_by_label("Smoothing").fill("0")
    page.get_by_label("Smoothing").fill("0.9")
    assert reward.evaluate(zoom) == before
    assert curve(page, "loss", "loss.policy_loss")[1] == "legendonly"
    reward.locator(".nsewdrag").first.dblclick()
    page.wait_for_function("document.querySelector('[data-chart=reward] .js-plotly-plot').layout.xaxis.range[1] > 12")


def test_a_click_on_a_chart_moves_charts_pictures_microscope_and_address_to_that_step(
    page: Page, served: Served
) -> None:
    first = run_named(served, "First")
    page.goto(f"{served.url}/#live?run={first}")
    reaches(page, "judge", "judge.reward_mean", 6)
    judge = plot(page, "judge")
    judge.scroll_into_view_if_needed()
    box = judge.locator(".nsewdrag").first.bounding_box()
    assert box is not None
    at = judge.evaluate("node => node._fullLayout.xaxis.d2p(2)")
    page.mouse.move(box["x"] + at, box["y"] + box["height"] / 2)
    page.wait_for_timeout(300)  # the pointer rests before it clicks, as a person's does
    page.mouse.down()
    page.mouse.up()
    expect(page.get_by_label("Step number")).to_have_value("2")
    prompts = [row.prompt for row in served.store.rollouts(first, 2) if row.k == 0]
    expect(page.locator(".g-microscope header h3")).to_have_text(prompts)
    expect(page.locator(".g-live-pictures h2")).to_have_text("Step 2: best and worst")
    marks = "() => [...document.querySelectorAll('.js-plotly-plot')].map((n) => (n.layout.shapes || []).at(-1)?.x0)"
    page.wait_for_function(f"({marks})().every((x) => x === 2)")
    assert page.evaluate("location.hash") == f"#live?run={first}&step=2"

    page.reload()
    expect(page.get_by_label("Step number")).to_have_value("2")
    page.get_by_role("button", name="Step after").click()
    page.wait_for_function(f"({marks})().length === 7 && ({marks})().every((x) => x === 3)")
    expect(page.locator(".g-live-pictures h2")).to_have_text("Step 3: best and worst")
    page.locator(".g-live-pictures").get_by_role("button", name="Newest").click()
    expect(page.get_by_label("Step number")).to_have_value("6")
    page.wait_for_function(f"({marks})().every((x) => x === undefined)")
    assert page.evaluate("location.hash") == f"#live?run={first}"


def test_pages_see_a_run_of_another_process_and_what_was_asked_of_it(
    new_page: Callable[..., Page], served: Served, going: Going
) -> None:
    mine, other = new_page(), new_page(width=390, height=844)
    for page in (mine, other):
        page.goto(f"{served.url}/#live")
        expect(page.locator(".g-live h1")).to_have_text(NAME)  # as text: its tags are no markup
        expect(page.locator(".g-live-count")).to_contain_text("3 / 40")
    served.store.set_phase(going.id, "rendering", 1, 2)
    for page in (mine, other):
        expect(page.locator(".g-live-phases [aria-current]")).to_have_text("rendering1 of 2 groups")
    going.step()
    expect(other.locator(".g-live-count")).to_contain_text("4 / 40", timeout=4000)
    expect(other.locator(".g-live-facts")).to_contain_text("steps a minute")

    mine.get_by_role("button", name="Pause").click()
    for page in (mine, other):
        expect(page.locator("[data-command=pause]")).to_have_text("Pausing…", timeout=3000)
        expect(page.locator("[data-command=pause]")).to_be_disabled()
    assert [row.command for row in served.store.take_commands(going.id)] == ["pause"]
    served.store.set_state(going.id, "paused")
    for page in (mine, other):
        expect(page.get_by_role("button", name="Resume")).to_be_enabled()
        expect(page.locator("[data-command=save]")).to_be_disabled()
        expect(page.locator("[data-command=save]")).to_have_attribute(
            "title", "Resume the run first: this happens after its next step."
        )
    mine.get_by_role("button", name="Stop").click()
    expect(mine.locator("[data-command=stop]")).to_have_text("Stopping…", timeout=2000)
    served.store.set_state(going.id, "stopped", "Stopped on request; it can be resumed.")
    for page in (mine, other):
        expect(page.locator(".g-live-strip .g-state")).to_have_text("stopped")
        expect(page.locator(".g-live-remark")).to_have_text("Stopped on request; it can be resumed.")
        expect(page.get_by_role("button", name="Resume")).to_be_enabled()
    expect(other.locator(".g-live-lines li").last).to_contain_text("Stopped on request; it can be resumed.")


def test_a_failed_run_says_why_and_a_lost_one_is_told_from_its_age(page: Page, served: Served, going: Going) -> None:
    page.goto(f"{served.url}/#live?run={going.id}")
    expect(page.locator(".g-live-count")).to_contain_text("3 / 40")
    with served.store.write() as db:  # as if the process had frozen a while ago
        db.execute("UPDATE runs SET heartbeat = heartbeat - 50, updated = updated - 50 WHERE id = ?", [going.id])
    expect(page.locator(".g-live-remark")).to_contain_text("No sign of life for")
    served.store.set_state(going.id, "failed", error="The disk is full; free some space.")
    expect(page.locator(".g-live-remark")).to_have_text(
        "The disk is full; free some space. Resume goes on from the last saved step."
    )


def test_a_run_is_not_called_lost_while_the_app_does_not_answer(page: Page, served: Served, going: Going) -> None:
    page.goto(f"{served.url}/#live?run={going.id}")
    age = page.locator("[data-fact=age] dd")
    expect(age).to_have_text(re.compile("just now|ago"))
    wire = Wire(page)
    wire.lose("live/state")
    later(page, 60)
    expect(age).to_have_text("\u2013")  # nobody knows
    page.wait_for_timeout(1500)
    expect(page.locator(".g-live-remark")).not_to_contain_text("No sign of life")
    served.store.heartbeat(going.id)
    wire.mend()
    expect(age).to_have_text(re.compile("just now|ago"))
    expect(page.locator(".g-live-remark")).not_to_contain_text("No sign of life")


def test_a_step_that_was_lost_on_its_way_is_asked_for_again_though_the_run_does_nothing_new(
    page: Page, served: Served
) -> None:
    first = run_named(served, "First")
    page.goto(f"{served.url}/#live?run={first}")
    expect(page.get_by_label("Step number")).to_have_value("6")
    expect(page.locator(".g-microscope header h3").first).to_be_visible()
    wire = Wire(page)
    wire.lose("live/pictures|microscope/step")
    page.get_by_role("button", name="Step before").click()
    expect(page.locator(".g-toast")).to_contain_text("The app does not answer")
    expect(page.locator(".g-live-pictures h2")).not_to_have_text("Step 5: best and worst")
    wire.mend()
    later(page, 15)
    expect(page.locator(".g-live-pictures h2")).to_have_text("Step 5: best and worst")
    prompts = [row.prompt for row in served.store.rollouts(first, 5) if row.k == 0]
    expect(page.locator(".g-microscope header h3")).to_have_text(prompts)


def test_the_picker_has_a_new_run_though_its_list_was_lost_and_came_while_it_had_the_focus(
    page: Page, served: Served
) -> None:
    page.goto(f"{served.url}/#live?run={run_named(served, 'First')}")
    picker = page.get_by_label("Run shown")
    expect(picker).to_contain_text("Second")
    wire = Wire(page)
    wire.lose("live/runs")
    run_ids = [served.store.create_run(small("recording.name=Came later"), prompt_set="tiny")]
    wire.missed()
    wire.mend()
    later(page, 15)
    expect(picker).to_contain_text("Came later")
    picker.focus()
    with page.expect_response("**/grpo/live/runs"):
        run_ids.append(served.store.create_run(small("recording.name=Came last"), prompt_set="tiny"))
    page.wait_for_timeout(300)  # the page has read it
    picker.blur()
    expect(picker).to_contain_text("Came last")
    for run_id in run_ids:
        served.store.set_state(run_id, "stopped")
        served.store.delete(run_id)


def test_an_answer_from_before_the_run_was_chosen_once_more_is_not_taken_for_a_new_one(
    page: Page, served: Served, going: Going
) -> None:
    page.goto(f"{served.url}/#live?run={going.id}")
    reaches(page, "reward", "reward.reward_mean", 3)
    wire = Wire(page)
    wire.hold(f"live/state.*{going.id}")
    served.store.add_event(going.id, "note", "while it was chosen first")
    wire.held()
    picker = page.get_by_label("Run shown")
    picker.select_option(run_named(served, "Second"))
    picker.select_option(going.id)
    wire.release()
    log = page.get_by_role("log").locator("li")
    expect(log.last).to_contain_text("while it was chosen first")
    expect(log).to_have_count(len(served.store.events(going.id)))
    expect(page.locator(".g-live h1")).to_have_text(NAME)
    reaches(page, "reward", "reward.reward_mean", 3)


def test_a_run_that_was_measured_but_has_no_step_yet_is_drawn(page: Page, served: Served) -> None:
    run_id = served.store.create_run(small("training.steps=40"), prompt_set="tiny")
    for state in ("loading", "baseline"):
        served.store.set_state(run_id, state)
    summary = {"arms": {"untrained": {"reward": 50.0, "judge": 0.6}}}
    served.store.add_evaluation(run_id, "baseline", 0, "test", [], summary)
    page.goto(f"{served.url}/#live?run={run_id}")
    expect(plot(page, "judge").locator(".scatterlayer path.point")).to_have_count(1)  # and no fault on the console
    served.store.set_state(run_id, "stopped")
    served.store.delete(run_id)


def test_the_picker_shows_another_run_and_says_when_one_goes_on_elsewhere(
    page: Page, served: Served, going: Going
) -> None:
    second = run_named(served, "Second")
    page.goto(f"{served.url}/#live")
    expect(page.locator(".g-live h1")).to_have_text(NAME)
    page.get_by_label("Run shown").select_option(second)
    expect(page.locator(".g-live h1")).to_have_text("Second")
    reaches(page, "reward", "reward.reward_mean", 6)
    expect(page.locator(".g-live-headline")).to_contain_text("The reward")
    assert page.evaluate("location.hash") == f"#live?run={second}"
    page.locator("#tab-compare-button").click()
    expect(page.locator(".g-live")).to_be_hidden()
    page.locator("#tab-live-button").click()
    expect(page.locator(".g-live h1")).to_have_text("Second")  # what was picked stays, in the address too
    page.wait_for_function(f"location.hash === '#live?run={second}'")
    expect(page.locator(".g-live-other")).to_contain_text(f"{NAME} is training now.")
    page.get_by_role("button", name="Show it").click()
    expect(page.locator(".g-live h1")).to_have_text(NAME)
    expect(page.locator(".g-live-other")).to_be_hidden()
    expect(page.locator(".g-live-headline")).to_be_hidden()
    reaches(page, "reward", "reward.reward_mean", 3)


def test_the_log_follows_unless_somebody_has_scrolled_up(page: Page, served: Served, going: Going) -> None:
    page.goto(f"{served.url}/#live?run={going.id}")
    log = page.get_by_role("log")
    for number in range(30):
        served.store.add_event(going.id, "warning" if number == 29 else "note", f"line {number}")
    expect(log.locator("li").last).to_contain_text("line 29")
    expect(log.locator("li").last).to_have_class("g-live-warning")
    at_end = "node => node.scrollHeight - node.scrollTop - node.clientHeight < 5"
    assert log.evaluate(at_end)
    log.evaluate("node => { node.scrollTop = 40; }")
    served.store.add_event(going.id, "note", "the last line")
    expect(log.locator("li").last).to_contain_text("the last line")
    assert log.evaluate("node => node.scrollTop") == 40


def test_smoothing_is_remembered_and_keeps_what_was_measured_behind_it(page: Page, served: Served) -> None:
    page.goto(f"{served.url}/#live?run={run_named(served, 'First')}")
    reaches(page, "reward", "reward.reward_mean", 6)
    page.get_by_label("Smoothing").fill("0.5")
    page.wait_for_function(
        "document.querySelector('[data-chart=reward] .js-plotly-plot').data.some((t) => t.uid.endsWith(' raw'))"
    )
    values = "(node, uid) => Array.from(node.data.find((t) => t.uid === uid).y)"
    raw = plot(page, "reward").evaluate(values, "reward.reward_mean raw")
    smooth = plot(page, "reward").evaluate(values, "reward.reward_mean")
    recorded = served.store.steps(run_named(served, "First"), ["reward_mean"])["reward_mean"].tolist()
    assert raw == pytest.approx(recorded, rel=1e-5)
    assert smooth[1] == pytest.approx((0.25 * recorded[0] + 0.5 * recorded[1]) / 0.75, rel=1e-5)
    page.reload()
    expect(page.get_by_label("Smoothing")).to_have_value("0.5")


def test_an_empty_database_teaches_the_first_step(
    new_page: Callable[..., Page], serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve(tmp_path)
    for run in served.store.runs():  # the recorded example that every first start is given
        served.store.delete(run.id)
    page = new_page()
    page.goto(f"{served.url}/#train")
    page.get_by_role("button", name="Not now").click()
    expect(page.get_by_label("First run")).to_be_hidden()
    page.goto(f"{served.url}/#live")
    expect(page.locator(".g-live")).to_contain_text("Nothing has been trained yet")
    page.get_by_role("button", name="Start a guided first run").click()
    expect(page.locator("#tab-train-button")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_label("First run")).to_be_visible()  # though it was put away before
    expect(page.get_by_role("button", name="Start the first run")).to_be_focused()


def test_a_log_scale_begins_with_a_range_of_its_own_and_keeps_the_steps_zoomed_to(page: Page, served: Served) -> None:
    page.goto(f"{served.url}/#live?run={run_named(served, 'First')}")
    reaches(page, "reward", "reward.reward_mean", 6)
    reward = plot(page, "reward")
    zoom_in(page, "reward")
    steps = reward.evaluate("node => [...node.layout.xaxis.range]")
    values = reward.evaluate("node => [...node.layout.yaxis.range]")
    button = page.get_by_role("button", name="Reward: Log scale", exact=True)
    button.click()
    kind = "type => document.querySelector('[data-chart=reward] .js-plotly-plot')._fullLayout.yaxis.type === type"
    page.wait_for_function(kind, arg="log")
    low, high = reward.evaluate("node => node._fullLayout.yaxis.range")  # exponents of ten
    recorded = served.store.steps(run_named(served, "First"), ["reward_mean"])["reward_mean"]
    assert 10**low < recorded.max() < 10**high < 1000
    assert [low, high] != values
    assert reward.evaluate("node => [...node.layout.xaxis.range]") == steps
    button.click()
    page.wait_for_function(kind, arg="linear")
    low, high = reward.evaluate("node => node._fullLayout.yaxis.range")
    assert low <= recorded.min() and recorded.max() <= high
    assert reward.evaluate("node => [...node.layout.xaxis.range]") == steps


def test_charts_say_it_when_their_library_is_missing_and_are_drawn_once_it_is_there(page: Page, served: Served) -> None:
    page.route("**/plotly.min.js", lambda route: route.fulfill(status=404))
    page.goto(f"{served.url}/#live?run={run_named(served, 'First')}")
    sentence = "The chart library could not be loaded; reload the page."
    expect(page.locator("[data-chart=reward] .g-plot")).to_have_text(sentence)
    expect(page.locator("[data-chart=loss] .g-plot")).to_have_text(sentence)
    page.unroute("**/plotly.min.js")
    page.get_by_label("Smoothing").fill("0.3")
    plot(page, "reward")
    expect(page.locator("[data-chart=reward]")).not_to_contain_text(sentence)


def test_a_chart_s_csv_holds_no_formula_of_a_run_s_name(page: Page, served: Served) -> None:
    page.goto(f"{served.url}/#live")
    expect(page.locator(".g-live")).to_be_visible()
    with page.expect_download() as download:
        page.evaluate(
            """() => {
                const chart = grpo.chart(document.querySelector('.g-live'), { name: 'cells', title: 'Cells' });
                chart.figure({ data: ['=1+1', '@SUM(A1),"x"', 'plain'].map((series) => (
                    { x: [1, 2], y: [-0.5, null], name: series, meta: { series } })), layout: {} });
                chart.csv();
                chart.destroy();
            }"""
        )
    assert download.value.path().read_text(encoding="utf-8").splitlines() == [
        "series,x,y", "'=1+1,1,-0.5", "'=1+1,2,", "\"'@SUM(A1),\"\"x\"\"\",1,-0.5", "\"'@SUM(A1),\"\"x\"\"\",2,",
        "plain,1,-0.5", "plain,2,",
    ]  # fmt: skip


def test_a_chart_too_small_for_its_labels_is_drawn_without_a_fault(
    new_page: Callable[..., Page], served: Served
) -> None:
    page = new_page()
    page.goto(f"{served.url}/#live")
    expect(page.locator("[data-chart=reward] .js-plotly-plot")).to_be_visible()
    faults = page.evaluate(
        """async () => {
            const faults = [];
            for (const [width, height] of [[14, 260], [60, 20], [30, 30], [300, 14]]) {
                const host = document.createElement('div');
                document.querySelector('.g-live').append(host);
                const chart = grpo.chart(host, { name: 'small', title: 'Small' });
                chart.plot.style.cssText = `width: ${width}px; height: ${height}px`;
                await chart.figure({ data: [{ x: [1, 2, 3], y: [10000, 20000, 15000], type: 'scatter', mode: 'lines' }],
                            layout: { xaxis: { title: 'step' }, yaxis: { title: 'reward' } } });
                faults.push(chart.plot.innerHTML.includes('Infinity'));
                host.remove();
            }
            return faults;
        }"""
    )
    assert faults == [False] * 4
