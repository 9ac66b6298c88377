"""Visits to the pages in a real browser, with everything noted that must not happen in them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Dialog, Page

from proxy import Proxy

DESKTOP = (1280, 900)
PHONE = (390, 844)
# Its own report of an answer that is an error: in tests of such answers.
FAILED = re.compile(r"Failed to load resource")

# Text whose contrast with what is behind it is below 4.5 (WCAG 2.2, AA), or 3 where it is large.
PALE = """() => {
  const numbers = (colour) => colour.match(/[0-9.]+/g).map(Number);
  const light = (colour) => {
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = numbers(colour).map((each) => linear(each / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if ((numbers(colour)[3] ?? 1) === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const pale = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const isSeen = node.checkVisibility({visibilityProperty: true}) && !node.closest("svg, :disabled");
    if (!walker.currentNode.data.trim() || !isSeen) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(style.color), light(behind(node))].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    if ((a + 0.05) / (b + 0.05) < needed) pale.push(walker.currentNode.data.trim());
  }
  return pale;
}"""

# The element that has the focus, in words, and whether that is to be seen. Radio buttons show it on their label.
FOCUSED = """() => {
  const node = document.activeElement;
  const shown = node.type === "radio" ? node.nextElementSibling : node;
  const style = getComputedStyle(shown);
  const label = node.getAttribute("aria-label") ?? node.labels?.[0]?.textContent;
  const name = (label ?? node.textContent).trim().slice(0, 80);
  return {name, tag: node.localName, seen: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2};
}"""

STORED = """async () => [...Object.entries(localStorage), ...Object.entries(sessionStorage),
  ...(await indexedDB.databases()), ...(await caches.keys()), document.cookie, name].filter((each) => each.length)"""


class Visitor:
    """A browser's window. `asked`: every address that a page asked for; `trouble`: what went wrong in it."""

    def __init__(self, browser: Browser, url: str, size: tuple[int, int], **more: Any) -> None:
        self.url = url
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **more)
        self.asked: list[str] = []
        self.trouble: list[str] = []
        self.said: list[str] = []
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.context.on("weberror", lambda error: self.trouble.append(str(error.error)))
        self.context.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.context.on("dialog", self._dialog)
        self.page = self.context.new_page()

    def enter(self, path: str, key: str) -> Page:
        """Sign in as people do: the field has the focus, type the key, press Enter."""
        self.page.goto(self.url + path)
        self.page.wait_for_function("document.activeElement.id === 'key'")
        self.page.keyboard.type(key)
        self.page.keyboard.press("Enter")
        return self.page

    def _dialog(self, dialog: Dialog) -> None:
        self.trouble.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    def focused(self) -> str:
        """What has the focus, which must be seen."""
        found = self.page.evaluate(FOCUSED)
        assert found["seen"], f"nobody sees that {found} has the focus"
        name: str = found["name"]
        return name

    def tab_to(self, name: str, most: int = 40) -> None:
        """Press Tab until the focus is there."""
        passed = []
        for _ in range(most):
            self.page.keyboard.press("Tab")
            passed.append(self.focused())
            if passed[-1] == name:
                return
        raise AssertionError(f"Tab does not lead to {name!r}: {passed}")

    def is_tidy(self) -> None:
        """Nothing is wider than the window, and no text is too pale to be read."""
        width, room = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width <= room, f"the page is {width} px wide in a window of {room} px"
        assert self.page.evaluate(PALE) == []


@contextmanager
def visit(
    browser: Browser, proxy: Proxy, *secrets: str, size: tuple[int, int] = DESKTOP, may_fail: bool = False, **more: Any
) -> Iterator[Visitor]:
    """A visit that fails the test when a request leaves the proxy, when one of the secrets is where it must not be, or
    when the page has an error. `may_fail`: answers may be errors.
    """
    visitor = Visitor(browser, proxy.url, size, **more)
    try:
        yield visitor
        page = visitor.page
        if not page.is_closed() and page.url.startswith(proxy.url):
            assert page.evaluate(STORED) == []
            assert page.evaluate("[...document.images].length") == 0
        assert visitor.context.cookies() == []
        strange = [url for url in visitor.asked if not url.startswith((f"{proxy.url}/", "data:"))]
        assert strange == []
        said = [text for text in visitor.said if not (may_fail and FAILED.search(text))]
        assert (said, visitor.trouble) == ([], [])
        for secret in secrets:
            assert [url for url in visitor.asked if secret in url] == []
            assert secret not in proxy.log()
            assert [
                path for path in proxy.folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()
            ] == [path for path in (proxy.config_path,) if secret in path.read_text()]
    finally:
        visitor.context.close()
