"""The page against other sites, floods, broken pictures and numbers that are none."""

import asyncio
import json
import stat
import struct
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest

from afa.errors import UserError
from afa.images import CHUNK, read_metadata, save_picture
from afa.webui.gallery import Gallery
from afa.webui.request_validation import Limits, validate_request, whole
from afa.webui.serve import MOST_UPLOADS, SameOriginMiddleware

HOME = b"127.0.0.1:7860"
LIMITS = Limits(images=4, steps=100, side=128, unit=8, own=64)


def status(guard, path="/", method="GET", kind="http", **headers):
    """What a request is answered with; 200 where it is passed on."""
    sent = []
    scope = {"type": kind, "path": path, "headers": [(name.replace("_", "-").encode(), value) for name, value in ({"host": HOME} | headers).items()]}
    scope |= {"method": method} if kind == "http" else {}

    async def keep(message):
        sent.append(message)

    asyncio.run(guard(scope, None, keep))
    return sent[0].get("status", sent[0]["type"])


def passing(answer=b"[]"):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})

    return app


@pytest.fixture
def guard(tmp_path):
    return SameOriginMiddleware(passing(), ("127.0.0.1", "localhost", "::1"), tmp_path)


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {"host": b"evil.example"}),
        ("/", {"host": b"127.0.0.1.evil.example:7860"}),
        ("/", {"host": b""}),
        ("/gradio_api/queue/join", {"origin": b"https://evil.example"}),
        ("/gradio_api/queue/join", {"origin": b"http://127.0.0.1:9999"}),
        ("/gradio_api/queue/join", {"origin": b"null"}),
        ("/gradio_api/queue/join", {"origin": b"http://127.0.0.1:7860.evil.example"}),
        ("/gradio_api/queue/join", {"sec_fetch_site": b"cross-site"}),
        ("/gradio_api/queue/join", {"sec_fetch_site": b"same-site"}),
        ("/gradio_api/queue/data", {"sec_fetch_site": b"cross-site", "sec_fetch_mode": b"navigate"}),
    ],
)
def test_other_origins_are_refused(guard, path, headers):
    for method in ("GET", "POST", "OPTIONS"):
        assert status(guard, path, method, **headers) == 403
    assert status(guard, path, kind="websocket", **headers) == "websocket.close"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": b"http://127.0.0.1:7860", "sec_fetch_site": b"same-origin"},
        {"host": b"LOCALHOST:7860", "origin": b"http://localhost:7860"},
        {"host": b"[::1]:7860"},
        {"sec_fetch_site": b"none"},
        {"sec_fetch_site": b"cross-site", "sec_fetch_mode": b"navigate"},
    ],
)
def test_the_page_itself_programs_and_links_to_it_get_in(guard, headers):
    assert status(guard, **headers) == 200


def test_two_hosts_are_none(tmp_path):
    guard = SameOriginMiddleware(passing(), ("127.0.0.1",), tmp_path)
    sent = []

    async def keep(message):
        sent.append(message)

    headers = [(b"host", HOME), (b"host", b"evil.example")]
    asyncio.run(guard({"type": "http", "path": "/", "method": "GET", "headers": headers}, None, keep))
    assert sent[0]["status"] == 403


def test_open_to_others_it_still_answers_to_no_foreign_name(tmp_path):
    guard = SameOriginMiddleware(passing(), None, tmp_path, ("mine", "mine.local"))
    assert [status(guard, host=host) for host in (b"192.168.0.7:7860", b"mine:7860", b"[fe80::1]:7860")] == [200] * 3
    assert [status(guard, host=host) for host in (b"evil.example:7860", b"192.168.0.7.nip.example")] == [403] * 2


def test_uploads_are_limited_in_size_and_number_and_the_oldest_deleted(tmp_path):
    for size in (b"20971521", b"-1", b"", b"1e3", b"9" * 30):
        assert status(SameOriginMiddleware(passing(), None, tmp_path), "/gradio_api/upload", "POST", content_length=size) == 403
    outside = tmp_path / "outside.txt"
    outside.write_text("stays")
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    files = [uploads / f"{index}.png" for index in range(MOST_UPLOADS + 3)]
    guard = None
    for file in files:
        file.write_bytes(b"x")
        app = passing(json.dumps([str(file), str(outside)]).encode())
        guard = guard or SameOriginMiddleware(app, None, uploads)
        guard.app = app
        assert status(guard, "/gradio_api/upload", "POST", content_length=b"10") == 200
    assert [file.exists() for file in files] == [False] * 3 + [True] * MOST_UPLOADS
    assert outside.exists()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side=2, text=b'{"prompt": "x"}', data=None, text_kind=None):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    said = chunk(*(text_kind or (b"iTXt", CHUNK.encode() + b"\0\0\0\0\0" + text)))
    return b"\x89PNG\r\n\x1a\n" + head + said + chunk(b"IDAT", zlib.compress(bytes(100)) if data is None else data) + chunk(b"IEND", b"")


BROKEN = {
    "bomb.png": png(side=40_000),
    "empty.png": b"",
    "noise.png": b"no picture",
    "cut.png": png()[:60],
    "squeezed.png": png(data=b"not zlib"),
    "text-bomb.png": png(text_kind=(b"zTXt", CHUNK.encode() + b"\0\0" + zlib.compress(bytes(10**8)))),
}


def test_a_picture_that_is_none_costs_only_itself(tmp_path):
    gallery = Gallery.at(tmp_path)
    save_picture(tmp_path / "good.png", np.zeros((8, 8, 3), np.uint8), {"prompt": "a"})
    for name, content in BROKEN.items():
        (tmp_path / name).write_bytes(content)
    found, faults = gallery.pictures()
    assert [path.name for path in found] == ["good.png"]
    assert len(faults) == len(BROKEN)
    for name in BROKEN:
        assert any(name in fault for fault in faults), name
        if name != "squeezed.png":  # what it says of itself is whole
            with pytest.raises(UserError, match=name):
                read_metadata(tmp_path / name)


@pytest.mark.parametrize("text", [b"[" * 10**5, b'{"seed": NaN}', b'{"seed": 1e999}', b"[]", b"null", b"\xff\xfe", b'{"a": "\\ud800"}'])
def test_what_a_picture_says_of_itself_may_be_anything(tmp_path, text):
    (tmp_path / "odd.png").write_bytes(png(text=text))
    with pytest.raises(UserError, match="odd.png"):
        read_metadata(tmp_path / "odd.png")


ODD = [None, True, "x", "", "nan", "inf", -1e400, 1e400, float("nan"), 10**40, "9" * 5000, -7, 1.5, [1], {"a": 1}, "²"]


@pytest.mark.parametrize("name", ["seed", "images", "steps", "guidance", "true_guidance", "width", "height", "prompt", "negative_prompt", "methods",
                                  "scheduler", "strengths"])  # fmt: skip
@pytest.mark.parametrize("value", ODD, ids=lambda value: str(value)[:12])
def test_what_a_program_asks_for_is_a_valid_request_or_a_sentence(name, value):
    given = {"prompt": "a", "methods": ["afa"], "strengths": {}} | {name: value}
    try:
        request = validate_request(given, LIMITS, ["afa"], ("curves", "angles"), ["ddim"])
    except UserError as error:
        refused = str(error)
        assert name.replace("_", " ").rstrip("s") in refused or "expert" in refused
    else:
        assert 0 <= request.seed < 2**64
        assert request.guidance is None or 0 <= request.guidance <= 100


def test_seeds_of_64_bits_are_exact_and_minus_one_draws():
    def seed_of(value):
        return validate_request({"prompt": "a", "methods": "afa", "seed": value}, LIMITS, ["afa"], ("a",), []).seed

    for seed in (2**53 + 1, 2**64 - 1):
        assert seed_of(seed) == seed_of(str(seed)) == seed
    assert len({seed_of(-1) for _ in range(5)}) == 5
    with pytest.raises(UserError, match="seed"):
        seed_of(2**64)
    assert whole("step", "3", 0, 5) == 3


def ask(url, body, **headers):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_page_that_is_served_answers_with_sentences(tmp_path, capfd):
    """Every function of the page, its private ones too, with what does not fit."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'afa[ui]'")
    import os
    import socket

    from afa.webui.serve import serving
    from afa.webui.settings import UiSettings

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "bomb.png").write_bytes(BROKEN["bomb.png"])
    with serving(UiSettings(output=str(tmp_path), device="cpu", port=port)) as served:
        assert stat.S_IMODE(Path(os.environ["GRADIO_TEMP_DIR"]).stat().st_mode) == 0o700
        config = json.loads(urllib.request.urlopen(f"{served.url}/config", timeout=20).read())
        assert served.url in json.dumps([one["props"].get("value") for one in config["components"]])
        predict = f"{served.url}/gradio_api/run/predict"
        calls = [one for one in config["dependencies"] if one["api_name"] not in ("generate", "draw") and one["backend_fn"]]
        assert len(calls) > 8
        for call in calls:
            for value in (None, -1, 10**9, 1e300, "x", [], {}, [[[]]], "\x00"):
                code, said = ask(predict, {"data": [value] * len(call["inputs"]), "fn_index": call["id"], "session_hash": "odd"})
                assert code < 600
                assert "Traceback" not in said
        assert ask(predict, {"data": []}, Origin="https://evil.example")[0] == 403
        look = next(one for one in config["dependencies"] if one["api_name"] == "pictures")
        code, said = ask(predict, {"data": [], "fn_index": look["id"], "session_hash": "odd"})
        assert code == 200
        assert "bomb.png" in said
    told = capfd.readouterr()
    assert "Traceback" not in told.out + told.err
