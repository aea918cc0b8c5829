"""Runs and system in a real browser: taking a run away, bringing one in, checks, the queue."""

from __future__ import annotations

import re
import time
import zipfile
from pathlib import Path

from playwright.sync_api import Page, Route, expect
from served import Served, Wire

from grpo_engine.bundle import read_bundle, write_bundle
from grpo_engine.config import RunConfig
from grpo_engine.store import Store
from grpo_engine.store.writes import update_run

SLOW = 120_000  # ms: the engine may still be importing on a busy machine


def take(page: Page, format: str, target: Path) -> Path:
    """Export the first run by clicks, and download what was made."""
    page.get_by_role("button", name="Export First").click()
    dialog = page.get_by_role("dialog", name="Export First")
    dialog.get_by_role("radio", name=re.compile(f"^{format}")).check()
    dialog.get_by_role("button", name="Export", exact=True).click()
    line = page.locator(".g-system-job", has_text=f"{format} of First").first
    link = line.get_by_role("link", name=re.compile("^Download"))
    with page.expect_download(timeout=SLOW) as download:
        link.click(timeout=SLOW)
    download.value.save_as(target)
    line.get_by_role("button", name=re.compile("^Delete the file")).click()
    expect(line).to_have_count(0)
    return target


def test_a_bundle_is_taken_away_and_brought_into_another_database(page: Page, served: Served, tmp_path: Path) -> None:
    page.goto(f"{served.url}/#system")
    file = take(page, "Bundle", tmp_path / "first.zip")
    with Store(tmp_path / "runs.db") as other:
        run = other.run(read_bundle(other, file))
        assert (run.name, run.source, run.step) == ("First", "imported", 6)


def test_the_adapter_and_the_merged_model_of_a_run_are_taken_away(page: Page, served: Served, tmp_path: Path) -> None:
    page.goto(f"{served.url}/#system")
    for format, member in (("Adapter", "adapter_model.safetensors"), ("Merged model", "model.safetensors")):
        with zipfile.ZipFile(take(page, format, tmp_path / "policy.zip")) as archive:
            assert any(name.endswith(f"/{member}") for name in archive.namelist())


def test_an_import_is_labelled_recorded_and_can_be_removed(page: Page, served: Served, tmp_path: Path) -> None:
    file = tmp_path / "mine.zip"
    write_bundle(served.store, served.store.resolve("First").id, file, images="evaluations", reencode=True)
    page.goto(f"{served.url}/#system")
    page.get_by_label("Bundle to import").set_input_files(file)
    failed = page.locator(".g-system-job", has_text="Import of mine.zip").first
    expect(failed).to_contain_text("was recorded in this database", timeout=SLOW)
    page.get_by_role("checkbox", name=re.compile("as a copy")).check()
    page.get_by_label("Bundle to import").set_input_files(file)
    row = page.locator(".g-system tbody tr", has_text="recorded")
    expect(row).to_have_count(1, timeout=SLOW)
    expect(row).to_contain_text("First")
    row.get_by_role("button", name="Delete First").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete the run").click()
    expect(row).to_have_count(0)
    assert all(run.source == "local" for run in served.store.runs())


def test_what_is_no_bundle_is_refused_in_a_sentence(page: Page, served: Served, tmp_path: Path) -> None:
    file = tmp_path / "notes.zip"
    file.write_bytes(b"<script>alert(1)</script>")
    page.goto(f"{served.url}/#system")
    page.get_by_label("Bundle to import").set_input_files(file)
    line = page.locator(".g-system-job", has_text="Import of notes.zip").first
    expect(line).to_contain_text("notes.zip is not a bundle that can be opened")
    line.get_by_role("button", name="Dismiss").click()
    expect(line).to_have_count(0)


def test_a_lost_look_does_not_end_the_watching_of_a_job(page: Page, served: Served) -> None:
    def at_work(route: Route) -> None:
        told = route.fetch().json()
        told["jobs"] = [{"token": "t", "kind": "export", "title": "A long export", "run": "", "state": "working",
                         "message": "Packing", "done": 1, "total": 9, "unit": "bytes", "file": None, "size": None,
                         "result": None, "created": 0.0, "finished": None}]  # fmt: skip
        route.fulfill(json=told)

    page.route("**/grpo/system/state*", at_work)
    page.goto(f"{served.url}/#system")
    line = page.locator(".g-system-job", has_text="A long export")
    expect(line).to_be_visible()
    wire = Wire(page)
    wire.lose("system/state")
    wire.missed()
    page.unroute("**/grpo/system/state*", at_work)
    wire.mend()
    expect(line).to_have_count(0, timeout=10_000)  # the app has no such job


def test_disk_use_machine_and_checks_are_shown(page: Page, served: Served) -> None:
    page.goto(f"{served.url}/#system")
    expect(page.get_by_text(re.compile(r"MiB in runs, .* in the database, .* free on the disk"))).to_be_visible()
    expect(page.get_by_role("region", name="Database")).to_contain_text(str(served.db))
    page.get_by_role("button", name="Check the database").click()
    expect(page.get_by_text(re.compile("Nothing is wrong with it"))).to_be_visible()
    page.get_by_role("button", name="Check now").click()
    expect(page.get_by_text(re.compile("Nothing is missing"))).to_be_visible(timeout=SLOW)
    expect(page.get_by_role("region", name="This machine").locator("dt", has_text="torch").first).to_be_visible()


def test_a_queued_run_that_was_left_behind_can_be_dropped(page: Page, served: Served) -> None:
    run_id = served.store.create_run(RunConfig.load("tiny", ["recording.name=Left behind"]))
    with served.store.write() as db:
        update_run(db, run_id, {"updated": time.time() - 60})
    page.goto(f"{served.url}/#system")
    line = page.get_by_role("region", name="Queue").get_by_role("listitem").filter(has_text="Left behind")
    expect(line.get_by_role("button", name="Put back")).to_be_visible()
    line.get_by_role("button", name="Drop").click()
    expect(line).to_have_count(0)
    assert served.store.run(run_id).state == "stopped"
    served.store.delete(run_id)
    expect(page.locator(f'tr[data-run="{run_id}"]')).to_have_count(0)
