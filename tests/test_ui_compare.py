"""The compare screen's questions and actions: rows that changed, curves, settings, prompts, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from store_samples import fill, metrics, to_state, training_run

from grpo_engine.recorder import STEP_METRICS
from grpo_engine.store import Store
from grpo_engine.store.rows import Bins
from grpo_engine.store.writes import update_run
from ui import compare
from ui.charts import PALETTE
from ui.charts_compare import RunCurve, curve_points, metric_list, overlay_figure, run_color, run_dash
from ui.context import Context
from ui.run_table import RunTable, gains
from ui.worker import Worker

STATIC = Path(compare.__file__).parent / "static"
GAIN = {"mean": 1.5, "low": 0.5, "high": 2.5, "n": 20, "win_rate": 0.7, "before": 10.0, "after": 11.5}
SUMMARY = {"headline": "trained_vs_untrained", "confidence": 0.9, "gains": {"trained_vs_untrained": GAIN}}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as opened:
        yield opened


@pytest.fixture
def client(store: Store) -> TestClient:
    app = FastAPI()
    app.include_router(compare.routes(Context(store, Worker(store))), prefix="/grpo")
    return TestClient(app)


def ask(client: TestClient, what: str, **params: Any) -> dict[str, Any]:
    response = client.get(f"/grpo/compare/{what}", params=params)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def finished(store: Store, **changes: Any) -> str:
    run_id = training_run(store, **changes)
    store.set_state(run_id, "evaluating")
    store.set_state(run_id, "finished")
    return run_id


def item(arm: str, prompt_id: str = "p-1", index: int = 0, **changes: Any) -> dict[str, Any]:
    row = {"arm": arm, "prompt_id": prompt_id, "index": index, "prompt": f"text of {prompt_id}", "tier": "basic"}
    row |= {"latent_seed": str(2**63 + index), "rewrite": None if arm == "original" else f"{arm} words"}
    row |= {"reward": 20.0, "parts": "{}", "judge": 0.5, "judge_parts": "{}", "image": f"runs/x/images/{arm}.png"}
    return row | {"thumbnail": None} | changes


def measure(store: Store, run_id: str, trained: float = 22.0, **changes: Any) -> None:
    """Baseline and final evaluation of one prompt on two latents."""
    for kind, arms in (("baseline", ("original", "untrained")), ("final", ("trained",))):
        rows = [
            item(arm, index=index, **({"reward": trained} if arm == "trained" else {}), **changes)
            for arm in arms
            for index in (0, 1)
        ]
        store.add_evaluation(run_id, kind, 0, "test", rows, SUMMARY)


# The table


def test_a_row_has_the_headline_gain_with_its_interval_once_it_is_measured(store: Store) -> None:
    before, after = training_run(store), finished(store)
    measure(store, after)
    rows = {row["id"]: row for row in RunTable(store).changes()["runs"]}
    assert rows[before]["gain"] is None and rows[before]["gains"] == {}
    assert rows[after]["headline"] == "trained_vs_untrained"
    assert rows[after]["gain"] == {**GAIN, "judge": None} and rows[after]["confidence"] == 0.9
    assert (rows[before]["active"], rows[after]["active"]) == (True, False)


def test_a_page_is_sent_only_the_rows_that_changed_since_its_last_look(store: Store) -> None:
    first, second = training_run(store), finished(store)
    table = RunTable(store)
    told = table.changes()
    assert told["ids"] == [second, first] and len(told["runs"]) == 2
    assert table.changes(told["version"])["runs"] == []
    fill(store, first, 1)
    told = table.changes(told["version"])
    assert [(row["id"], row["step"]) for row in told["runs"]] == [(first, 1)]
    store.delete(second)
    told = table.changes(told["version"])
    assert told["ids"] == [first] and told["runs"] == []


@pytest.mark.parametrize("since", ["", "nonsense", "00000000.1", ".", "00000000.-1", "00000000.9999999999999999"])
def test_a_version_of_an_earlier_process_gets_the_whole_table(store: Store, since: str) -> None:
    run_id = training_run(store)
    assert [row["id"] for row in RunTable(store).changes(since)["runs"]] == [run_id]


@pytest.mark.parametrize(
    "summary",
    [
        None,
        {},
        {"gains": []},
        {"gains": {"trained_vs_untrained": {"mean": None}}},
        {"gains": {"trained_vs_untrained": {"mean": "<b>5</b>"}}, "headline": "trained_vs_untrained"},
        {"gains": {"trained_vs_untrained": {"mean": True}}},
        {"gains": {"somebody_elses": GAIN}, "headline": ["odd"]},
    ],
)
def test_a_strange_summary_counts_as_not_measured(summary: Any) -> None:
    assert gains(summary)["gain"] is None


def test_numbers_of_a_gain_that_are_missing_or_not_finite_are_none() -> None:
    found = gains({"gains": {"trained_vs_original": {"mean": 1.0, "low": math.inf, "judge_gain": {"mean": 0.25}}}})
    assert found["headline"] == "trained_vs_original"
    assert found["gain"]["low"] is None and found["gain"]["n"] is None
    assert found["gain"]["judge"]["mean"] == 0.25


# Curves


def bins(width: int, first: list[int], count: list[int], mean: list[float]) -> Bins:
    starts, values = np.array(first), np.array(mean)
    return Bins(width, starts, starts + width - 1, np.array(count), values, values, values)


def test_minutes_are_the_time_of_all_steps_up_to_the_first_of_a_bin() -> None:
    reward = bins(2, [1, 3, 5], [2, 2, 1], [10.0, 20.0, 30.0])
    x, y = curve_points(reward)
    assert x.tolist() == [1, 3, 5] and y.tolist() == [10.0, 20.0, 30.0]
    x, y = curve_points(reward, bins(2, [1, 3, 5], [2, 2, 1], [60.0, 30.0, 120.0]))
    assert x.tolist() == [1.0, 2.5, 5.0]  # 60; 60 + 60 + 30; 60 + 60 + 30 + 30 + 120 seconds
    assert y.tolist() == [10.0, 20.0, 30.0]


def test_steps_without_a_time_take_none_and_without_any_time_there_is_no_time_axis() -> None:
    reward = bins(1, [1, 2, 3, 4], [1, 1, 1, 1], [1.0, 2.0, 3.0, 4.0])
    x, _ = curve_points(reward, bins(1, [2, 4], [1, 1], [60.0, 60.0]))
    assert x.tolist() == [0.0, 1.0, 1.0, 2.0]
    x, y = curve_points(reward, bins(1, [], [], []))
    assert len(x) == len(y) == 0


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: 1 to 21."""

    def luminance(color: str) -> float:
        parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_the_same_in_charts_and_on_the_page_and_stand_out_in_both_themes() -> None:
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--g-([\w-]+): (#[0-9a-f]{6})", block)) for block in style.split("}")[:2])
    names = [f"c{number}" for number in range(1, len(PALETTE) + 1)]
    assert tuple(light[name] for name in names) == PALETTE
    assert sum(name.startswith("c") for name in dark) == len(names)
    script = (STATIC / "charts.js").read_text(encoding="utf-8")
    found = re.search(r"PALETTE = \[([^\]]*)\]", script)
    assert found and tuple(re.findall(r"#[0-9a-f]{6}", found[1])) == PALETTE
    assert f"COLORS = {len(PALETTE)};" in (STATIC / "core.js").read_text(encoding="utf-8")
    for theme in (light, dark):
        assert min(contrast(theme[name], theme["surface"]) for name in names) >= 3
        for ground in ("surface", "bg", "sunken"):
            assert contrast(theme["ink"], theme[ground]) >= 7
            assert min(contrast(theme[name], theme[ground]) for name in ("quiet", "faint")) >= 4.4
        assert contrast(theme["accent-ink"], theme["accent"]) >= 4.5
        for kind in ("good", "warn", "bad", "accent"):
            assert contrast(theme[kind], theme[f"{kind}-soft"]) >= 4.5, kind


def test_a_run_keeps_its_colour_and_runs_of_one_colour_differ_by_their_dash() -> None:
    looks = [(run_color(number), run_dash(number)) for number in range(1, 4 * len(PALETTE) + 1)]
    assert len(set(looks)) == len(looks) and looks[2] == (PALETTE[2], "solid")
    figure = overlay_figure("reward_mean", [RunCurve("0003-a-bcde", 3, "<b>x</b>", [1], [2.0])], "minutes")
    (trace,) = figure["data"]
    assert (trace["line"]["color"], trace["name"]) == (PALETTE[2], "&lt;b&gt;x&lt;/b&gt;")  # no markup to plotly
    assert trace["meta"] == {"key": "0003-a-bcde", "run": "0003-a-bcde", "series": "<b>x</b>", "smooth": True}
    assert "minutes" in figure["layout"]["xaxis"]["title"]


def test_every_metric_can_be_picked_the_reward_first_with_what_it_means() -> None:
    found = metric_list()
    assert found[0]["name"] == "reward_mean"
    assert {row["name"]: row["meaning"] for row in found} == dict(STEP_METRICS)
    assert [row["name"] for row in found if row["default"]] == ["reward_mean", "kl_penalty", "entropy", "judge_mean"]


def merged(page: dict[str, list[Any]], told: dict[str, Any], metric: str, run_id: str) -> None:
    """What charts.js does with new points."""
    fresh = told["points"][metric][run_id]
    if run_id in told["anew"]:
        page["x"], page["y"] = [], []
    if fresh["x"]:
        kept = sum(1 for x in page["x"] if x < fresh["x"][0])
        page["x"], page["y"] = page["x"][:kept] + fresh["x"], page["y"][:kept] + fresh["y"]


@pytest.mark.parametrize("axis", ["step", "minutes"])
def test_a_page_that_follows_a_run_shows_what_a_fresh_page_shows(
    store: Store, client: TestClient, axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "BINS", 4)
    run_id = training_run(store)
    page: dict[str, list[Any]] = {}
    have = ""
    for steps in (0, 1, 3, 4, 5, 6, 9, 17, 40):
        for step in range(store.run(run_id).step + 1, steps + 1):
            store.add_step(run_id, step, {"reward_mean": float(step * step % 7), "seconds": 30.0 + step}, [])
        params = {"runs": run_id, "metrics": "reward_mean,entropy", "axis": axis}
        fresh = ask(client, "curves", **params)
        (trace,) = fresh["figures"]["reward_mean"]["data"]
        if have:
            told = ask(client, "curves", **params, have=have)
            assert told["figures"] == {}
            merged(page, told, "reward_mean", run_id)
            assert told["points"]["entropy"][run_id] == {"x": [], "y": []}  # never recorded
        else:
            told, page = fresh, {"x": trace["x"], "y": trace["y"]}
        assert page == {"x": trace["x"], "y": trace["y"]}, steps
        have = f"{run_id}:{told['state'][run_id]['width']}:{told['state'][run_id]['last']}"


def test_few_points_travel_while_a_run_goes_on(store: Store, client: TestClient) -> None:
    run_id = training_run(store)
    fill(store, run_id, 300)
    told = ask(client, "curves", runs=run_id, metrics="reward_mean", have=f"{run_id}:1:299")
    assert told["points"]["reward_mean"][run_id]["x"] == [298, 299, 300]


def test_steps_that_were_done_again_replace_the_old_ones(store: Store, client: TestClient) -> None:
    run_id = training_run(store)
    fill(store, run_id, 20)
    first = ask(client, "curves", runs=run_id, metrics="reward_mean")
    (trace,) = first["figures"]["reward_mean"]["data"]
    page = {"x": trace["x"], "y": trace["y"]}
    store.truncate_after(run_id, 10)
    store.add_step(run_id, 11, metrics(11) | {"reward_mean": -5.0}, [])
    told = ask(client, "curves", runs=run_id, metrics="reward_mean", have=f"{run_id}:1:20")
    merged(page, told, "reward_mean", run_id)
    assert page["x"] == list(range(1, 12)) and page["y"][-1] == -5.0


# Settings, prompts, pictures


def test_only_settings_that_differ_are_listed_as_they_were_recorded(store: Store, client: TestClient) -> None:
    first, second = (
        training_run(store, training={"steps": 40, "learning_rate": rate}, recording={"name": f"run {rate}"})
        for rate in (1e-3, 2e-3)
    )
    other = json.loads(store.run(second).config_json) | {"of_a_later_version": {"knob": [1, 2]}}
    del other["sampling"]["top_k"]
    other["sampling"]["temperature"] = int(other["sampling"]["temperature"])
    with store.write() as db:
        update_run(db, second, {"config": json.dumps(other)})
    told = ask(client, "settings", runs=f"{first},{second}")
    assert {row["name"]: row["values"] for row in told["rows"]} == {
        "training.learning_rate": ["0.001", "0.002"],
        "sampling.top_k": ["0", "not in its version"],
        "of_a_later_version.knob": ["not in its version", "1, 2"],
    }
    helps = {row["name"]: row["help"] for row in told["rows"]}
    assert "step size" in helps["training.learning_rate"] and helps["of_a_later_version.knob"] == ""
    assert told["same"] > 50


def test_prompts_of_runs_of_one_seed_are_shared_with_their_latents(store: Store, client: TestClient) -> None:
    runs = [finished(store), finished(store)]
    for run_id, trained in zip(runs, (22.0, 25.0), strict=True):
        measure(store, run_id, trained)
    told = ask(client, "prompts", runs=",".join(runs))
    (row,) = told["prompts"]
    assert (row["id"], row["trained"], row["spread"], row["same_latents"]) == ("p-1", [22.0, 25.0], 3.0, True)
    assert "the same latents" in told["note"]


def test_different_latents_are_said_with_the_seeds_that_cause_them(store: Store, client: TestClient) -> None:
    runs = [finished(store, seed=0), finished(store, seed=7)]
    measure(store, runs[0])
    measure(store, runs[1], latent_seed="5")
    told = ask(client, "prompts", runs=",".join(runs))
    assert told["prompts"][0]["same_latents"] is False
    assert "different seeds (0, 7)" in told["note"]
    pictures = ask(client, "pictures", runs=",".join(runs), prompt="p-1")
    assert [(row["index"], row["same"]) for row in pictures["latents"]] == [(0, False), (1, False)]


def test_prompts_of_one_id_but_another_text_are_not_shared(store: Store, client: TestClient) -> None:
    runs = [finished(store), finished(store), training_run(store)]
    measure(store, runs[0])
    measure(store, runs[1], prompt="another text")
    told = ask(client, "prompts", runs=",".join(runs))
    assert told["prompts"] == [] and told["runs"] == runs[:2] and told["left_out"] == runs[2:]


def test_a_prompt_shows_original_untrained_and_trained_of_every_run(store: Store, client: TestClient) -> None:
    runs = [finished(store), finished(store), finished(store)]
    for run_id in runs[:2]:
        measure(store, run_id)
    told = ask(client, "pictures", runs=",".join(runs), prompt="p-1")
    assert [row["run"] for row in told["runs"]] == runs[:2]  # the third measured nothing
    arms = told["runs"][0]["arms"]
    assert list(arms) == ["original", "untrained", "trained"]
    assert [row["index"] for row in arms["trained"]] == [0, 1] and arms["trained"][0]["reward"] == 22.0
    assert arms["original"][0]["rewrite"] is None and arms["untrained"][0]["rewrite"] == "untrained words"
    assert all(row["same"] for row in told["latents"])


# Actions


def test_names_tags_and_notes_are_kept_as_they_were_typed(store: Store, client: TestClient) -> None:
    run_id = training_run(store)
    name = "<script>alert('1')</script>"
    assert client.post("/grpo/compare/rename", json={"run": run_id, "name": name}).json()["run"]["name"] == name
    client.post("/grpo/compare/tags", json={"run": run_id, "tags": ["b", "<i>a</i>", "b"]})
    row = client.post("/grpo/compare/notes", json={"run": run_id, "notes": "line 1\nline 2"}).json()["run"]
    assert (row["tags"], row["notes"]) == (["b", "<i>a</i>"], "line 1\nline 2")


@pytest.mark.parametrize(
    ("action", "body", "status", "said"),
    [
        ("rename", {"name": "  "}, 409, "can't be empty"),
        ("rename", {"name": "x" * 200}, 409, "120 are allowed"),
        ("rename", {"name": "x" * 5000}, 422, "name"),
        ("rename", {"name": "x", "state": "finished"}, 422, "state"),
        ("tags", {"tags": ["y" * 60]}, 409, "40 are allowed"),
        ("tags", {"tags": "abc"}, 422, "tags"),
        ("tags", {"tags": ["a"] * 1000}, 422, "tags"),
        ("notes", {"notes": "z" * 30_000}, 409, "20,000 are allowed"),
        ("notes", {"notes": None}, 422, "notes"),
    ],
)
def test_what_a_run_can_not_be_called_is_refused_in_a_sentence(
    store: Store, client: TestClient, action: str, body: dict[str, Any], status: int, said: str
) -> None:
    run_id = training_run(store)
    before = store.run(run_id)
    answer = client.post(f"/grpo/compare/{action}", json={"run": run_id, **body})
    assert answer.status_code == status and said in answer.json()["error"], answer.text
    assert store.run(run_id) == before


def test_an_active_run_is_not_deleted_nor_what_was_chosen_with_it(store: Store, client: TestClient) -> None:
    done, active = finished(store), to_state(store, "paused")
    answer = client.post("/grpo/compare/delete", json={"runs": [done, active]})
    assert answer.status_code == 409 and "is paused" in answer.json()["error"]
    assert len(store.runs()) == 2
    other = finished(store)
    answer = client.post("/grpo/compare/delete", json={"runs": [done, other, done]})
    assert answer.json() == {"deleted": [done, other]}
    assert [run.id for run in store.runs()] == [active] and not store.run_dir(done).exists()


@pytest.mark.parametrize("what", ["curves", "settings", "prompts", "pictures", "curves.csv"])
def test_unknown_runs_are_answered_in_a_sentence(store: Store, client: TestClient, what: str) -> None:
    known = training_run(store)
    for runs in ("9999-none-zzzz", "../../etc/passwd", f"{known},0'; DROP TABLE runs", "<b>"):
        answer = client.get(f"/grpo/compare/{what}", params={"runs": runs, "metrics": "reward_mean", "prompt": "p-1"})
        assert answer.status_code == 404 and "There is no run" in answer.json()["error"], answer.text
    for action, body in (("rename", {"name": "x"}), ("tags", {"tags": []}), ("notes", {"notes": ""})):
        answer = client.post(f"/grpo/compare/{action}", json={"run": "9999-none-zzzz", **body})
        assert answer.status_code == 404 and "There is no run" in answer.json()["error"]
    assert client.post("/grpo/compare/delete", json={"runs": [known, "9999-none-zzzz"]}).status_code == 404
    assert store.run(known).id == known


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"runs": "", "metrics": "reward_mean"},
        {"runs": ",".join(f"r{n}" for n in range(101)), "metrics": "reward_mean"},
        {"runs": "{known}", "metrics": ""},
        {"runs": "{known}", "metrics": "state"},
        {"runs": "{known}", "metrics": 'reward_mean"; DROP TABLE runs'},
        {"runs": "{known}", "metrics": ",".join(list(STEP_METRICS)[:20])},
        {"runs": "{known}", "metrics": "reward_mean", "axis": "years"},
        {"runs": "{known}", "metrics": "reward_mean", "have": "{known}:1"},
        {"runs": "{known}", "metrics": "reward_mean", "have": "{known}:1:-5"},
        {"runs": "{known}", "metrics": "reward_mean", "have": f"{{known}}:1:{'9' * 40}"},
    ],
)
def test_curves_that_can_not_be_drawn_are_refused_in_a_sentence(
    store: Store, client: TestClient, params: dict[str, str]
) -> None:
    known = training_run(store)
    answer = client.get("/grpo/compare/curves", params={k: v.replace("{known}", known) for k, v in params.items()})
    assert answer.status_code == 422
    assert answer.json()["error"].endswith(".") and "Traceback" not in answer.text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"run": 5}', b"\xff\xfe"])
@pytest.mark.parametrize("action", ["rename", "tags", "notes", "delete"])
def test_malformed_bodies_are_answered_in_a_sentence(client: TestClient, action: str, body: bytes) -> None:
    answer = client.post(f"/grpo/compare/{action}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and "error" in answer.json()


# CSV


def table(client: TestClient, what: str, **params: str) -> list[dict[str, str]]:
    response = client.get(f"/grpo/compare/{what}", params=params)
    assert response.status_code == 200 and "attachment" in response.headers["content-disposition"]
    return list(csv.DictReader(io.StringIO(response.text)))


def test_the_table_as_csv_has_every_run_and_no_formulas(store: Store, client: TestClient) -> None:
    plain, measured = training_run(store, recording={"name": "=HYPERLINK(1)", "tags": ["a", "b"]}), finished(store)
    measure(store, measured)
    store.note(plain, 'quoted "words",\nand a line')
    rows = {row["id"]: row for row in table(client, "runs.csv")}
    assert rows[plain]["name"] == "'=HYPERLINK(1)" and rows[plain]["tags"] == "a, b"
    assert rows[plain]["notes"] == 'quoted "words",\nand a line' and rows[plain]["gain_mean"] == ""
    gain = [float(rows[measured][f"gain_{name}"]) for name in ("mean", "low", "high", "n")]
    assert gain == [1.5, 0.5, 2.5, 20] and rows[measured]["comparison"] == "trained_vs_untrained"


def test_the_curves_as_csv_have_every_step(store: Store, client: TestClient) -> None:
    run_id = training_run(store)
    for step in range(1, 501):
        store.add_step(run_id, step, {"reward_mean": step / 2, "seconds": 6.0}, [])
    rows = table(client, "curves.csv", runs=run_id, metrics="reward_mean,entropy")
    assert len(rows) == 500
    assert rows[9] == {
        "run": run_id,
        "name": "Run 1",
        "step": "10",
        "minutes": "1.0",
        "reward_mean": "5.0",
        "entropy": "",
    }
