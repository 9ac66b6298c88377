"""Servers that tests share, and factories of those that a test may break.

Real llama-servers live as long as the session and start when a test first asks for them. Who wants to kill or choke one
takes `start_llama`. Proxies and scripted upstreams live as long as their test.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from playwright.sync_api import Browser, sync_playwright

from databases import DATABASES, Database, Missing, own
from llama import LlamaServer, Model, start_server
from proxy import Proxy
from upstream import Upstream

type StartLlama = Callable[..., LlamaServer]

LLAMAS: dict[str, tuple[Model, tuple[str, ...]]] = {
    "tiny": (Model(), ()),
    "think": (Model(think_len=12), ("--think",)),
    "tools": (Model(mean_len=4, tool_len=6), ()),
    "embeddings": (Model(), ("--embeddings",)),
    "rerank": (Model(rerank=True), ("--rerank",)),
    "endless": (Model(mean_len=0), ()),  # an answer ends at max_tokens, or at the context's end
}


class StartProxy(Protocol):
    """Takes what Proxy takes, but for its folder.

    `allow_errors`: tracebacks in its log are what the test is about. `start`: no, the test does it by itself.
    """

    def __call__(
        self, servers: list[dict[str, Any]], *, allow_errors: bool = False, start: bool = True, **more: Any
    ) -> Proxy: ...


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def llama(model_cache: Path) -> Iterator[Callable[[str], LlamaServer]]:
    """The session's llama-server of this name (LLAMAS), which is also its model's name."""
    running: dict[str, LlamaServer] = {}

    def get(name: str) -> LlamaServer:
        if name not in running:
            model, flags = LLAMAS[name]
            running[name] = start_server(model_cache, model, "--alias", name, *flags)
        return running[name]

    yield get
    for server in running.values():
        server.stop()


@pytest.fixture(scope="session")
def tiny(llama: Callable[[str], LlamaServer]) -> LlamaServer:
    return llama("tiny")


@pytest.fixture(scope="session")
def think(llama: Callable[[str], LlamaServer]) -> LlamaServer:
    return llama("think")


@pytest.fixture(scope="session")
def tools(llama: Callable[[str], LlamaServer]) -> LlamaServer:
    return llama("tools")


@pytest.fixture(scope="session")
def embeddings(llama: Callable[[str], LlamaServer]) -> LlamaServer:
    return llama("embeddings")


@pytest.fixture(scope="session")
def rerank(llama: Callable[[str], LlamaServer]) -> LlamaServer:
    return llama("rerank")


@pytest.fixture(scope="session")
def endless(llama: Callable[[str], LlamaServer]) -> LlamaServer:
    return llama("endless")


@pytest.fixture
def start_llama(model_cache: Path) -> Iterator[StartLlama]:
    """`start_server` without its cache: a llama-server of the test's own, which the test may kill."""
    started: list[LlamaServer] = []

    def start(model: Model | None = None, *flags: str, port: int = 0) -> LlamaServer:
        started.append(start_server(model_cache, model, *flags, port=port))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def start_upstream() -> Iterator[Callable[[], Upstream]]:
    started: list[Upstream] = []

    def start() -> Upstream:
        started.append(Upstream().__enter__())
        return started[-1]

    yield start
    for upstream in started:
        upstream.__exit__()


@pytest.fixture
def upstream(start_upstream: Callable[[], Upstream]) -> Upstream:
    return start_upstream()


@pytest.fixture(scope="session")
def database() -> Iterator[Callable[[str], Database]]:
    """The session's real database of this name (DATABASES), up and well, whatever a test has done to it before."""
    running: dict[str, Database] = {}
    folders: list[Path] = []

    def get(name: str) -> Database:
        if name not in running:
            folders.append(Path(tempfile.mkdtemp(prefix="llmproxy-test-")))  # the servers' account may come in here
            folders[-1].chmod(0o755)
            own(folders[-1])
            try:
                running[name] = DATABASES[name](folders[-1])
            except Missing as error:
                if os.environ.get("CI"):
                    pytest.fail(str(error))
                pytest.skip(str(error))
        server = running[name]
        server.thaw()
        if server.process is None:
            server.start()
        return server

    yield get
    for server in running.values():
        server.stop()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def confdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mitmproxy")


@pytest.fixture
def start_proxy(tmp_path: Path, confdir: Path) -> Iterator[StartProxy]:
    """Starts proxies. A traceback in a proxy's log fails its test; the log's end is shown with every failure."""
    strict: dict[Proxy, bool] = {}

    def make(servers: list[dict[str, Any]], *, allow_errors: bool = False, start: bool = True, **more: Any) -> Proxy:
        proxy = Proxy(tmp_path / f"proxy-{len(strict)}", servers, confdir=confdir, **more)
        strict[proxy] = not allow_errors
        if start:
            proxy.start()
        return proxy

    yield make
    for proxy in strict:
        if proxy.running:
            proxy.kill()
        print(f"--- log of {proxy.folder.name}\n{proxy.log()[-6000:]}")
    lost = [proxy.folder.name for proxy in strict if strict[proxy] and "Traceback (most recent" in proxy.log()]
    assert not lost, f"errors in the logs of {lost}"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A real browser. For a module, not the session: Playwright keeps an event loop running in this thread."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        message = "no Chromium: install it (apt install chromium) to test the dashboard's pages"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    quiet = ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
    with sync_playwright() as playwright:
        # Without a sandbox it also runs as root, as in many containers; it only ever opens our own pages.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", *quiet])
        yield browser
        browser.close()
