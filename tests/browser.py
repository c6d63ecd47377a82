"""A headless Chromium that a test drives through its debugging pipe: JSON messages that end in a NUL byte, written to
its file descriptor 3 and read from 4. Needs no library.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LIMIT = 60  # seconds for an answer


def executable():
    """The browser's path, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def running():
    """A `Browser`, which is ended afterwards."""
    assert executable(), f"no browser found ({', '.join(NAMES)})"
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        flags += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
        command = [executable(), *flags, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]

        def arrange():
            """File descriptors 3 and 4; high copies first, as the pipes may have these numbers themselves."""
            ends = [os.dup2(end, 100 + place) for place, end in enumerate((to_browser[0], from_browser[1]))]
            for place, end in enumerate(ends):
                os.dup2(end, 3 + place, inheritable=True)

        process = subprocess.Popen(
            command, preexec_fn=arrange, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Browser(to_browser[1], from_browser[0])
        finally:
            process.kill()
            process.wait()
            os.close(to_browser[1])
            os.close(from_browser[0])


class Browser:
    """A browser with one page. `events` are the messages that were no answers."""

    def __init__(self, send, receive):
        self._send, self._receive, self._held, self._count = send, receive, b"", 0
        self.events, self._session = [], None
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for part in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{part}.enable")

    def call(self, method, **params):
        """The result of a method of the DevTools protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        deadline = time.monotonic() + LIMIT
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._receive], [], [], max(0, deadline - time.monotonic()))
            got = os.read(self._receive, 1 << 20) if ready else b""
            assert got, "the browser ended, or does not answer"
            self._held += got
        text, _, self._held = self._held.partition(b"\0")
        return json.loads(text)

    def open(self, path, width=1280, height=900, dark=False):
        """Load a file into a window of this size in CSS pixels; `events` are those of the loading."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events = []
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression):
        """The value of a JavaScript expression on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, path, whole=True):
        """Save what the page looks like as a PNG file."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
