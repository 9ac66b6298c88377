"""The README's pictures: the real dashboard over invented requests, in Chromium, with the time that each page took; and
the pages of a running gateway.

`serve` and `open_page` are what the dashboard's tests use too.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, FloatRect, Page, sync_playwright

from generate_rows import generate
from stack import DATASETTE_ARGS
from stage import stage

ROOT = Path(__file__).resolve().parent.parent
START_S = 30.0
DRAW_MS = 30_000
WIDTH, HEIGHT = 1280, 900
GAP = 8  # between cards
SIZES = {"": (WIDTH, HEIGHT), "-phone": (390, 844)}

# Picture -> the page, taken from top to bottom, or down to the end of a card.
PAGES = {
    "dashboard": "/-/dashboards/usage?period=30+days",
    "servers": "/-/dashboards/servers",
    "last-48-hours": "/-/dashboards/now",
    "requests": "/usage/requests?_size=10",
    "one-user": "/usage/requests?key_name=alice&_facet=served_model&_facet=server&_size=10",
    "bill": "/usage/bill",
    "costs": "/-/dashboards/costs?period=30+days",
}

DOWN_TO = {"servers": "#card-routes"}

# Every card of a dashboard holds its chart, number or text; at once true on any other page.
DRAWN = """() => [...document.querySelectorAll(".dashboard-card-chart, .chart-container")]
    .every(card => card.querySelector("svg, canvas, p"))"""


@contextmanager
def serve(usage_db: Path) -> Iterator[str]:
    """A Datasette over this file with the settings that the product has; gives its URL."""
    argv = [sys.executable, "-m", "datasette", "serve", str(usage_db), "-m", str(ROOT / "datasette-metadata.json")]
    with tempfile.NamedTemporaryFile("w") as log:
        process = subprocess.Popen([*argv, *DATASETTE_ARGS, "-h", "127.0.0.1", "-p", "0"], stdout=log, stderr=log)
        try:
            yield address(process, Path(log.name))
        finally:
            process.terminate()
            process.wait()


def address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_S
    while True:
        text = log.read_text()
        if found := re.search(r"running on (http://\S+)", text):
            return found[1]
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Datasette did not start:\n{text}")
        time.sleep(0.02)


def open_page(browser: Browser | BrowserContext, url: str) -> Page:
    """The page with all of its charts drawn."""
    page = browser.new_page()
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
    page.goto(url)
    page.wait_for_function(DRAWN, timeout=DRAW_MS)
    return page


def take(browser: Browser, url: str, picture: Path, runs: int) -> list[float]:
    """Open the page so many times, each with an empty cache. Keeps the last picture; gives seconds until drawn."""
    last = DOWN_TO.get(picture.stem)
    seconds = []
    for _ in range(runs):
        began = time.monotonic()
        page = open_page(browser, url)
        seconds.append(time.monotonic() - began)
        page.screenshot(path=picture, full_page=True, clip=down_to(page, last) if last else None)
        page.close()
    return seconds


def take_pages(browser: Browser, folder: Path, rows: int, out: Path) -> None:
    """/usage and /admin/, signed in, on a desk and on a phone."""
    with stage(folder, rows) as on:
        for name, path, key, seen in (
            ("usage", "/usage", on.key, "#limit-list li"),
            ("admin", "/admin/", on.admin_key, "#running tbody tr"),
        ):
            for suffix, (width, height) in SIZES.items():
                page = browser.new_page(viewport={"width": width, "height": height})
                page.goto(on.url + path)
                page.fill("#key", key)
                page.press("#key", "Enter")
                page.wait_for_selector(seen)
                page.evaluate("document.activeElement.blur()")
                page.screenshot(path=out / f"{name}{suffix}.png", full_page=not suffix)
                if name == "admin":
                    page.click("[data-view=keys]")
                    page.screenshot(path=out / f"admin-keys{suffix}.png", full_page=not suffix)
                page.close()


def down_to(page: Page, card: str) -> FloatRect:
    box = page.locator(card).bounding_box()
    assert box, card
    return {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + GAP}


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the README's pictures.")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "pictures", help="folder for the pictures")
    parser.add_argument("--rows", type=int, default=200_000, help="how many requests to invent (200000)")
    parser.add_argument("--db", type=Path, help="a usage.db to show instead of invented requests")
    parser.add_argument("--runs", type=int, default=3, help="how often each page is opened (3)")
    given = parser.parse_args()
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path:
        raise SystemExit("no Chromium found: install it (apt install chromium)")
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        usage_db = given.db or Path(folder) / "usage.db"
        if not given.db:
            generate(usage_db, given.rows)
        quiet = ["--no-sandbox", "--disable-quic", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=path, args=quiet)
        with serve(usage_db) as url:
            for name, where in PAGES.items():
                seconds = take(browser, url + where, given.out / f"{name}.png", given.runs)
                print(f"{name:14} {' '.join(f'{s:.2f}' for s in seconds)} s")
        if not given.db:
            (Path(folder) / "stage").mkdir()
            take_pages(browser, Path(folder) / "stage", given.rows, given.out)
        browser.close()


if __name__ == "__main__":
    main()
