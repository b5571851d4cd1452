"""What stands before every request: no other site's page may use this one, the page reaches no other host, uploads are few."""

import ipaddress
import json
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

# Gradio's own code makes functions of templates (unsafe-eval) and writes styles and start-up scripts into the page (unsafe-inline).
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:;"
    " font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
FETCHING = ("/gradio_api/file=http", "/file=http", "/gradio_api/proxy=", "/proxy=")  # would have the server fetch from elsewhere


UPLOADS = ("/gradio_api/upload", "/upload")
LARGEST_UPLOAD = 20 * 2**20  # bytes of one request with files
MOST_UPLOADS = 20  # files that are kept, of all visitors together; the oldest make room
MOST_BYTES = 100 * 2**20  # of them together


class Guard:
    """ASGI middleware.

    hosts:    names that the page may be called by, without ports; None: any address of numbers, and what is in `names`
    names:    names of this machine
    uploads:  the folder of uploaded files
    A page elsewhere whose name is made to lead here (DNS rebinding) gets nothing, nor does one that has a browser send
    requests from elsewhere. Programs send neither Origin nor Sec-Fetch-Site.
    """

    def __init__(self, app: Any, hosts: Sequence[str] | None, uploads: Path, names: Sequence[str] = ()) -> None:
        self.app, self.hosts, self.names, self.uploads = app, hosts, names, uploads.resolve()
        self._kept: deque[tuple[Path, int]] = deque()

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """Refuse, or pass on and add the headers."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal:
            await _answer(scope, send, refusal)
            return
        uploading = scope["type"] == "http" and unquote(scope["path"]).rstrip("/").endswith(UPLOADS)
        body = bytearray()

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in HEADERS.items())]
            if uploading and message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
            await send(message)

        await self.app(scope, receive, guarded)
        if uploading:
            self._keep(bytes(body))

    def _refusal(self, scope: Message) -> str:
        """Why a request is not passed on, as a sentence; "" if it is."""
        headers = scope["headers"]
        found = [value.decode("latin-1") for name, value in headers if name == b"host"]
        host = found[0] if len(found) == 1 else ""
        if not self._known(_name(host)):
            return f"This page answers to {', '.join(self.hosts or self.names)} only; start it with --host to open it to others."
        given = {name: value.decode("latin-1") for name, value in headers if name in (b"origin", b"sec-fetch-site", b"sec-fetch-mode")}
        opened = scope.get("method") == "GET" and scope["path"] == "/" and given.get(b"sec-fetch-mode") == "navigate"  # a link to the page
        if given.get(b"sec-fetch-site", "none") not in ("same-origin", "none") and not opened:
            return "This page answers to itself only, not to pages of other sites."
        if b"origin" in given and urlsplit(given[b"origin"]).netloc.lower() != host.lower():
            return "This page answers to itself only, not to pages of other sites."
        if unquote(scope["path"]).lower().startswith(FETCHING):
            return "This page fetches nothing from elsewhere."
        return self._too_large(scope)

    def _known(self, name: str) -> bool:
        if self.hosts is not None:
            return name in self.hosts
        return name in self.names or _is_address(name)

    def _too_large(self, scope: Message) -> str:
        """An upload says its length before it comes."""
        if scope.get("method") != "POST" or not unquote(scope["path"]).rstrip("/").endswith(UPLOADS):
            return ""
        length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if not (length.isascii() and length.isdigit() and len(length) < 20 and int(length) <= LARGEST_UPLOAD):
            return f"An upload may have {LARGEST_UPLOAD // 2**20} MB, all its files together, and must say its length."
        return ""

    def _keep(self, answer: bytes) -> None:
        """Note what was uploaded, and delete the oldest where there is too much."""
        try:
            paths = [Path(place).resolve() for place in json.loads(answer)]
        except (ValueError, TypeError):
            return  # refused
        self._kept.extend((path, path.stat().st_size) for path in paths if path.is_file() and self.uploads in path.parents)
        while len(self._kept) > MOST_UPLOADS or sum(size for _, size in self._kept) > MOST_BYTES:
            self._kept.popleft()[0].unlink(missing_ok=True)


def _is_address(name: str) -> bool:
    """Whether a host is written in numbers, which no other site's name can be made to lead to."""
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _name(host: str) -> str:
    """Without the port: [::1]:7860 -> ::1."""
    return (host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]).lower()


async def _answer(scope: Message, send: Send, sentence: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain; charset=utf-8")]})
    await send({"type": "http.response.body", "body": sentence.encode()})
