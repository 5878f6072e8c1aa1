"""A real headless Chromium, spoken to in its own protocol over two pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import requires

NAMES = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
    "--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage",
)  # fmt: skip


class Browser:
    """One page. `told` has what its console said and what failed, `asked` each address that it asked for."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self.process, self._to, self._back = process, to, back
        self._buffer, self._number, self._session = b"", 0, ""
        self.told: list[str] = []
        self.asked: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        of = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": params, **of}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._back, 1 << 20)
            assert piece, "the browser is gone"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])
            case "Log.entryAdded":
                self.told.append(params["entry"]["text"])
            case "Runtime.consoleAPICalled":
                self.told.append(str(params["args"]))
            case "Runtime.exceptionThrown":
                self.told.append(str(params["exceptionDetails"]))
            case "Page.javascriptDialogOpening":
                self.told.append(f"dialog {params['message']}")
                self.call("Page.handleJavaScriptDialog", accept=True)

    def open(self, page: Path, width: int = 1200, *, dark: bool = False, scripts: bool = True) -> None:
        """Load a page, until all of it is there."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=page.resolve().as_uri())
        while (event := self._next()).get("method") != "Page.loadEventFired":
            self._note(event)

    def ask(self, expression: str) -> Any:
        """What JavaScript of ours, which a page need not allow, has for an answer."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def pdf(self, to: Path) -> None:
        printed = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        to.write_bytes(base64.b64decode(printed["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """profile: a folder of its own. Skips where there is no Chromium."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    requires(program, "no Chromium here to look at pages with", "apt-get install chromium-headless-shell")
    to_read, to = os.pipe()
    back, back_write = os.pipe()

    def pipes() -> None:  # it reads from 3 and writes to 4
        a, b = os.dup(to_read), os.dup(back_write)
        os.dup2(a, 3)
        os.dup2(b, 4)

    argv = [str(program), *OPTIONS, f"--user-data-dir={profile}"]
    log = (profile / "log").open("wb")
    process = subprocess.Popen(argv, stdout=log, stderr=log, preexec_fn=pipes, close_fds=False)
    os.close(to_read)
    os.close(back_write)
    try:
        yield Browser(process, to, back)
    finally:
        process.kill()
        process.wait()
        for fd in (to, back):
            os.close(fd)
        log.close()
