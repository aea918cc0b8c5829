"""What the browser tests know of a running app, and the wire between it and a page."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Page

from grpo_engine.store import Store


@dataclass
class Served:
    """A running app: its address, and its database as another process sees it."""

    url: str
    db: Path
    store: Store
    process: subprocess.Popen[bytes]

    def log(self) -> str:
        """What the app's process has printed so far."""
        return (self.db.parent / "app.log").read_text(encoding="utf-8", errors="replace")


class Wire:
    """What a page asks from now on can be lost on its way, or its answer held back.

    Patterns are regular expressions, looked for in the address.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        page.evaluate(
            """() => {
                const real = window.fetch.bind(window);
                window.wire = { lost: null, slow: null, misses: 0, held: [] };
                window.fetch = async (path, options) => {
                    if (wire.lost && wire.lost.test(path)) {
                        wire.misses += 1;
                        throw new TypeError('lost');
                    }
                    const slow = wire.slow && wire.slow.test(path);
                    const answer = await real(path, options);
                    if (slow) await new Promise((go) => wire.held.push(go));
                    return answer;
                };
            }"""
        )

    def lose(self, pattern: str) -> None:
        """Lose what is asked of such addresses, until `mend`."""
        self.page.evaluate("pattern => { wire.lost = new RegExp(pattern); }", pattern)

    def missed(self) -> None:
        """Wait until a question is lost."""
        self.page.wait_for_function("wire.misses > 0")

    def mend(self) -> None:
        """Lose nothing more."""
        self.page.evaluate("() => { wire.lost = null; }")

    def hold(self, pattern: str) -> None:
        """Hold back the answers of such addresses, until `release`."""
        self.page.evaluate("pattern => { wire.slow = new RegExp(pattern); }", pattern)

    def held(self) -> None:
        """Wait until an answer is held back."""
        self.page.wait_for_function("wire.held.length > 0")

    def release(self) -> None:
        """Hand over what was held back, and hold back nothing more."""
        self.page.evaluate("() => { wire.slow = null; for (const go of wire.held.splice(0)) go(); }")


def later(page: Page, seconds: float) -> None:
    """Set the page's clock forward."""
    page.evaluate("ms => { const now = Date.now; Date.now = () => now() + ms; }", 1000 * seconds)
