"""How long until ``python app.py`` serves its first page, against a bare Gradio page with one button.

Both are started in turn, as processes of their own, several times; an empty database each time, so that the
first start's import of the recorded run is part of ours. Goal: at most 1.5 times the bare page.

    PYTHONPATH=. python benchmarks/first_page.py --pairs 5
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from common import ROOT, bars, machine, median, table
from serving import free_port

BARE = """
import gradio as gr
with gr.Blocks() as page:
    gr.Button("Start")
page.launch(server_port={port}, quiet=True)
"""


def seconds_to_first_page(command: list[str], port: int, folder: Path) -> float:
    """From the start of the process to the whole first page."""
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while time.perf_counter() - begun < 300:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                    answer.read()
                return time.perf_counter() - begun
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"{command} ended with {process.returncode}") from None
                time.sleep(0.01)
        raise SystemExit("no page in 300 seconds")
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    pairs: int = parser.parse_args().pairs
    ours: list[float] = []
    bare: list[float] = []
    for index in range(pairs + 1):  # the first pair only warms the disk
        with tempfile.TemporaryDirectory() as name:
            folder, port = Path(name), free_port()
            taken = seconds_to_first_page([sys.executable, "-c", BARE.format(port=port)], port, folder)
            port = free_port()
            app = [
                sys.executable,
                str(ROOT / "app.py"),
                "--no-browser",
                "--port",
                str(port),
                "--db",
                str(folder / "runs.db"),
            ]
            own = seconds_to_first_page(app, port, folder)
        if index:
            bare.append(taken)
            ours.append(own)
    ratios = [mine / theirs for mine, theirs in zip(ours, bare, strict=True)]
    print(machine())
    table(
        ["page", "median s", "least", "most"],
        [["bare Gradio", median(bare), min(bare), max(bare)], ["this app", median(ours), min(ours), max(ours)]],
    )
    bars([("bare Gradio", median(bare)), ("this app", median(ours))], "s")
    print(f"ratio, median of {pairs} pairs: {median(ratios):.2f} (goal: at most 1.50)")


if __name__ == "__main__":
    main()
