"""Serve the page: bound to one address, confined to one folder, silent towards the rest of the world."""

import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afa.demo.data import ENSEMBLE
from afa.demo.scenes import sample_scenes
from afa.errors import UserError
from afa.webui.reports import read_reports
from afa.webui.settings import FIRST_PORT, UiSettings

TRIED = 20  # ports after the first
CALLS = 100  # of the page's functions that may wait besides runs; beyond it Gradio refuses by itself
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SMALL = 128  # pixels: pictures up to this side are enlarged with hard edges
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Consolas", "Liberation Mono", "monospace"]
# For experts that draw icons.
HARD_EDGES = "#afa-gallery img, .afa-pictures img, .afa-maps img { image-rendering: pixelated; }"
PICKED = (500_059, 500_047, 500_030)  # scenes the examples are


@dataclass(frozen=True)
class Served:
    """A page that is being served, and where."""

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
    """The page, while the context is open. Raises UserError for what cannot be loaded or listened at, before anything is served."""
    port = _port(settings)
    reports = read_reports(settings.reports or [])
    with tempfile.TemporaryDirectory(prefix="afa-ui-") as uploads:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads, "HF_HUB_DISABLE_TELEMETRY": "1"}
        from afa.webui.desk import Desk
        from afa.webui.page import build
        from afa.webui.studio import Studio

        embedded = not settings.sources
        studio = Studio.open(settings, settings.sources or [str(ENSEMBLE)])
        steps = min(20 if embedded else 50, settings.max_steps)
        desk, url = Desk(studio), f"http://{_shown(settings.host)}:{port}"
        page = build(desk, reports, _examples() if embedded else [], steps, 3.0 if embedded else studio.guidance, url)
        page.queue(max_size=settings.queue + CALLS, default_concurrency_limit=4)
        try:
            page.launch(server_name=settings.host, server_port=port, **_launching(settings, studio, Path(uploads)))
            yield Served(url, page)
        finally:
            desk.close()
            page.close(verbose=False)


def _launching(settings: UiSettings, studio: Any, uploads: Path) -> dict[str, Any]:
    """What Gradio is told: nothing shared, nothing served but the gallery, our fonts, our guard."""
    import gradio as gr
    from starlette.middleware import Middleware

    from afa.pages.page import style
    from afa.webui.guard import LARGEST_UPLOAD, Guard

    small = studio.limits.own <= SMALL
    hosts = LOOPBACK if settings.host in LOOPBACK else None
    own = (*LOOPBACK, settings.host.lower(), *(name.lower() for name in (socket.gethostname(), socket.getfqdn())))
    guard = Middleware(Guard, hosts=hosts, uploads=uploads, names=(*own, f"{own[-2]}.local", *(settings.names or ())))
    return {
        "share": False,
        "quiet": True,
        "prevent_thread_lock": True,
        "max_threads": settings.queue + 40,  # who waits for a turn holds one
        "show_error": False,  # what nobody foresaw is said by answers.py, without its words
        "allowed_paths": [str(studio.gallery.folder)],
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
    """The port asked for, or the first that is free. Raises UserError if there is none, or the address is not this machine's."""
    tried = range(FIRST_PORT, FIRST_PORT + TRIED) if settings.port is None else [settings.port]
    for port in tried:
        try:
            with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((settings.host, port))
            return port
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", None) not in (98, 48, 10048, 13):  # in use (Linux, macOS, Windows), not allowed
                raise UserError(f"--host {settings.host} cannot be listened at: {getattr(error, 'strerror', None) or error}") from None
    if settings.port is None:
        raise UserError(f"the ports {FIRST_PORT} to {FIRST_PORT + TRIED - 1} are all in use; give a free one with --port")
    raise UserError(f"--port {settings.port} is in use or not allowed; give another, or leave it out to take the next free one")


def _shown(host: str) -> str:
    """An address that a browser on this machine can open."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)
