"""What stands before every request: no other site's page may use this one, and the page reaches no other host."""

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import unquote

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

# Gradio's own code makes functions of templates (unsafe-eval) and writes styles and start-up scripts into the page (unsafe-inline).
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:;"
    " font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
FETCHING = ("/gradio_api/file=http", "/file=http", "/gradio_api/proxy=", "/proxy=")  # would have the server fetch from elsewhere


class Guard:
    """ASGI middleware. hosts: names the page may be called by, None: any. A page elsewhere whose name is made to lead here gets nothing."""

    def __init__(self, app: Any, hosts: Sequence[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """Refuse, or pass on and add the headers."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal:
            await _answer(send, refusal)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in HEADERS.items())]
            await send(message)

        await self.app(scope, receive, guarded)

    def _refusal(self, scope: Message) -> str:
        """Why a request is not passed on, as a sentence; "" if it is."""
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self.hosts is not None and _name(host) not in self.hosts:
            return f"This page answers to {', '.join(self.hosts)} only; start it with --host to open it to others."
        if unquote(scope["path"]).lower().startswith(FETCHING):
            return "This page fetches nothing from elsewhere."
        return ""


def _name(host: str) -> str:
    """Without the port: [::1]:7860 -> ::1."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


async def _answer(send: Send, sentence: str) -> None:
    await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain; charset=utf-8")]})
    await send({"type": "http.response.body", "body": sentence.encode()})
