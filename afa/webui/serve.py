"""Serve the page at one address, from one folder, and refuse requests of other sites."""

import ipaddress
import json
import os
import socket
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from afa.demo.data import ENSEMBLE
from afa.demo.scenes import sample_scenes
from afa.errors import UserError
from afa.webui.markup import read_reports
from afa.webui.settings import FIRST_PORT, UiSettings

TRIED = 20  # ports after the first
TAKEN = (98, 48, 10048, 13)  # error numbers of a port in use on Linux, macOS, Windows; of one not allowed
CALLS = 100  # calls that may wait besides runs; Gradio refuses further ones
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SMALL = 128  # pixels: pictures up to this side are enlarged with hard edges
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Consolas", "Liberation Mono", "monospace"]
# For experts that draw icons.
HARD_EDGES = "#afa-gallery img, .afa-pictures img, .afa-maps img { image-rendering: pixelated; }"
PICKED = (500_059, 500_047, 500_030)  # scenes the examples are


@dataclass(frozen=True)
class Served:
    """A page that is being served.

    url:  its address
    page: the Gradio app
    """

    url: str
    page: Any


def serve(settings: UiSettings) -> None:
    """Serve until Ctrl-C."""
    with serving(settings) as served:
        print(f"The page is at {served.url} (Ctrl-C stops it). Pictures go to {settings.output}.", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)


@contextmanager
def serving(settings: UiSettings) -> Iterator[Served]:
    """Serve the page while the context is open.

    Raises UserError for an address, a report or an expert that cannot be used, before the page is served,
    and if this machine cannot reach it.
    """
    port = _port(settings)
    reports = read_reports(settings.reports or [])
    with tempfile.TemporaryDirectory(prefix="afa-ui-") as uploads:
        os.environ |= {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": uploads,
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        from afa.webui.engine import Engine
        from afa.webui.page import build
        from afa.webui.sessions import Sessions

        embedded = not settings.sources
        engine = Engine.open(settings, settings.sources or [str(ENSEMBLE)])
        steps = min(20 if embedded else 50, settings.max_steps)
        sessions, url = Sessions(engine), f"http://{_shown(settings.host)}:{port}"
        page = build(
            sessions,
            reports,
            _examples() if embedded else [],
            steps,
            3.0 if embedded else engine.guidance,
            url,
        )
        page.queue(max_size=settings.queue + CALLS, default_concurrency_limit=4)
        try:
            options = _launching(settings, engine, Path(uploads))
            _launch(page, server_name=settings.host, server_port=port, **options)
            yield Served(url, page)
        finally:
            sessions.close()
            page.close(verbose=False)


def _launch(page: Any, **options: Any) -> None:
    """Start the server. Raises UserError if this machine does not reach the page, as Gradio asks it to."""
    import httpx

    try:
        page.launch(**options)
    except Exception as error:  # Gradio has no class of its own for it
        if not isinstance(error, httpx.HTTPError) and "localhost" not in str(error):
            raise
        host = urlsplit(page.local_url).hostname
        proxies = [name for name in getproxies() if name in ("http", "all") and not proxy_bypass(host)]
        raise UserError(
            f"the page was started, but this machine gets no answer from {page.local_url}: "
            + (
                f"{proxies[0]}_proxy is set, so a proxy is asked for it; add {host} to no_proxy"
                if proxies
                else "it is overloaded, or does not let programs connect to this address; try again, or give"
                " another address with --host or --port"
            )
        ) from None


def _launching(settings: UiSettings, engine: Any, uploads: Path) -> dict[str, Any]:
    """Return the launch options of Gradio: no sharing, no files but the gallery, system fonts, middleware."""
    import gradio as gr
    from starlette.middleware import Middleware

    from afa.pages.page import style

    small = engine.limits.own <= SMALL
    hosts = LOOPBACK if settings.host in LOOPBACK else None
    own = (
        *LOOPBACK,
        settings.host.lower(),
        *(name.lower() for name in (socket.gethostname(), socket.getfqdn())),
    )
    guard = Middleware(
        SameOriginMiddleware,
        hosts=hosts,
        uploads=uploads,
        names=(*own, f"{own[-2]}.local", *(settings.names or ())),
    )
    return {
        "share": False,
        "quiet": True,
        "prevent_thread_lock": True,
        "max_threads": settings.queue + 40,  # each waiting run holds one
        "show_error": False,  # api.py shows unexpected errors, without their text
        "allowed_paths": [str(engine.gallery.folder)],
        "max_file_size": LARGEST_UPLOAD,
        "footer_links": [],
        "ssr_mode": False,
        "pwa": False,
        "enable_monitoring": False,
        "theme": gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONO),
        "css": style("webui.css") + (HARD_EDGES if small else ""),
        "app_kwargs": {"middleware": [guard], "docs_url": None, "redoc_url": None},
    }


def _examples() -> list[str]:
    """Prompts of the embedded world, each of which needs several of its experts."""
    return [sample_scenes("mixed", 1, seed)[0].caption for seed in PICKED]


def _port(settings: UiSettings) -> int:
    """Return the port of the settings, or the first free one.

    Raises UserError if no port is free or the address is not one of this machine.
    """
    tried = range(FIRST_PORT, FIRST_PORT + TRIED) if settings.port is None else [settings.port]
    for port in tried:
        try:
            with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((settings.host, port))
            return port
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", None) not in TAKEN:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"--host {settings.host} cannot be used: {reason}") from None
    if settings.port is None:
        raise UserError(
            f"the ports {FIRST_PORT} to {FIRST_PORT + TRIED - 1} are all in use; give a free one with --port"
        )
    raise UserError(
        f"--port {settings.port} is in use or not allowed;"
        " give another, or leave it out to take the next free one"
    )


def _shown(host: str) -> str:
    """Return the address that a browser on this machine can open."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)


Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

# Gradio compiles templates (unsafe-eval) and writes styles and scripts into the page (unsafe-inline).
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:;"
    " font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; object-src 'none'; base-uri 'self';"
    " form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
# Paths that would make the server fetch from elsewhere.
FETCHING = ("/gradio_api/file=http", "/file=http", "/gradio_api/proxy=", "/proxy=")
UPLOADS = ("/gradio_api/upload", "/upload")
LARGEST_UPLOAD = 20 * 2**20  # bytes of one request with files
MOST_UPLOADS = 20  # files that are kept, of all visitors together; the oldest make room
MOST_BYTES = 100 * 2**20  # of them together


class SameOriginMiddleware:
    """ASGI middleware that refuses requests of other sites and large uploads, and adds security headers.

    app:     the app behind it
    hosts:   allowed host names, without ports; None: every IP address, and `names`
    uploads: folder of uploaded files
    names:   host names of this machine
    It refuses host names that another site points to this address (DNS rebinding), and requests that a
    browser sends for another site. Programs send neither Origin nor Sec-Fetch-Site, and are allowed.
    """

    def __init__(
        self, app: Any, hosts: Sequence[str] | None, uploads: Path, names: Sequence[str] = ()
    ) -> None:
        self.app, self.hosts, self.names, self.uploads = app, hosts, names, uploads.resolve()
        self._kept: deque[tuple[Path, int]] = deque()

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """Refuse the request, or pass it on and add the headers to the response."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal:
            await _refuse(scope, send, refusal)
            return
        uploading = scope["type"] == "http" and unquote(scope["path"]).rstrip("/").endswith(UPLOADS)
        body = bytearray()

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            if uploading and message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
            await send(message)

        await self.app(scope, receive, guarded)
        if uploading:
            self._keep(bytes(body))

    def _refusal(self, scope: Message) -> str:
        """Return the reason for refusing a request as a sentence; "" if it is allowed."""
        headers = scope["headers"]
        found = [value.decode("latin-1") for name, value in headers if name == b"host"]
        host = found[0] if len(found) == 1 else ""
        if not self._known(_host_name(host)):
            names = ", ".join(self.hosts or self.names)
            return f"This page answers to {names} only; start it with --host to open it to others."
        given = {
            name: value.decode("latin-1")
            for name, value in headers
            if name in (b"origin", b"sec-fetch-site", b"sec-fetch-mode")
        }
        linked = scope.get("method") == "GET" and scope["path"] == "/"  # a link to the page may be followed
        linked = linked and given.get(b"sec-fetch-mode") == "navigate"
        foreign = given.get(b"sec-fetch-site", "none") not in ("same-origin", "none") and not linked
        if foreign or (b"origin" in given and urlsplit(given[b"origin"]).netloc.lower() != host.lower()):
            return "This page answers to itself only, not to pages of other sites."
        if unquote(scope["path"]).lower().startswith(FETCHING):
            return "This page fetches nothing from elsewhere."
        return self._too_large(scope)

    def _known(self, name: str) -> bool:
        if self.hosts is not None:
            return name in self.hosts
        return name in self.names or _is_address(name)

    def _too_large(self, scope: Message) -> str:
        """Return the reason for refusing an upload by its Content-Length; "" if it is allowed."""
        if scope.get("method") != "POST" or not unquote(scope["path"]).rstrip("/").endswith(UPLOADS):
            return ""
        length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if not (length.isascii() and length.isdigit() and len(length) < 20 and int(length) <= LARGEST_UPLOAD):
            most = LARGEST_UPLOAD // 2**20
            return f"An upload may have {most} MB, all its files together, and must say its length."
        return ""

    def _keep(self, answer: bytes) -> None:
        """Note the uploaded files, and delete the oldest files if there are too many."""
        try:
            paths = [Path(place).resolve() for place in json.loads(answer)]
        except (ValueError, TypeError):
            return  # refused
        self._kept.extend(
            (path, path.stat().st_size) for path in paths if path.is_file() and self.uploads in path.parents
        )
        while len(self._kept) > MOST_UPLOADS or sum(size for _, size in self._kept) > MOST_BYTES:
            self._kept.popleft()[0].unlink(missing_ok=True)


def _is_address(name: str) -> bool:
    """Return whether a host is an IP address, which DNS rebinding cannot use."""
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _host_name(host: str) -> str:
    """Remove the port from a host: [::1]:7860 -> ::1."""
    return (host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]).lower()


async def _refuse(scope: Message, send: Send, sentence: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send(
        {
            "type": "http.response.start",
            "status": 403,
            "headers": [(b"content-type", b"text/plain; charset=utf-8")],
        }
    )
    await send({"type": "http.response.body", "body": sentence.encode()})
