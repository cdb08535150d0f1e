"""The real frontend in headless Chromium: load a graph, convert it, queue it, take its picture.

Playwright's synchronous interface keeps an event loop running in its thread, which would break every test that runs one
of its own; so all of it happens in one worker thread.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
READY = "() => window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 200"
FIT = """() => { const b = app.graph._nodes; if (!b.length) return;
  const x0 = Math.min(...b.map(n => n.pos[0])), y0 = Math.min(...b.map(n => n.pos[1] - 40));
  const x1 = Math.max(...b.map(n => n.pos[0] + n.size[0])), y1 = Math.max(...b.map(n => n.pos[1] + n.size[1]));
  const c = app.canvas, w = c.canvas.clientWidth || 1600, h = c.canvas.clientHeight || 900;
  const s = Math.min(1.2, 0.92 * Math.min(w / (x1 - x0), h / (y1 - y0)));
  c.ds.scale = s; c.ds.offset[0] = w / 2 / s - (x0 + x1) / 2; c.ds.offset[1] = h / 2 / s - (y0 + y1) / 2;
  c.setDirty(true, true); }"""


class Editor:
    """One browser tab on one ComfyUI server."""

    def __init__(self, address: str, executable: str, profile: Path) -> None:
        self._worker = ThreadPoolExecutor(1)
        self._do(self._open, address, executable, profile)

    def _do(self, function, *arguments):
        return self._worker.submit(function, *arguments).result(timeout=1800)

    def _open(self, address: str, executable: str, profile: Path) -> None:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        self._context = self._playwright.chromium.launch_persistent_context(
            str(profile),
            executable_path=executable,
            headless=True,
            args=list(FLAGS),
            viewport={"width": 1600, "height": 900},
        )
        self._page = self._context.pages[0]
        self.console: list[str] = []
        self._page.on("console", lambda m: self.console.append(f"{m.type}: {m.text}"))
        self._page.on("pageerror", lambda e: self.console.append(f"pageerror: {e}"))
        self._page.set_default_timeout(900_000)
        self._goto(address)

    def _goto(self, address: str) -> None:
        self._page.goto(address)
        self._page.wait_for_function(READY)
        self._page.wait_for_timeout(2500)  # the frontend still loads settings and its own first graph

    def open(self, address: str) -> None:
        """Go to another address of the server, for example one that names a template."""
        self._do(self._goto, address)

    def evaluate(self, script: str, argument=None):
        """Run JavaScript in the page and return what it gives."""
        return self._do(self._page.evaluate, script, argument)

    def with_page(self, function):
        """Call ``function`` with Playwright's page, for real mouse and keyboard events, and return what it gives."""
        return self._do(lambda: function(self._page))

    def load(self, workflow: dict) -> None:
        """Open a graph in UI format, as dropping its file on the canvas does."""
        self._do(lambda: self._page.evaluate("async d => { await app.loadGraphData(d) }", workflow))
        self._do(lambda: self._page.wait_for_timeout(500))

    def load_api(self, prompt: dict, name: str = "graph") -> None:
        """Open a graph in API format; the frontend lays it out."""
        self._do(lambda: self._page.evaluate("async ([d, n]) => { await app.loadApiJson(d, n) }", [prompt, name]))

    def prompt(self) -> tuple[dict, dict]:
        """The open graph as (API format, UI format), made by the frontend's own conversion."""
        text = self.evaluate("async () => JSON.stringify(await app.graphToPrompt())")
        both = json.loads(text)
        return both["output"], both["workflow"]

    def queue(self) -> None:
        """Press Run."""
        self.evaluate("() => { app.queuePrompt(0) }")

    def screenshot(self, path: Path, fit: bool = True) -> Path:
        """A picture of the tab; with ``fit`` the whole graph is brought into view first."""
        if fit:
            self.evaluate(FIT)
            time.sleep(0.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._do(lambda: self._page.screenshot(path=str(path)))
        return path

    def text(self) -> str:
        """All text on the page outside the canvas: dialogs, toasts, help panels."""
        return self.evaluate("() => document.body.innerText")

    def close(self) -> None:
        """Close the browser."""

        def end() -> None:
            self._context.close()
            self._playwright.stop()

        self._do(end)
        self._worker.shutdown()
