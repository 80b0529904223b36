"""Headless Chromium as a renderer: pages out of memory, boxes from the DOM, screenshots; no network, no files, sandboxed.

It is driven over a pipe with the DevTools protocol (Page, Runtime, Emulation and Fetch domains; JSON ended by a NUL byte, method
names as published with the protocol), so that no port is opened and no package is needed. Every request of a page is answered
here: from the files of the page's own folder, or not at all.
"""

import base64
import json
import mimetypes
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from andesvl_jax.errors import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOST = "http://page.invalid"  # a name that no server can have (RFC 2606)
# a second wall behind the answers below: no other place, no web sockets
POLICY = f"default-src {HOST} 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src {HOST}; frame-src 'none'"
FLAGS = (
    "--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--mute-audio",
    "--disable-extensions", "--disable-background-networking", "--disable-sync", "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:1", "--proxy-bypass-list=<-loopback>",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp", "--force-color-profile=srgb", "--lang=en-US",
)  # fmt: skip
MAX_MESSAGE_BYTES = 64 << 20
ANSWER_SECONDS = 120  # for one command, also on a busy machine
NOBODY = 65534  # Chromium's sandbox refuses to serve root


class Browser:
    """One running Chromium with one tab; a context manager.

    Raises:
      UserError: Chromium is not installed, does not start (its sandbox needs user namespaces), or stops answering.
    """

    def __init__(self) -> None:
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            raise UserError(
                f"{NAMES[0]}: is not installed, expected it (or {NAMES[2]}) to render pages; Debian has it as a package."
            )
        self._folder = tempfile.TemporaryDirectory(prefix="andesvl-chromium-", ignore_cleanup_errors=True)
        as_root = os.geteuid() == 0
        if as_root:
            os.chown(self._folder.name, NOBODY, NOBODY)
        # the protocol's ends are descriptors 3 and 4; the shell moves them there
        command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null', "sh", program, *FLAGS]
        who = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if as_root else {}
        environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": self._folder.name, "LANG": "C.UTF-8"}
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={self._folder.name}/profile", "about:blank"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            cwd=self._folder.name, **who,
        )  # fmt: skip
        self._count, self._session, self._unread = 0, None, b""
        self._files: Mapping[str, bytes] = {}
        self._loaded = False

    def __enter__(self) -> "Browser":
        try:
            target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
            self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
            self.call("Page.enable")
            self.call("Fetch.enable", patterns=[{"urlPattern": "*"}])
            self.call("Browser.setDownloadBehavior", behavior="deny")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except OSError:  # what was not yet written to a process that has gone
                pass
        self._folder.cleanup()

    def open(self, files: Mapping[str, bytes], page: str, settle: float) -> None:
        """Shows a page, waits until it has loaded, then `settle` seconds for its scripts.

        Args:
          files: the package, by names relative to its folder. page: one of them.
        """
        self._files, self._loaded = files, False
        self.call("Page.navigate", url=f"{HOST}/{page}")
        end = time.monotonic() + ANSWER_SECONDS
        while not self._loaded:
            self._receive(end)
        self.wait(settle)

    def resize(self, size: tuple[int, int], density: int, phone: bool) -> None:
        """Makes the window `size` CSS pixels of density^2 pixels each; a phone minds the page's own word on its width."""
        width, height = size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=density, mobile=phone)

    def wait(self, seconds: float) -> None:
        """Lets the page work."""
        self.evaluate(f"new Promise(done => setTimeout(done, {round(1000 * seconds)}))")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page, as JSON can carry it; promises are waited for."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise UserError(f"chromium: a script failed ({done['exceptionDetails'].get('text', 'no reason')}) in a page.")
        return done["result"].get("value")

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", optimizeForSpeed=True)["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        number, end = self._send(method, parameters), time.monotonic() + ANSWER_SECONDS
        while True:
            message = self._receive(end)
            if message.get("id") == number:
                if "error" in message:
                    raise UserError(f"chromium: refused {method} ({message['error'].get('message')}).")
                return message["result"]

    def _send(self, method: str, parameters: dict[str, Any]) -> int:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\0")
            self._process.stdin.flush()
        except OSError as error:
            raise self._gone() from error
        return self._count

    def _receive(self, end: float) -> dict[str, Any]:
        """The next message; requests of the page are answered on the way."""
        pipe = self._process.stdout.fileno()
        while b"\0" not in self._unread:
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            block = os.read(pipe, 1 << 20) if ready else b""
            if not block or len(self._unread) > MAX_MESSAGE_BYTES:
                raise self._gone()
            self._unread += block
        line, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(line)
        if message.get("method") == "Fetch.requestPaused":
            self._answer(message["params"])
        elif message.get("method") == "Page.javascriptDialogOpening":  # an alert would keep the page waiting
            self._send("Page.handleJavaScriptDialog", {"accept": False})
        elif message.get("method") == "Page.loadEventFired":
            self._loaded = True
        return message

    def _answer(self, request: dict[str, Any]) -> None:
        """Gives the page a file of its own folder and refuses everything else. Answers of Chromium to these need no wait."""
        url, number = request["request"]["url"], request["requestId"]
        name = unquote(urlsplit(url).path).lstrip("/")
        if not url.startswith(f"{HOST}/") or name not in self._files:
            self._send("Fetch.failRequest", {"requestId": number, "errorReason": "AccessDenied"})
            return
        kind = mimetypes.guess_type(PurePosixPath(name).name)[0] or "application/octet-stream"
        headers = [{"name": "Content-Type", "value": kind}, {"name": "Content-Security-Policy", "value": POLICY}]
        body = base64.b64encode(self._files[name]).decode()
        answer = {"requestId": number, "responseCode": 200, "responseHeaders": headers, "body": body}
        self._send("Fetch.fulfillRequest", answer)

    def _gone(self) -> UserError:
        return UserError(
            f"chromium: stopped answering (exit status {self._process.poll()}), expected it to run headless in its sandbox, "
            "which needs user namespaces."
        )
