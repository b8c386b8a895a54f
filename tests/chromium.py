"""A headless Chromium that a test drives, by its DevTools protocol over two pipes."""

import base64
import contextlib
import functools
import json
import os
import select
import shutil
import subprocess
import time

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


@functools.cache
def browser():
    """The path of a browser; without one the test is skipped."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("no chromium or google-chrome on the PATH")
    return found


class Page:
    """A page in a browser of its own.

    Attributes:
        events: what the browser said beside replies, by method and parameters.

    Args:
        profile: a new folder for the browser's files.
        width, height: of its window.
        dark: whether the user prefers dark pages.
    """

    def __init__(self, profile, width=1280, height=1000, dark=False):
        # The browser reads commands from its file 3 and writes to its file 4.
        command = [
            *("bash", "-c", 'exec "$0" "$@" 3<&0 4>&1 0</dev/null 1>/dev/null'),
            *(browser(), *FLAGS, f"--user-data-dir={profile}", "about:blank"),
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, bufsize=0, **pipes)
        self._number, self._rest, self.events, self._session = 0, b"", [], None
        [target] = [t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        options = {"targetId": target["targetId"], "flatten": True}
        self._session = self("Target.attachToTarget", **options)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")
        self.resize(width, height, dark)

    def __call__(self, method, timeout_s=300, **parameters):
        """The result of a command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout_s
        while True:
            found = self._read(end)
            if found.get("id") == self._number:
                assert "error" not in found, found["error"]
                return found["result"]
            self.events.append((found["method"], found["params"]))

    def _read(self, end):
        while b"\0" not in self._rest:
            left = end - time.monotonic()
            ready = left > 0 and select.select([self._process.stdout], [], [], left)[0]
            assert ready, "the browser does not answer"
            part = os.read(self._process.stdout.fileno(), 2**16)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def resize(self, width, height, dark=False):
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url):
        self("Page.navigate", url="about:blank")  # another fragment alone would load nothing
        self("Page.navigate", url=url)
        self.until("location.href != 'about:blank' && document.readyState == 'complete'")

    def run(self, script):
        """The value of an expression of JavaScript, awaited if it is a promise."""
        found = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, condition, timeout_s=300):
        """Wait until an expression of JavaScript is true; its value."""
        end = time.monotonic() + timeout_s
        while not (value := self.run(condition)):
            assert time.monotonic() < end, f"{condition}: {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def choose_file(self, selector, path):
        """Put a file into an `<input type=file>`."""
        root = self("DOM.getDocument")["root"]["nodeId"]
        node = self("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def screenshot(self, path):
        """Write a PNG of the whole page."""
        picture = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))

    @property
    def problems(self):
        """What the page has complained about: exceptions, errors on its console, refused loads."""
        self.run("0")
        found = []
        for method, what in self.events:
            if method == "Runtime.exceptionThrown":
                found.append(what["exceptionDetails"]["text"])
            if method == "Log.entryAdded" and what["entry"]["level"] == "error":
                found.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")
            if method == "Runtime.consoleAPICalled" and what["type"] in ("error", "assert"):
                found.append(str(what["args"]))
        return found

    @property
    def requests(self):
        """URLs that the page asked for."""
        asked = (what for method, what in self.events if method == "Network.requestWillBeSent")
        return [what["request"]["url"] for what in asked]

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self("Browser.close", timeout_s=5)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
