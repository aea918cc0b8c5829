"""Bundles: a run comes back as it was recorded, what is no bundle does no harm, imported runs never go on."""

from __future__ import annotations

import io
import json
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_policy
import torch
from engine_runs import create, small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from store_samples import group, metrics, picture, to_state, training_run
from test_cli import call

from grpo_engine.bundle import BundleError, inspect_bundle, origin, read_bundle, write_bundle
from grpo_engine.bundle import archive as archive_module
from grpo_engine.bundle.rows import EvaluationLine, EventLine, ItemLine, RolloutLine, RunLine, StepLine, rollout_line
from grpo_engine.checkpoint import CheckpointError, find_checkpoint, load_checkpoint
from grpo_engine.config import ROOT, RecordingConfig
from grpo_engine.control import RunControl
from grpo_engine.export import export
from grpo_engine.manager import RunManager, execute
from grpo_engine.recorder import STEP_METRICS
from grpo_engine.session import Session, evaluate_run
from grpo_engine.store import Store, StoreError
from grpo_engine.store.recorder import StoreRecorder
from grpo_engine.store.rows import RolloutRow

Change = bytes | Callable[[bytes], bytes] | None


@dataclass
class Recorded:
    """A run that was recorded here, and its bundle."""

    store: Store
    run_id: str
    bundle: Path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """A tiny run of the embedded models, from loading to report."""
    folder = tmp_path_factory.mktemp("real")
    with Store(folder / "runs.db") as store:
        run_id = create(store, small("recording.tags=[a, b]", "evaluation.every=2", "evaluation.validation_prompts=2"))
        assert execute(store, run_id) == "finished", store.run(run_id).error
        store.note(run_id, "as planned")
        yield Recorded(store, run_id, write_bundle(store, run_id, folder / "run.zip"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """A stopped run without a checkpoint: odd texts, large pictures, one of them missing, tokens not finite."""
    folder = tmp_path_factory.mktemp("plain")
    with Store(folder / "runs.db") as store:
        run_id = training_run(store)
        with StoreRecorder(store, run_id, RecordingConfig(image_format="webp")) as recorder:
            recorder.token_text = lambda ids: [f"t{token}" for token in ids]
            for step in (1, 2):
                shown = [picture(step, 300), None, picture(step + 10, 300), picture(step + 20, 8)]
                recorder.step(step, metrics(step), [group(step, size=4, pictures=list(shown))])
            recorder.event("warning", "<b>odd\x1b[31m</b>\nnúmero", data={"n": [1, None, "é"]})
        store.set_state(run_id, "failed", "it \x1b[31mfailed", error="line 1\nline \x1b2")
        with store.write() as db:
            odd = np.array([np.nan, -0.0, 1e-45, np.finfo(np.float32).max], dtype="<f4")
            db.execute("UPDATE rollouts SET logprobs = ? WHERE run_id = ? AND k = 3", [odd.tobytes(), run_id])
        gone = store.rollouts(run_id, 2)[0].image
        assert gone is not None
        store.file(gone).unlink()
        yield Recorded(store, run_id, write_bundle(store, run_id, folder / "plain.zip"))


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "there" / "runs.db") as opened:
        yield opened


def altered(bundle: Path, target: Path, changes: Mapping[str, Change]) -> Path:
    """The bundle with members replaced, changed, added, or (None) left out."""
    with zipfile.ZipFile(bundle) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        content = {name: old.read(name) for name in old.namelist()}
        for name, change in changes.items():
            if change is None:
                del content[name]
            else:
                content[name] = change(content[name]) if callable(change) else change
        for name, data in content.items():
            new.writestr(name, data)
    return target


def fields(**changes: Any) -> Callable[[bytes], bytes]:
    """Change fields of the first line of a table, or of bundle.json with ``run__name=...``."""

    def change(data: bytes) -> bytes:
        first, newline, rest = data.partition(b"\n") if data.startswith(b'{"') else (data, b"", b"")
        line = json.loads(first)
        for name, value in changes.items():
            *outer, last = name.split("__")
            inner = line
            for key in outer:
                inner = inner[key]
            inner[last] = value
        return json.dumps(line).encode() + newline + rest

    return change


def assert_nothing_came(store: Store) -> None:
    assert store.runs() == [] and store.check() == []
    runs = store.root / "runs"
    assert not runs.exists() or list(runs.iterdir()) == []


def plainly(rows: list[Any], *without: str) -> list[dict[str, Any]]:
    """Rows as values that compare, arrays as bytes, paths below the run's own folder."""
    out = []
    for row in rows:
        values = {name: value for name, value in vars(row).items() if name not in without}
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                values[name] = (value.dtype.str, value.tobytes())
            elif name in ("image", "thumbnail") and value is not None:
                values[name] = value.split("/", 2)[2]
        out.append(values)
    return out


def assert_same_rows(first: Store, first_id: str, second: Store, second_id: str, *, pictures: bool = True) -> None:
    """Steps, rollouts, evaluations and their items, events: equal but for ids and the line about the import."""
    left, right = first.steps(first_id), second.steps(second_id)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)
    hidden = () if pictures else ("image", "thumbnail")
    for step in left["step"].tolist():
        assert plainly(first.rollouts(first_id, step), *hidden) == plainly(second.rollouts(second_id, step), *hidden)
    evaluations = first.evaluations(first_id), second.evaluations(second_id)
    assert plainly(evaluations[0], "id", "run_id") == plainly(evaluations[1], "id", "run_id")
    for one, other in zip(*evaluations, strict=True):
        items = [store.evaluation_items(row.id) for store, row in ((first, one), (second, other))]
        assert plainly(items[0], "evaluation_id", *hidden) == plainly(items[1], "evaluation_id", *hidden)
    events = [
        [event for event in plainly(store.events(run_id, limit=None), "id", "run_id") if event["kind"] != "imported"]
        for store, run_id in ((first, first_id), (second, second_id))
    ]
    assert events[0] == events[1]


def files(store: Store, run_id: str, folder: str) -> dict[str, bytes]:
    root = store.run_dir(run_id)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.glob(f"{folder}/**/*.*")}


def images_of(store: Store, run_id: str) -> tuple[dict[int, set[str]], set[str]]:
    """Pictures that are there, of each step's rollouts and of the evaluations; fails at one that is missing."""
    steps: dict[int, set[str]] = {}
    for step in range(1, store.run(run_id).step + 1):
        steps[step] = {row.image for row in store.rollouts(run_id, step) if row.image}
        assert all(row.thumbnail for row in store.rollouts(run_id, step) if row.image)
    rows = [row for found in store.evaluations(run_id) for row in store.evaluation_items(found.id)]
    shown = {row.image for row in rows if row.image}
    assert all(store.file(path).is_file() for path in {*shown, *(path for paths in steps.values() for path in paths)})
    return steps, shown


# -- there and back ------------------------------------------------------------------------------------------


def test_a_run_comes_back_as_it_was_recorded(real: Recorded, empty: Store) -> None:
    run_id = read_bundle(empty, real.bundle)
    before, after = real.store.run(real.run_id), empty.run(run_id)
    own = {"id", "number", "source", "heartbeat", "pid", "host", "process_token", "notes", "config_json"}
    assert {k: v for k, v in vars(before).items() if k not in own and k != "config"} == {
        k: v for k, v in vars(after).items() if k not in own and k != "config"
    }
    assert after.config == before.config and after.summary is not None
    assert (after.source, after.host, after.pid, after.process_token) == ("imported", None, None, None)
    assert len(real.store.evaluations(real.run_id)) == 3, "baseline, validation, final"
    assert_same_rows(real.store, real.run_id, empty, run_id)
    kept = files(empty, run_id, "images")
    assert kept == files(real.store, real.run_id, "images") and len(kept) > 10
    images_of(empty, run_id)
    for name in ("config.yaml", "metrics.json", "grpo_training.log"):
        assert (empty.run_dir(run_id) / name).read_bytes() == (real.store.run_dir(real.run_id) / name).read_bytes()
    assert empty.check() == []
    assert [path.name for path in (empty.root / "runs").iterdir()] == [run_id], "nothing else is left there"


def test_an_imported_run_says_where_it_comes_from(real: Recorded, empty: Store) -> None:
    run_id = read_bundle(empty, real.bundle, name_suffix=" (example)")
    found = origin(empty, run_id)
    assert found is not None and (found.id, found.created) == (real.run_id, real.store.run(real.run_id).created)
    assert str(found).startswith(f"Recorded elsewhere as {real.run_id} on 20")
    run, event = empty.run(run_id), empty.events(run_id)[-1]
    assert run.notes == f"{found}\nas planned"
    assert run.name == real.store.run(real.run_id).name + " (example)"
    assert event.kind == "imported" and event.message == f"{found} Imported from run.zip."
    assert origin(real.store, real.run_id) is None


def test_the_policy_of_an_imported_run_can_be_exported_and_measured(
    real: Recorded, empty: Store, tmp_path: Path
) -> None:
    run_id = read_bundle(empty, real.bundle)
    targets = []
    for store, name, number in ((real.store, "a", real.run_id), (empty, "b", run_id)):
        targets.append(export(store.run_dir(number), tmp_path / name, summary=store.run(number).summary))
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (targets[0] / name).read_bytes() == (targets[1] / name).read_bytes()
    found = find_checkpoint(empty.run_dir(run_id), "best")
    assert [path.name for path in found.path.parent.glob("step-*")] == ["step-000003"] and found.note == ""
    assert not (found.path / "optimizer.safetensors").exists()
    assert evaluate_run(empty, run_id) == empty.run(run_id).summary


def test_a_checkpoint_can_be_chosen_or_left_out(real: Recorded, empty: Store, tmp_path: Path) -> None:
    two = write_bundle(real.store, real.run_id, tmp_path / "two.zip", checkpoint=2, images="none")
    none = write_bundle(real.store, real.run_id, tmp_path / "none.zip", checkpoint=None, images="none")
    assert (inspect_bundle(two).checkpoint, inspect_bundle(none).checkpoint) == (2, None)
    assert find_checkpoint(empty.run_dir(read_bundle(empty, two))).path.name == "step-000002"
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        find_checkpoint(empty.run_dir(read_bundle(empty, none, again=True)))
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        write_bundle(real.store, real.run_id, tmp_path / "seven.zip", checkpoint=7)
    assert not (tmp_path / "seven.zip").exists()


def test_a_policy_whose_weights_were_all_trained_is_taken_along(empty: Store, tmp_path: Path) -> None:
    base = saved_policy.write_base(tmp_path / "base")
    policy = saved_policy.load_policy(base, adapter="full")
    with Store(tmp_path / "from" / "runs.db") as store:
        run_id = training_run(store)
        store.add_step(run_id, 1, metrics(1), [])
        saved_policy.save(store.run_dir(run_id), base, (policy, saved_policy.new_optimizer(policy)), 1)
        store.set_state(run_id, "stopped")
        bundle = write_bundle(store, run_id, tmp_path / "full.zip")
    found = find_checkpoint(empty.run_dir(read_bundle(empty, bundle))).path
    assert {path.name for path in found.iterdir()} == {"state.json", "config.yaml", "trainable.safetensors"}
    other = saved_policy.load_policy(saved_policy.write_base(tmp_path / "base"), adapter="full")
    with torch.no_grad():
        other.model.model.language_model.norm.weight.zero_()
    load_checkpoint(found, other)
    assert saved_policy.same(saved_policy.weights(policy), saved_policy.weights(other))


def test_pictures_can_be_left_behind_and_no_row_names_one_that_is(real: Recorded, empty: Store, tmp_path: Path) -> None:
    steps, shown = images_of(real.store, real.run_id)
    cases: list[tuple[dict[str, Any], set[int], bool]] = [
        ({"images": "all", "every": 3}, {1, 3}, True),
        ({"images": "evaluations"}, set(), True),
        ({"images": "none"}, set(), False),
    ]
    for number, (options, kept, evaluated) in enumerate(cases):
        bundle = write_bundle(real.store, real.run_id, tmp_path / f"{number}.zip", **options)
        run_id = read_bundle(empty, bundle, again=True)
        found, found_shown = images_of(empty, run_id)
        assert {step: len(paths) for step, paths in found.items()} == {
            step: len(paths) if step in kept else 0 for step, paths in steps.items()
        }
        assert len(found_shown) == (len(shown) if evaluated else 0)
        assert_same_rows(real.store, real.run_id, empty, run_id, pictures=False)
    assert all(steps.values()) and shown


def test_pictures_made_webp_are_far_smaller_and_show_the_same(real: Recorded, empty: Store, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    bundle = write_bundle(
        real.store, real.run_id, tmp_path / "w.zip", reencode=True, progress=lambda *now: told.append(now)
    )
    run_id = read_bundle(empty, bundle, progress=lambda *now: told.append(now))
    before, after = files(real.store, real.run_id, "images"), files(empty, run_id, "images")
    assert {name.replace(".png", ".webp") for name in before} == set(after)
    assert sum(map(len, after.values())) < sum(map(len, before.values())) / 3
    for name, data in before.items():
        pictures = [np.asarray(Image.open(io.BytesIO(d)).convert("RGB"), dtype=float)
                    for d in (data, after[name.replace(".png", ".webp")])]  # fmt: skip
        assert pictures[0].shape == pictures[1].shape
        assert np.abs(pictures[0] - pictures[1]).mean() < 12
    images_of(empty, run_id)
    counts = [(done, len(before)) for done in range(1, len(before) + 1)]
    assert told == counts + counts


def test_odd_values_missing_pictures_and_thumbnails_come_back(plain: Recorded, empty: Store) -> None:
    run_id = read_bundle(empty, plain.bundle)
    before, after = plain.store.rollouts(plain.run_id, 2), empty.rollouts(run_id, 2)
    assert before[0].image is not None
    gone = [replace(before[0], image=None, thumbnail=None), *before[1:]]
    assert plainly(gone) == plainly(after)
    assert plainly(plain.store.rollouts(plain.run_id, 1)) == plainly(empty.rollouts(run_id, 1))
    assert [row.thumbnail == row.image for row in after] == [True, True, False, True]
    kept = files(empty, run_id, "thumbs")
    there = files(plain.store, plain.run_id, "thumbs")
    assert set(kept) == {name for name in there if "step-000002/g0-k0" not in name} and len(kept) == 3
    assert {max(Image.open(io.BytesIO(data)).size) for data in kept.values()} == {256}
    assert empty.events(run_id)[-2].message == plain.store.events(plain.run_id)[-1].message
    run = empty.run(run_id)
    assert (run.state, run.message, run.error) == ("failed", "it ?[31mfailed", "line 1\nline ?2")
    assert not (empty.run_dir(run_id) / "checkpoints").exists() and empty.check() == []


@given(hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32, allow_infinity=False)))
def test_numbers_of_tokens_survive_as_text_bit_for_bit(values: np.ndarray) -> None:
    row = RolloutRow(step=1, g=0, k=0, prompt_id="p", prompt="", tier="basic", completion="", rewrite=None,
                     finished=True, reward=None, advantage=None, kl=None, parts={}, latent_seed=2**64 - 1,
                     token_ids=None, tokens=None, logprobs=values, entropies=None, token_kl=None, shift=None,
                     image=None, thumbnail=None)  # fmt: skip
    line = json.loads(json.dumps(rollout_line(row, None), allow_nan=False))
    back = np.frombuffer(RolloutLine.model_validate(line).row(lambda image: (None, None))["logprobs"], "<f4")
    finite = ~np.isnan(values)
    assert back[finite].tobytes() == values[finite].tobytes()
    assert np.isnan(back[~finite]).all() and back.shape == values.shape


def test_every_recorded_column_is_in_the_bundle(plain: Recorded) -> None:
    with plain.store.read() as db:
        columns = {table: set(db.table(table).columns_dict) for table in db.table_names()}
    here = {"run_id", "id", "thumbnail", "evaluation_id"}  # made anew by an import
    assert set(RolloutLine.model_fields) | here >= columns["rollouts"]
    assert set(ItemLine.model_fields) | here >= columns["evaluation_items"]
    assert set(EvaluationLine.model_fields) | here >= columns["evaluations"]
    assert set(EventLine.model_fields) | here >= columns["events"]
    assert set(StepLine.model_fields) | set(STEP_METRICS) | here >= columns["steps"]
    process = {"number", "heartbeat", "pid", "host", "process_token", "phase", "phase_done", "phase_total"}
    derived = {"preset", "config", "seed", "source", "summary"}
    assert set(RunLine.model_fields) | process | derived == columns["runs"]


def test_a_metric_of_another_version_is_left_out_and_said_to_be(plain: Recorded, empty: Store, tmp_path: Path) -> None:
    bundle = altered(plain.bundle, tmp_path / "x.zip", {"steps.jsonl": fields(metrics__brightness=1.5)})
    run_id = read_bundle(empty, bundle)
    assert_same_rows(plain.store, plain.run_id, empty, run_id, pictures=False)
    assert empty.events(run_id)[-1].message.endswith("Left out, unknown here: brightness.")


# -- an imported run never goes on ---------------------------------------------------------------------------


def test_an_imported_run_is_looked_at_and_never_resumed(plain: Recorded, empty: Store) -> None:
    run_id = read_bundle(empty, plain.bundle)
    before = files(empty, run_id, ".")
    words = f"Run {run_id} was imported; it can be looked at and its policy tried or exported, not resumed."
    manager = RunManager(empty)
    attempts: list[Callable[[], Any]] = [
        lambda: empty.set_state(run_id, "queued"),
        lambda: empty.set_state(run_id, "loading"),
        lambda: StoreRecorder(empty, run_id, RecordingConfig()),
        lambda: Session(empty, run_id, RunControl()).run(),
        lambda: manager.enqueue(run_id),
    ]
    for attempt in attempts:
        with pytest.raises(StoreError) as caught:
            attempt()
        assert str(caught.value) == words
    assert manager.current is None and manager.wait(0)
    refused = call("resume", run_id, "--db", empty.path)
    assert (refused.code, refused.err) == (2, f"Refused: {words}\n")
    assert empty.run(run_id).state == "failed" and files(empty, run_id, ".") == before
    empty.rename(run_id, "mine now")
    empty.tag(run_id, ["kept"])
    assert (empty.run(run_id).name, empty.run(run_id).tags) == ("mine now", ("kept",))
    empty.delete(run_id)
    assert_nothing_came(empty)


def test_the_same_run_is_imported_once_unless_asked(plain: Recorded, empty: Store, tmp_path: Path) -> None:
    first = read_bundle(empty, plain.bundle)
    empty.rename(first, "the example")
    fewer = write_bundle(plain.store, plain.run_id, tmp_path / "fewer.zip", images="none")
    for bundle in (plain.bundle, fewer):
        with pytest.raises(BundleError, match=rf"was imported before, as run {first} \(the example\); look at that"):
            read_bundle(empty, bundle)
    assert [run.id for run in empty.runs()] == [first] and len(list((empty.root / "runs").iterdir())) == 1
    second = read_bundle(empty, plain.bundle, again=True)
    assert second != first and empty.check() == []
    with pytest.raises(BundleError, match=f"is a bundle of run {plain.run_id} .*recorded in this database"):
        read_bundle(plain.store, plain.bundle)


def test_a_run_that_was_imported_can_be_bundled_again_and_keeps_its_origin(
    plain: Recorded, empty: Store, tmp_path: Path
) -> None:
    first = read_bundle(empty, plain.bundle)
    bundle = write_bundle(empty, first, tmp_path / "second.zip")
    assert inspect_bundle(bundle).run.id == plain.run_id
    with pytest.raises(BundleError, match="was imported before"):
        read_bundle(empty, bundle)
    with Store(tmp_path / "third" / "runs.db") as third:
        run_id = read_bundle(third, bundle)
        assert origin(third, run_id) == origin(empty, first)
        assert third.run(run_id).notes == empty.run(first).notes
        assert [event.kind for event in third.events(run_id)].count("imported") == 1
        assert_same_rows(empty, first, third, run_id)


# -- what is refused when writing ----------------------------------------------------------------------------


def test_only_a_run_that_has_ended_is_bundled(empty: Store, tmp_path: Path) -> None:
    run_id = to_state(empty, "training")
    with pytest.raises(BundleError, match=f"Run {run_id} is training; wait for its end or stop it"):
        write_bundle(empty, run_id, tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()


def test_a_bundle_replaces_only_a_bundle_and_only_when_forced(plain: Recorded, tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.zip"
    assert write_bundle(plain.store, plain.run_id, target, images="none") == target
    before = target.read_bytes()
    with pytest.raises(BundleError, match="is there already; give another file, or --force"):
        write_bundle(plain.store, plain.run_id, target)
    assert target.read_bytes() == before
    write_bundle(plain.store, plain.run_id, target, force=True)
    assert len(target.read_bytes()) > len(before)
    other = tmp_path / "letter.zip"
    other.write_text("dear all\n" * 10)
    with pytest.raises(BundleError, match="is there already and is no bundle"):
        write_bundle(plain.store, plain.run_id, other, force=True)
    with pytest.raises(BundleError, match="is a folder; name a file in it"):
        write_bundle(plain.store, plain.run_id, tmp_path, force=True)
    with pytest.raises(BundleError, match="can't be written"):
        write_bundle(plain.store, plain.run_id, other / "below.zip")
    with pytest.raises(BundleError, match="every is 0"):
        write_bundle(plain.store, plain.run_id, tmp_path / "y.zip", every=0)
    assert other.read_text() == "dear all\n" * 10
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["letter.zip", "new", "x.zip"]


def test_a_run_that_no_bundle_can_hold_is_refused_and_leaves_nothing(
    plain: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_engine.bundle.writer.ROWS_BYTES", 1000)
    with pytest.raises(BundleError, match="more than 1,000 bytes of rows"):
        write_bundle(plain.store, plain.run_id, tmp_path / "x.zip")
    monkeypatch.undo()
    monkeypatch.setattr("grpo_engine.bundle.writer.MEMBERS", 21)
    with pytest.raises(BundleError, match="has 5 pictures, too many for a bundle; take fewer pictures"):
        write_bundle(plain.store, plain.run_id, tmp_path / "x.zip")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_picture_or_row_is_found_when_the_bundle_is_written(tmp_path: Path) -> None:
    with Store(tmp_path / "runs.db") as store:
        run_id = training_run(store)
        with StoreRecorder(store, run_id, RecordingConfig()) as recorder:
            recorder.step(1, metrics(1), [group(1)])
        store.set_state(run_id, "stopped")
        image = store.rollouts(run_id, 1)[0].image
        assert image is not None
        store.file(image).write_bytes(store.file(image).read_bytes()[:60])
        with pytest.raises(BundleError, match=r"The picture .*g0-k0\.png is not a picture .*; delete it"):
            write_bundle(store, run_id, tmp_path / "x.zip")
        store.file(image).unlink()
        write_bundle(store, run_id, tmp_path / "x.zip")
        with store.write() as db:
            db.execute("UPDATE rollouts SET k = 70000000 WHERE k = 3")
        with pytest.raises(BundleError, match=f"Run {run_id} can't be bundled, .*rollouts.jsonl, line 4: k: "):
            write_bundle(store, run_id, tmp_path / "y.zip")
    assert not (tmp_path / "y.zip").exists()


# -- what is refused when reading ----------------------------------------------------------------------------


def test_a_file_that_is_no_bundle_is_refused_in_one_sentence(plain: Recorded, empty: Store, tmp_path: Path) -> None:
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("letter.txt", "dear all")
    content = plain.bundle.read_bytes()
    cases: dict[str, tuple[bytes, str]] = {
        "empty.zip": (b"", "it is too short"),
        "text.zip": (b"dear all\n" * 50, "it does not end like one"),
        "half.zip": (content[: len(content) // 2], "it does not end like one"),
        "behind.zip": (content + b"more", "it does not end like one"),
        "before.zip": (b"more" + content, "it does not end like one"),
        "other.zip": (other.read_bytes(), "a file 'letter.txt', which no bundle has"),
        "nothing.zip": (content[-22:-10] + bytes(10), "it has no bundle.json"),
    }
    end = struct.unpack("<4s4H2LH", content[-22:])
    many = struct.pack("<4s4H2LH", *end[:3], 65535, 65535, *end[5:])
    cases["many.zip"] = (content[:-22] + many, "more than 60,000 files")
    cases["nothing.zip"] = (struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 0), "it has no bundle.json")
    for name, (data, words) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BundleError, match=words) as caught:
            read_bundle(empty, tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1 and str(tmp_path / name) in str(caught.value)
    for path in (tmp_path / "none.zip", tmp_path):
        with pytest.raises(BundleError, match="There is no file"):
            read_bundle(empty, path)
    assert_nothing_came(empty)


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/cron.d/x", "../../x", "images/../../x.png", "images/a/../b.png", "images\\a\\b.png", "C:\\x.png"),
        *("images/.hidden/a.png", "images/a/b.svg", "images/A/b.png", "images/a/b.png\0.html", "images/a/"),
        *("checkpoint/pytorch_model.bin", "checkpoint/x.py", "runs.db", "images/a.png", f"images/a/{130 * 'b'}.png"),
    ],
)  # fmt: skip
def test_names_that_no_bundle_has_are_refused(plain: Recorded, empty: Store, tmp_path: Path, name: str) -> None:
    bundle = tmp_path / "x.zip"
    shutil.copyfile(plain.bundle, bundle)
    # zipfile would tidy the name: so it is written under another one of equal length first.
    stand_in = "q" * len(name.encode())
    with zipfile.ZipFile(bundle, "a") as file:
        file.writestr(stand_in, b"x")
    bundle.write_bytes(bundle.read_bytes().replace(stand_in.encode(), name.encode()))
    with pytest.raises(BundleError, match="which no bundle has"):
        read_bundle(empty, bundle)
    assert_nothing_came(empty)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "x.zip"]


def special(name: str, data: bytes = b"", **attributes: int) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info, data


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (special("images/a/b.png", b"/etc/passwd", external_attr=(stat.S_IFLNK | 0o777) << 16), "is a link"),
        (special("images/a/b.png", external_attr=(stat.S_IFDIR | 0o777) << 16), "is a link, encrypted or otherwise"),
        (special("images/a/b.png", b"x", compress_type=zipfile.ZIP_LZMA), "packed in a way that bundles are not"),
        (special("images/a/b.png", b"x"), "no row names its picture images/a/b.png"),
        (special("steps.jsonl", b"{}"), "it has two files steps.jsonl"),
    ],
)
def test_members_that_are_not_plain_files_are_refused(
    plain: Recorded, empty: Store, tmp_path: Path, member: tuple[zipfile.ZipInfo, bytes], words: str
) -> None:
    bundle = tmp_path / "x.zip"
    shutil.copyfile(plain.bundle, bundle)
    with zipfile.ZipFile(bundle, "a") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_args, **_named: None)  # zipfile on doubled names
        file.writestr(*member)
    with pytest.raises(BundleError, match=words):
        read_bundle(empty, bundle)
    assert_nothing_came(empty)


def test_an_encrypted_member_is_refused(plain: Recorded, empty: Store, tmp_path: Path) -> None:
    data = bytearray(plain.bundle.read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(BundleError, match="is a link, encrypted or otherwise special"):
        read_bundle(empty, tmp_path / "x.zip")


def test_a_bundle_that_would_fill_the_disk_is_refused_before_it_is_unpacked(
    plain: Recorded, empty: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = altered(plain.bundle, tmp_path / "bomb.zip", {"grpo_training.log": bytes(60_000_000)})
    assert bomb.stat().st_size < 300_000 or plain.bundle.stat().st_size > 200_000
    lines = altered(plain.bundle, tmp_path / "line.zip", {"events.jsonl": b" " * 8_000_000})
    large = altered(plain.bundle, tmp_path / "large.zip", {"bundle.json": b" " * 2_000_000})
    monkeypatch.setattr(archive_module, "RATIO", 20)
    with pytest.raises(BundleError, match=r"it would unpack to 6\d,\d\d\d,\d\d\d bytes"):
        read_bundle(empty, bomb)
    with pytest.raises(BundleError, match="bundle.json has 2,000,000 bytes, more than 1,048,576"):
        read_bundle(empty, large)
    monkeypatch.undo()
    with pytest.raises(BundleError, match="line 1 of events.jsonl is longer than 4,194,304 bytes"):
        read_bundle(empty, lines)
    monkeypatch.setattr(archive_module, "ROWS_BYTES", 500)
    with pytest.raises(BundleError, match="it would unpack to"):
        read_bundle(empty, plain.bundle)
    assert_nothing_came(empty)


def test_no_more_is_read_than_the_directory_announces(plain: Recorded, empty: Store, tmp_path: Path) -> None:
    bundle = altered(plain.bundle, tmp_path / "x.zip", {"steps.jsonl": lambda data: data + b" " * 3_000_000})
    with zipfile.ZipFile(bundle) as file:
        real_size = struct.pack("<L", file.getinfo("steps.jsonl").file_size)
    claimed = bundle.read_bytes().replace(real_size, struct.pack("<L", 900))
    bundle.write_bytes(claimed)
    with archive_module.Archive(bundle) as opened, pytest.raises(BundleError, match="it is damaged"):
        opened.read("steps.jsonl")
    with pytest.raises(BundleError):
        read_bundle(empty, bundle)
    assert_nothing_came(empty)


def one_png(side: int = 8, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, 1)).save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("bundle.json", b"[]", "its bundle.json is not of this program"),
        ("bundle.json", b"[" * 100_000, "bundle.json is not valid JSON"),
        ("bundle.json", fields(format="another"), "its bundle.json is not of this program"),
        ("bundle.json", fields(version=2), r"newer version of this program \(format 2, this one reads up to 1\)"),
        ("bundle.json", fields(version="1"), "bundle.json: version"),
        ("bundle.json", fields(run__state="training"), "bundle.json: run.state"),
        ("bundle.json", fields(run__created=float("nan")), "NaN is not a finite number"),
        ("bundle.json", fields(run__created=1e15), "bundle.json: run.created"),
        ("bundle.json", fields(run__step=10**30), "is too large a number"),
        ("bundle.json", fields(run__step=3), "it has 2 steps of 3"),
        ("bundle.json", fields(run__id="../../etc"), "bundle.json: run.id"),
        ("bundle.json", fields(run__name="a\nb"), "bundle.json: run.name"),
        ("bundle.json", fields(run__tags=["x" * 50]), "bundle.json: run.tags.0"),
        ("bundle.json", fields(run__pid=1), "bundle.json: run.pid"),
        ("bundle.json", fields(checkpoint=1), "its policy is incomplete"),
        ("config.yaml", b"training: {steps: none}", "settings that this version of the program does not take"),
        ("config.yaml", b"rocket: 1", "open it with the version that wrote it"),
        ("config.yaml", b"a: &a [1, 2]\nb: [*a, *a]", "has references, which settings never have"),
        ("config.yaml", b"[" * 5000, "config.yaml is not YAML"),
        ("config.yaml", b"!!python/object/apply:os.system ['true']", "config.yaml is not YAML"),
        ("config.yaml", b"\xff\xfe", "config.yaml is not text"),
        ("steps.jsonl", None, "it has no steps.jsonl"),
        ("steps.jsonl", fields(step=2), "steps.jsonl, line 1: step 2 follows step 0"),
        ("steps.jsonl", fields(metrics__kl_penalty="x"), "steps.jsonl, line 1: metrics.kl_penalty"),
        ("steps.jsonl", lambda data: data.replace(b'"kl_penalty":1', b'"kl_penalty":1e999'), "not a finite number"),
        ("steps.jsonl", b"{}\n" + b"[" * 900 + b"]" * 900, "steps.jsonl, line 1: step"),
        ("rollouts.jsonl", fields(reward=True), "rollouts.jsonl, line 1: reward"),
        ("rollouts.jsonl", fields(latent_seed=-1), "rollouts.jsonl, line 1: latent_seed"),
        ("rollouts.jsonl", fields(logprobs=[0.0] * 9), "its per-token lists differ in length"),
        ("rollouts.jsonl", fields(logprobs=[1e300]), "rollouts.jsonl, line 1: logprobs.0"),
        ("rollouts.jsonl", fields(step=9), "rollouts.jsonl, line 1 is out of order"),
        ("rollouts.jsonl", lambda data: data + data, "rollouts.jsonl, line 9 is out of order"),
        ("rollouts.jsonl", fields(image="../../runs.db"), "a row names the picture '../../runs.db', which is missing"),
        ("rollouts.jsonl", fields(image="runs/0001-x/images/a.png"), "which is missing"),
        ("rollouts.jsonl", fields(extra=1), "rollouts.jsonl, line 1: extra"),
        ("events.jsonl", fields(level="loud"), "events.jsonl, line 1: level"),
        ("events.jsonl", fields(data=[1]), "events.jsonl, line 1: data"),
        ("events.jsonl", b'{"\xff": 1}', "events.jsonl, line 1 is not valid JSON"),
        ("events.jsonl", b'{"data":' + b'{"a":' * 600 + b"1" + b"}" * 601, "events.jsonl, line 1"),
        ("grpo_training.log", b"\x00\x01", "grpo_training.log is not text"),
        ("grpo_training.log", b"\xff", "grpo_training.log is not text"),
        ("metrics.json", b"{'a': 1}", "metrics.json is not valid JSON"),
        ("images/step-000001/g0-k0.webp", b"<svg onload='alert(1)'/>", "g0-k0.webp is not a picture"),
        ("images/step-000001/g0-k0.webp", one_png(), "g0-k0.webp is not a picture"),
        ("images/step-000001/g0-k0.webp", lambda data: data[:-200], "g0-k0.webp is not a picture"),
        ("images/step-000001/g0-k0.webp", None, "which is missing"),
    ],
)
def test_contents_that_are_wrong_are_refused_and_leave_nothing(
    plain: Recorded, empty: Store, tmp_path: Path, name: str, change: Change, words: str
) -> None:
    bundle = altered(plain.bundle, tmp_path / "x.zip", {name: change})
    with pytest.raises(BundleError, match=words) as caught:
        read_bundle(empty, bundle)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000
    assert_nothing_came(empty)


def sealed(**changes: Any) -> Callable[[bytes], bytes]:
    """Another state.json, with a right checksum of itself."""

    def change(data: bytes) -> bytes:
        from grpo_engine.checkpoint_folder import seal

        state = json.loads(data) | changes
        del state["checksum"]
        return seal(state)

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("checkpoint/state.json", None, "its policy is incomplete"),
        ("checkpoint/state.json", sealed(files={"../../../x": "0" * 64}), "its policy is not the one it says"),
        ("checkpoint/state.json", sealed(kind="full"), "its policy is not the one it says"),
        ("checkpoint/state.json", sealed(step=2), "its policy is not the one it says"),
        ("checkpoint/state.json", sealed(path="/tmp"), "checkpoint/state.json: path"),
        ("checkpoint/state.json", sealed(base_source='x"\nimport os'), "checkpoint/state.json: base_source"),
        ("checkpoint/state.json", lambda data: data.replace(b"lora", b"LORA"), "checkpoint/state.json: kind"),
        ("checkpoint/state.json", lambda data: data.replace(b'"serial": ', b'"serial": 1'), "its policy is damaged"),
        ("checkpoint/adapter_model.safetensors", None, "its policy is not the one it says"),
        ("checkpoint/adapter_model.safetensors", lambda data: data[:-1] + b"x", "its policy is damaged"),
        ("checkpoint/adapter_config.json", b'{"peft_type": "OTHER"}', "describes no LoRA adapter"),
        ("checkpoint/config.yaml", b"rocket: 1", "open it with the version that wrote it"),
        ("evaluations.jsonl", fields(summary={"gain": 1}), "evaluations.jsonl, line 1: "),
        ("evaluations.jsonl", fields(items=1), "an evaluation has more or fewer pictures than it says"),
        ("evaluations.jsonl", lambda data: data + data, "evaluations.jsonl, line 4 is there twice"),
        ("evaluations.jsonl", fields(step=4), "evaluations.jsonl, line 1 is there twice, or of a step that is not"),
        ("evaluations.jsonl", fields(summary__headline="x"), "its headline is not among its gains"),
        ("evaluations.jsonl", fields(summary__arms__original__reward="high"), "evaluations.jsonl, line 1: "),
        ("items.jsonl", fields(kind="other"), "items.jsonl, line 1 is out of order, or of no evaluation"),
        ("items.jsonl", lambda data: data + data, "is out of order, or of no evaluation"),
        ("items.jsonl", fields(judge_parts={"color": [1]}), "items.jsonl, line 1: judge_parts.color"),
        ("items.jsonl", fields(arm="<b>"), "items.jsonl, line 1: arm"),
    ],
)
def test_a_policy_or_measurement_that_is_wrong_is_refused_and_leaves_nothing(
    real: Recorded, empty: Store, tmp_path: Path, name: str, change: Change, words: str
) -> None:
    bundle = altered(real.bundle, tmp_path / "x.zip", {name: change})
    with pytest.raises(BundleError, match=words):
        read_bundle(empty, bundle)
    assert_nothing_came(empty)


def test_weights_that_are_no_safetensors_are_refused_whatever_their_checksum(
    real: Recorded, empty: Store, tmp_path: Path
) -> None:
    import hashlib

    with zipfile.ZipFile(real.bundle) as file:
        known = json.loads(file.read("checkpoint/state.json"))["files"]
    fake = b"\x80\x04pickled"
    digests = known | {"adapter_model.safetensors": hashlib.sha256(fake).hexdigest()}
    changes: dict[str, Change] = {
        "checkpoint/adapter_model.safetensors": fake,
        "checkpoint/state.json": sealed(files=digests),
    }
    with pytest.raises(BundleError, match="its policy is damaged"):
        read_bundle(empty, altered(real.bundle, tmp_path / "x.zip", changes))
    assert_nothing_came(empty)


def test_a_picture_that_is_huge_or_moves_is_refused(tmp_path: Path, empty: Store) -> None:
    with Store(tmp_path / "runs.db") as store:
        run_id = training_run(store)
        with StoreRecorder(store, run_id, RecordingConfig()) as recorder:
            recorder.step(1, metrics(1), [group(1)])
        store.set_state(run_id, "stopped")
        bundle = write_bundle(store, run_id, tmp_path / "x.zip")
    moving = one_png(save_all=True, append_images=[Image.new("RGB", (8, 1), "red")])
    for data in (one_png(5000), moving):
        changed = altered(bundle, tmp_path / "y.zip", {"images/step-000001/g0-k0.png": data})
        with pytest.raises(BundleError, match="g0-k0.png is no still picture of at most 4096 x 4096 pixels"):
            read_bundle(empty, changed)
    assert_nothing_came(empty)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_are_refused_or_change_nothing(plain: Recorded, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(plain.bundle.read_bytes())
    directory = struct.unpack("<L", content[-6:-2])[0]
    place = st.one_of(st.integers(0, len(content) - 1), st.integers(directory, len(content) - 1))
    for position, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=4)):
        content[position] = value
    bundle = tmp_path / "damaged.zip"
    bundle.write_bytes(content)
    shutil.rmtree(tmp_path / "fuzz", ignore_errors=True)
    with Store(tmp_path / "fuzz" / "runs.db") as store:
        try:
            run_id = read_bundle(store, bundle)
        except BundleError as error:
            assert len(str(error).splitlines()) == 1
            assert_nothing_came(store)
        else:
            assert_same_rows(plain.store, plain.run_id, store, run_id, pictures=False)


def test_an_import_that_fails_half_way_leaves_neither_rows_nor_files(plain: Recorded, empty: Store) -> None:
    with empty.write() as db:
        db.execute(
            "CREATE TRIGGER full BEFORE INSERT ON rollouts WHEN new.step = 2 BEGIN SELECT RAISE(ABORT, 'no room'); END"
        )
    with pytest.raises(StoreError, match="no room"):
        read_bundle(empty, plain.bundle)
    assert_nothing_came(empty)
    with empty.write() as db:
        db.execute("DROP TRIGGER full")
    read_bundle(empty, plain.bundle)
    with Store(empty.path, read_only=True) as reader, pytest.raises(StoreError, match="open for reading only"):
        read_bundle(reader, plain.bundle, again=True)
    assert len(list((empty.root / "runs").iterdir())) == 1


def test_what_killed_imports_and_exports_left_is_removed(plain: Recorded, empty: Store, tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = empty.root / "runs" / f".import-0011aabb-{dead.pid}"
    living = empty.root / "runs" / ".import-0011aabb-1"
    for folder in (left, living):
        (folder / "images").mkdir(parents=True)
    run_id = read_bundle(empty, plain.bundle)
    assert {path.name for path in (empty.root / "runs").iterdir()} == {living.name, run_id}
    (tmp_path / f".bundle-x.zip-{dead.pid}").write_text("half")
    (tmp_path / f".bundle-y.zip-{dead.pid}").write_text("of another")
    write_bundle(plain.store, plain.run_id, tmp_path / "x.zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".bundle-y.zip-{dead.pid}", "there", "x.zip"]


def test_a_bundle_is_imported_without_torch(real: Recorded, tmp_path: Path) -> None:
    code = f"""
import sys
from grpo_engine.bundle import read_bundle
from grpo_engine.store import Store
with Store({str(tmp_path / "runs.db")!r}) as store:
    read_bundle(store, {str(real.bundle)!r})
print([name for name in ("torch", "transformers", "diffusers", "peft", "gradio") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- the command line ----------------------------------------------------------------------------------------


def test_a_run_is_bundled_and_imported_from_the_command_line(real: Recorded, tmp_path: Path) -> None:
    bundle, db = tmp_path / "run.zip", tmp_path / "new" / "runs.db"
    written = call("export", real.run_id, "--db", real.store.path, "--to", bundle, "--format", "bundle",
                   "--images", "all", "--every", 3, "--webp", "--checkpoint", "none")  # fmt: skip
    assert written.code == 0, written.err
    assert written.out.startswith(f"Written to {bundle} (0.")
    manifest = inspect_bundle(bundle)
    assert (manifest.pictures.choice, manifest.pictures.every, manifest.pictures.reencoded) == ("all", 3, True)
    assert manifest.checkpoint is None
    imported = call("import", bundle, "--db", db)
    assert imported.code == 0, imported.err
    with Store(db) as store:
        (run,) = store.runs()
        assert imported.out == f"run {run.id}: {origin(store, run.id)}\n"
        assert_same_rows(real.store, real.run_id, store, run.id, pictures=False)
    shown = call("show", "last", "--db", db)
    assert shown.code == 0 and f"Recorded elsewhere as {real.run_id} on " in shown.out
    twice = call("import", bundle, "--db", db)
    assert twice.code == 2 and f"was imported before, as run {run.id}" in twice.err
    assert call("import", bundle, "--db", db, "--again").code == 0
    again = call("export", real.run_id, "--db", real.store.path, "--to", bundle, "--format", "bundle")
    assert again.code == 2 and "--force" in again.err


def test_a_file_that_is_no_bundle_is_refused_before_a_database_is_made(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_text("no bundle at all, just some text")
    outcome = call("import", tmp_path / "x.zip", "--db", tmp_path / "runs.db")
    assert outcome.code == 2
    assert outcome.err.startswith(f"Refused: {tmp_path / 'x.zip'} is not a bundle that can be opened")
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_settings_of_a_bundle_are_refused_with_other_formats(real: Recorded, tmp_path: Path) -> None:
    for option in (["--images", "all"], ["--every", "2"], ["--webp"]):
        outcome = call("export", real.run_id, "--db", real.store.path, "--to", tmp_path / "out", *option)
        assert outcome.code == 2 and "are for --format bundle, not peft" in outcome.err
    assert list(tmp_path.iterdir()) == []
