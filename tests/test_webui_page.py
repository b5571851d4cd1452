"""The page as it is served: its functions by name, what it refuses, what it lets nobody reach."""

import json
import runpy
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webui_engine import ASKED, HARMFUL, PROMPT

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'afa[ui]'")
from gradio_client import Client
from gradio_client.exceptions import AppError

from afa.cli.main import main
from afa.webui.serve import serving
from afa.webui.settings import UiSettings

EXAMPLE = Path(__file__).parents[1] / "docs" / "ui_client.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def served(place):
    (place / "secret.txt").write_text("secret")
    with serving(UiSettings(output=str(place / "gallery"), device="cpu", port=free_port(), queue=1)) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    return Client(served.url, verbose=False, analytics_enabled=False)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fetch(url, **headers):
    """-> status, headers, body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_example_of_the_docs_runs(served, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), served.url])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    assert "AFA, seed 1" in said and "curves at half" in said and said.rstrip().endswith("stopped: Cancelled.")


def test_functions_have_names_and_nothing_else_can_be_called(client):
    assert sorted(client.view_api(return_format="dict")["named_endpoints"]) == ["/cancel", "/generate", "/methods", "/settings", "/weights"]
    assert client.view_api(return_format="dict")["unnamed_endpoints"] == {}


def test_pictures_weights_and_settings_by_name(client):
    made = client.predict(**ASKED | {"methods": ["afa", "superdiff_or"], "images": 2, "seed": 3}, api_name="/generate")
    assert [(one["method"], one["seed"]) for one in made] == [("afa", 3), ("afa", 4), ("superdiff_or", 3), ("superdiff_or", 4)]
    assert np.asarray(Image.open(made[0]["image"])).shape == (64, 64, 3)
    weights = client.predict(picture=made[0]["picture"], step=1, stage="M00", maps=True, api_name="/weights")
    assert abs(sum(weights["shares"].values()) - 1) < 0.01 and np.shape(weights["maps"]["curves"]) == (64, 64)
    again = client.predict(picture=made[1]["picture"], api_name="/settings")
    assert again["notes"] == [] and again["generate"]["seed"] == 4 and again["metadata"]["prompt"] == PROMPT
    assert client.predict(**again["generate"], api_name="/generate")[0]["picture"] == made[1]["picture"]


@pytest.mark.parametrize(
    ("name", "asked", "sentence"),
    [
        ("/generate", {**ASKED, "steps": 10**6}, "Steps 1000000 is out of bounds; give a number from 1 to 100"),
        ("/generate", {**ASKED, "methods": [HARMFUL]}, "There is no method '&lt;img src=x"),
        ("/generate", {**ASKED, "strengths": {"curves": 0, "angles": 0, "patterns": 0}}, "are turned off; give at least one"),
        ("/weights", {"picture": "../../etc/passwd"}, "There are no weight maps of ../../etc/passwd here"),
        ("/settings", {"picture": "../secret.txt"}, "There is no picture '../secret.txt' in the gallery"),
    ],
)
def test_what_cannot_be_done_is_a_sentence_and_the_page_goes_on(client, name, asked, sentence):
    with pytest.raises(AppError) as error:
        client.predict(**asked, api_name=name)
    assert sentence in str(error.value)
    assert "afa" in client.predict(api_name="/methods")["methods"]


def test_nothing_but_the_gallery_is_served(served, place, client):
    own = client.predict(**ASKED, api_name="/generate")[0]["picture"]
    file = f"{served.url}/gradio_api/file="
    assert fetch(file + str(place / "gallery" / own))[0] == 200
    secret = place / "secret.txt"
    for path in (secret, f"{place}/gallery/../secret.txt", f"{place}/gallery/%2e%2e/secret.txt", "/etc/passwd", "README.md", __file__, place / "gallery"):
        assert fetch(file + str(path))[0] == 403, path
    for path in ("http://127.0.0.1:9/", "https%3A//example.org/a.png", "HTTP://127.0.0.1:9/"):
        status, _, body = fetch(file + path)
        assert (status, body) == (403, b"This page fetches nothing from elsewhere.")


def test_no_path_that_somebody_types_is_opened(served, place):
    """The form's upload takes what was uploaded, not what lies elsewhere."""
    config = json.loads(fetch(f"{served.url}/config")[2])
    index = next(one["id"] for one in config["dependencies"] if one["api_name"] == "read")
    for path in ("/etc/passwd", str(place / "secret.txt")):
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
        status, body = post(f"{served.url}/gradio_api/run/predict", {"data": data, "fn_index": index, "session_hash": "x"})
        assert status >= 400 and "secret" not in body.replace("secret.txt", "") and "root:" not in body


def test_other_sites_get_nothing(served):
    assert fetch(served.url, Host="evil.example")[0] == 403
    assert fetch(served.url, Host=f"localhost:{served.url.rpartition(':')[2]}")[0] == 200
    policy = fetch(served.url)[1]["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy


def test_a_full_queue_says_so(served, client):
    """One draws, one waits, the third is told; both others can be stopped, and who waits need not wait for it."""
    others = [Client(served.url, verbose=False, analytics_enabled=False) for _ in range(2)]
    asked = ASKED | {"steps": 100, "methods": ["afa", "magicfusion"]}
    runs = []
    for seed, other in enumerate(others, start=100):
        runs.append(other.submit(**asked, seed=seed, api_name="/generate"))
        time.sleep(0.5)
    with pytest.raises(AppError, match="1 run is waiting already, as many as may"):
        client.predict(**asked, seed=102, api_name="/generate")
    for other, run in zip(others[::-1], runs[::-1], strict=True):
        assert other.predict(api_name="/cancel")
        assert "Cancelled" in str(run.exception(timeout=10))


def test_a_port_in_use_is_a_sentence_or_passed_over(served, tmp_path, capsys):
    port = int(served.url.rpartition(":")[2])
    assert main(["ui", "--port", str(port), "--output", str(tmp_path)]) == 2
    assert f"--port {port} is in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("set_to_fail", "sentence"),
    [
        (
            lambda patch: patch.setattr("gradio.networking.url_ok", lambda url: False),
            "it is overloaded, or does not let programs connect to this address; try again, or give another address with --host or --port\n",
        ),
        (
            lambda patch: patch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}"),
            "http_proxy is set, so a proxy is asked for it; add 127.0.0.1 to no_proxy\n",
        ),
    ],
    ids=["overloaded", "proxy"],
)
def test_a_page_that_this_machine_does_not_reach_is_a_sentence_and_is_closed(set_to_fail, sentence, tmp_path, capsys, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    set_to_fail(monkeypatch)
    port = free_port()
    assert main(["ui", "--port", str(port), "--output", str(tmp_path), "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert f"afa: the page was started, but this machine gets no answer from http://127.0.0.1:{port}/: {sentence}" in said.err and said.out == ""
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_without_gradio_one_sentence_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["ui", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "afa: afa ui needs gradio, which is not installed; install it with: pip install 'afa[ui]'\n"
