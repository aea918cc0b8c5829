"""The frame around the screens: tabs, address, theme, several browsers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect
from served import Served

SCREENS = ("train", "live", "gallery", "compare", "playground", "system")


@pytest.mark.parametrize("name", SCREENS)
def test_a_link_opens_its_screen_and_a_reload_keeps_it(page: Page, served: Served, name: str) -> None:
    page.goto(f"{served.url}/#{name}")
    tab = page.locator(f"#tab-{name}-button")
    expect(tab).to_have_attribute("aria-selected", "true")
    expect(page.locator(f".g-{name}")).to_be_visible()
    page.reload()
    expect(tab).to_have_attribute("aria-selected", "true")


def test_the_browsers_back_button_returns_to_the_screen_before(page: Page, served: Served) -> None:
    page.goto(f"{served.url}/#train")
    expect(page.locator(".g-train")).to_be_visible()
    page.evaluate("grpo.go('compare')")
    expect(page.locator(".g-compare")).to_be_visible()
    page.go_back()
    expect(page.locator(".g-train")).to_be_visible()


def test_on_a_phone_every_screen_can_be_gone_to(new_page: Callable[..., Page], served: Served) -> None:
    page = new_page(width=390)
    page.goto(f"{served.url}/#train")
    expect(page.locator(".g-train")).to_be_visible()
    for name in reversed(SCREENS):
        page.evaluate(f"grpo.go('{name}')")
        expect(page.locator(f".g-{name}")).to_be_visible()


def test_a_screen_that_is_being_left_does_not_call_itself_back(new_page: Callable[..., Page], served: Served) -> None:
    page = new_page()
    page.goto(f"{served.url}/#live")
    expect(page.locator(".g-live")).to_be_visible()
    page.evaluate("grpo.go('train'); grpo.note('live', { step: 1 })")  # its data came just after the click
    expect(page.locator(".g-train")).to_be_visible()
    assert page.evaluate("location.hash").startswith("#train")


def test_an_app_that_hangs_is_told_and_so_is_its_return(page: Page, served: Served) -> None:
    page.goto(f"{served.url}/#train")
    expect(page.locator(".g-train")).to_be_visible()
    page.evaluate(
        "() => { const real = AbortSignal.timeout; AbortSignal.timeout = () => real.call(AbortSignal, 300); }"
    )
    page.route("**/grpo/pulse", lambda route: None)  # taken, and never answered
    expect(page.locator(".g-status")).to_have_text("The app does not answer", timeout=15_000)
    page.unroute("**/grpo/pulse")
    expect(page.locator(".g-status")).not_to_have_text("The app does not answer")


def test_the_theme_follows_the_system_until_it_is_chosen_and_then_stays(
    new_page: Callable[..., Page], served: Served
) -> None:
    page = new_page(dark=True)
    page.goto(served.url)
    expect(page.locator("body.dark")).to_be_attached()
    page.get_by_role("button", name="Light theme").click()
    expect(page.locator("body.dark")).not_to_be_attached()
    page.reload()
    expect(page.get_by_role("button", name="Dark theme")).to_be_visible()
    expect(page.locator("body.dark")).not_to_be_attached()


@pytest.mark.parametrize("name", SCREENS)
@pytest.mark.parametrize("width", [1024, 390])
def test_no_screen_is_wider_than_its_window(
    new_page: Callable[..., Page], served: Served, name: str, width: int
) -> None:
    page = new_page(width=width)
    page.goto(f"{served.url}/#{name}")
    expect(page.locator(f".g-{name}")).to_be_visible()
    page.wait_for_timeout(1500)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
