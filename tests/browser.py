"""Debian's Chromium through its driver, with the W3C WebDriver protocol and nothing else. Installs nothing."""

from __future__ import annotations

import base64
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from slos_serve.launch.endpoint import free_port

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
KEYS = {"Tab": "\ue004", "Space": " ", "Enter": "\ue007"}
START_S = 30.0


class Browser:
    """One window. Entered when it is open.

    Args:
        folder: an empty folder for its profile.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=60.0)

    def __enter__(self) -> Self:
        assert DRIVER is not None
        command = [DRIVER, f"--port={self._port}"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._session = self._open()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self._client.delete(self._session)
        self._client.close()
        self._process.terminate()
        self._process.wait(timeout=START_S)

    def _open(self) -> str:
        until_s = time.monotonic() + START_S
        while True:
            try:
                self._client.get("/status")
                break
            except httpx.TransportError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.1)
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={self._folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self._client.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
        return f"/session/{answer['sessionId']}"

    def _post(self, path: str, **fields: Any) -> Any:
        answer = self._client.post(f"{self._session}/{path}", json=fields)
        assert answer.is_success, answer.text
        return answer.json()["value"]

    def open(self, url: str) -> None:
        """Go to a page."""
        self._post("url", url=url)

    def run(self, script: str, *given: Any) -> Any:
        """The value that a script returns."""
        return self._post("execute/sync", script=script, args=list(given))

    def devtools(self, command: str, **fields: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self._post("goog/cdp/execute", cmd=command, params=fields)

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        keys = [{"type": "keyDown", "value": KEYS[key]}, {"type": "keyUp", "value": KEYS[key]}]
        self._post("actions", actions=[{"type": "key", "id": "keyboard", "actions": keys}])

    def resize(self, width: int, height: int) -> None:
        """The size of what is seen, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, **features: str) -> None:
        """What the user prefers, such as ``prefers_color_scheme="dark"``."""
        told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.devtools("Emulation.setEmulatedMedia", features=told)

    def picture(self, path: Path) -> None:
        """Write what is seen."""
        path.write_bytes(base64.b64decode(self._client.get(f"{self._session}/screenshot").json()["value"]))

    def log(self) -> list[str]:
        """What the page has written to the console since the last call."""
        return [entry["message"] for entry in self._post("se/log", type="browser")]
