"""The page of traces in headless Chromium, at desktop and phone width, light and dark.

    pip install -c constraints.txt playwright
    python -m tests.report.browser                     every check; ends with status 1 where one fails
    python -m tests.report.browser --pictures=DIR      also pictures of each
    python -m tests.report.browser --page=out.html     pictures and layout of a page of launch.sample

Takes the Chromium that is installed (the variable CHROMIUM, or chromium on the path), else the one of
`playwright install chromium`. It is no test of the default run, which needs no browser.
"""

import argparse
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, Route, sync_playwright

from retro_jax.report.escapes import visible
from retro_jax.report.trace_page import trace_body, trace_page
from retro_jax.serve.app import Server
from retro_jax.serve.limits import Limits
from tests.report.test_trace_page import HOSTILE, make_page, make_value
from tests.serve.fakes import make_generator
from tests.serve.served import listening

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
ORIGIN = "http://localhost:1"  # every request to it is answered here
_TOKEN = '.trace .u[data-u="7"]'
_CHECKS: list[Callable[[Page, bool], None]] = []


def check(function: Callable[[Page, bool], None]) -> Callable[[Page, bool], None]:
    """Adds a check of the hostile page: a function of the page and whether it is a phone."""
    _CHECKS.append(function)
    return function


@check
def nothing_is_wider_than_the_screen(page: Page, phone: bool) -> None:
    assert page.viewport_size is not None
    wide, room = page.evaluate("document.documentElement.scrollWidth"), page.viewport_size["width"]
    assert wide <= room, f"{wide} pixels in {room}"


@check
def hostile_text_is_shown_and_not_obeyed(page: Page, phone: bool) -> None:
    assert page.locator('.u[data-u="1"]').inner_text() == visible(HOSTILE)
    assert page.title() == " ".join(visible(HOSTILE).split())
    assert page.locator("img, iframe").count() == 0
    assert page.locator("script").count() == 2


@check
def pointing_at_a_token_shows_its_figures(page: Page, phone: bool) -> None:
    point_at(page, _TOKEN, phone)
    details = page.locator("#details")
    text = details.inner_text()
    for part in ("token 10", "held responsible", "10 tokens in a row", "67% of 3 votes", "layer"):
        assert part in text, f"{part!r} is not in {text!r}"
    assert visible(f"a.py {HOSTILE}") in text
    assert page.locator(".neighbour.blamed").count() == 1
    lit = page.evaluate(
        "[...document.querySelectorAll('[data-t]')].filter(t => t.style.backgroundColor).length"
    )
    assert lit > 10
    token, panel = (page.locator(name).bounding_box() for name in (_TOKEN, "#details"))
    assert token is not None
    assert panel is not None
    assert token["y"] + token["height"] <= panel["y"], "the figures cover their token"
    assert page.viewport_size is not None
    assert panel["height"] <= 0.4 * page.viewport_size["height"]


@check
def another_layer_can_be_chosen(page: Page, phone: bool) -> None:
    point_at(page, _TOKEN, phone, pin=True)
    page.get_by_role("button", name="5", exact=True).click()
    assert page.locator("button[aria-pressed=true]").inner_text() == "5"


@check
def the_keyboard_moves_between_tokens(page: Page, phone: bool) -> None:
    page.locator('.u[data-u="0"]').focus()
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.u") == "7"
    assert "token 10" in page.locator("#details").inner_text()
    page.keyboard.press("Enter")
    assert page.locator(".u.pinned").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#details").is_hidden()
    page.keyboard.press("End")
    last = page.locator(".u").count() - 1
    assert page.evaluate("document.activeElement.dataset.u") == str(last)
    assert page.locator('.u[tabindex="0"]').count() == 1


@check
def a_pinned_token_stays_until_it_is_closed(page: Page, phone: bool) -> None:
    point_at(page, _TOKEN, phone, pin=True)
    before = page.locator("#details").inner_text()
    if not phone:
        page.locator('.u[data-u="9"]').hover()
    assert page.locator("#details").inner_text() == before
    page.get_by_role("button", name="Close").click()
    assert page.locator("#details").is_hidden()


def point_at(page: Page, selector: str, phone: bool, pin: bool = False) -> None:
    """Points at a token: with a finger, or with a mouse, which can also click."""
    token = page.locator(selector)
    token.scroll_into_view_if_needed()
    if phone:
        token.tap()
    elif pin:
        token.click()
    else:
        token.hover()


def check_served(browser: Browser) -> None:
    """The box sends what was typed, shows errors, asks for a key, and adds the answer."""
    answers = [
        (401, {"error": {"message": "a key is missing: expected one"}}),
        (500, {}),
        (200, {"html": trace_body(make_value(heading="An answer"))}),
    ]
    asked: list[tuple[dict[str, Any], str | None]] = []

    def answer(route: Route) -> None:
        if route.request.method == "GET":
            route.fulfill(body=trace_page(endpoint="/trace"), content_type="text/html")
            return
        asked.append(
            (json.loads(route.request.post_data or ""), route.request.headers.get("authorization"))
        )
        status, body = answers[len(asked) - 1]
        route.fulfill(status=status, json=body)

    context = browser.new_context()
    context.route(f"{ORIGIN}/**", answer)
    page = context.new_page()
    page.goto(ORIGIN)
    page.get_by_label("Prompt").fill(HOSTILE.replace("\x00", ""))
    page.get_by_label("Tokens").fill("33")
    send = page.get_by_role("button", name="Continue the text")
    status = page.locator(".status")
    assert page.locator(".key").is_hidden()
    for expected in ("No answer: a key is missing: expected one", "No answer: status 500"):
        send.click()
        status.get_by_text(expected, exact=True).wait_for()
        page.get_by_label("Key").fill("secret")
    send.click()
    page.locator("#answers .trace h2").get_by_text("An answer").wait_for()
    assert status.inner_text() == ""
    wanted = {
        "prompt": asked[0][0]["prompt"],
        "max_tokens": 33,
        "temperature": 0.8,
        "retrieval": True,
    }
    assert [body for body, _ in asked] == [wanted] * 3
    assert [key for _, key in asked] == [None, "Bearer secret", "Bearer secret"]
    page.locator(_TOKEN).hover()
    assert "held responsible" in page.locator("#details").inner_text()
    context.close()


def check_a_server(browser: Browser, pictures: pathlib.Path | None) -> None:
    """The page that a server shows at /: hostile text is typed, and traced, at both widths."""
    server = Server(make_generator(), Limits(rows=4, length=400), api_key="secret", warm_up=False)
    typed = HOSTILE.replace("\x00", "")
    with listening(server) as url:
        for name, (width, height) in SIZES.items():
            phone, problems = name == "phone", list[str]()
            size = {"width": width, "height": height}
            context = browser.new_context(viewport=size, has_touch=phone, is_mobile=phone)  # type: ignore[arg-type]
            page = context.new_page()
            page.on("pageerror", lambda error, to=problems: to.append(f"error: {error}"))
            page.on("dialog", lambda dialog, to=problems: to.append(f"dialog: {dialog.message}"))
            page.goto(url)
            nothing_is_wider_than_the_screen(page, phone)
            page.get_by_label("Prompt").press_sequentially(typed)
            page.get_by_label("Tokens").fill("500")
            send, status = page.get_by_role("button", name="Continue the text"), ".status"
            send.click()
            page.locator(status).get_by_text("expected 'Authorization: Bearer KEY'").wait_for()
            page.get_by_label("Key").fill("secret")
            send.click()
            page.locator(status).get_by_text("expected a shorter prompt or fewer tokens").wait_for()
            page.get_by_label("Tokens").fill("24")
            send.click()
            heading = page.locator("#answers .trace h2")
            heading.wait_for(timeout=60_000)
            assert heading.inner_text().startswith(visible(typed)[:20])
            point_at(page, '.trace .u[data-u="60"]', phone)
            details = page.locator("#details").inner_text()
            assert "token 6" in details and "nats" in details, details
            assert visible(f"d {HOSTILE}") in page.locator(".neighbour b").first.inner_text()
            assert page.locator("#answers img, #answers iframe").count() == 0
            nothing_is_wider_than_the_screen(page, phone)
            if pictures is not None:
                page.screenshot(path=pictures / f"served-{name}.png")
            assert not problems, problems
            context.close()


def check_without_script(browser: Browser, path: pathlib.Path) -> None:
    """Text, colours, neighbours and figures are there without the script."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator('.u[data-u="1"]').inner_text() == visible(HOSTILE)
    assert "nats, without retrieval" in (page.locator(_TOKEN).get_attribute("title") or "")
    context.close()


def opened(context: BrowserContext, path: pathlib.Path, problems: list[str]) -> Page:
    """A page of a file; what it logs, throws, asks or requests is a problem."""
    page = context.new_page()
    page.set_default_timeout(5_000)
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: _refuse(request.url, path, problems))
    page.goto(path.as_uri())
    return page


def _refuse(url: str, path: pathlib.Path, problems: list[str]) -> None:
    """A request for anything but the page itself is a problem."""
    if url not in (path.as_uri(), "data:,"):
        problems.append(f"request: {url}")


def run(
    browser: Browser, path: pathlib.Path, pictures: pathlib.Path | None, own: bool
) -> list[str]:
    """Every check at every size; gives the failures. A page that is not our own is only looked at."""
    failures = []
    for name, (width, height) in SIZES.items():
        for scheme in SCHEMES:
            phone = name == "phone"
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme=scheme,  # type: ignore[arg-type]
                has_touch=phone,
                is_mobile=phone,
            )
            for function in _CHECKS if own else _CHECKS[:1]:
                problems: list[str] = []
                page = opened(context, path, problems)
                try:
                    function(page, phone)
                except Exception as error:
                    problems.append(str(error))
                failures += [f"{name}, {scheme}: {function.__name__}: {one}" for one in problems]
                page.close()
            if pictures is not None:
                picture(opened(context, path, []), pictures / f"{name}-{scheme}.png", phone)
            context.close()
    return failures


def picture(page: Page, path: pathlib.Path, phone: bool) -> None:
    """A picture of the token that changed most among those with neighbours, and its chunk."""
    chosen = page.locator(".chunk:not(.alone) .u.r8, .chunk:not(.alone) .u.f8").first
    chosen.evaluate("token => token.closest('.chunk').scrollIntoView()")
    if phone:
        chosen.tap()
    else:
        chosen.hover()
    page.screenshot(path=path)


def main() -> None:
    """Runs everything and prints the failures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--pictures", type=pathlib.Path)
    parser.add_argument("--page", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        path = arguments.page
        if path is None:
            path = pathlib.Path(folder) / "page.html"
            path.write_text(make_page(), encoding="utf-8")
            check_served(browser)
            check_a_server(browser, arguments.pictures)
            check_without_script(browser, path)
        failures = run(browser, path.absolute(), arguments.pictures, own=arguments.page is None)
        browser.close()
    print("\n".join([*failures, f"{len(failures)} failures"]))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
