"""What is loaded, and how to call it from elsewhere."""

from html import escape
from pathlib import Path
from typing import Any

from afa import __version__
from afa.checkpoint.manifest import read_manifest
from afa.generation.sources import is_saved
from afa.webui.studio import Studio

EXAMPLE = '''from gradio_client import Client

client = Client("http://127.0.0.1:7860")                    # this page's address
print(client.predict(api_name="/methods"))                  # methods, experts, schedulers, limits
pictures = client.predict(prompt="{prompt}", methods={methods},
                          seed=1, steps=20, api_name="/generate")
for one in pictures:
    print(one["method"], one["seed"], one["seconds"], one["image"])   # image: downloaded
print(client.predict(picture=pictures[0]["picture"], step=10, api_name="/weights")["shares"])
print(client.predict(picture=pictures[0]["picture"], api_name="/settings")["generate"])'''
CURL = '''curl -s http://127.0.0.1:7860/gradio_api/call/methods -H "Content-Type: application/json" -d '{"data": []}'
curl -sN http://127.0.0.1:7860/gradio_api/call/methods/EVENT_ID     # the event_id that the first answered with'''


def about(studio: Studio) -> str:
    """Version, experts and their hashes, what is offered and what is not, the API."""
    prompt = "a red star left of a blue ring on a dotted mint background"
    methods = "[" + ", ".join(f'"{name}"' for name in list(studio.methods)[:2]) + "]"
    return (
        f'<div class="afa-about"><h3>Loaded</h3>{_rows(_loaded(studio))}<h3>Experts</h3>{_table(_experts(studio))}'
        f"<h3>Methods</h3>{_rows([(method.title, method.about) for method in studio.methods.values()])}"
        f"{_refused(studio)}<h3>From Python</h3><pre><code>{escape(EXAMPLE.replace('{prompt}', prompt).replace('{methods}', methods))}</code></pre>"
        f"<h3>From a shell</h3><pre><code>{escape(CURL)}</code></pre></div>"
    )


def _loaded(studio: Studio) -> list[tuple[str, str]]:
    denoiser = studio.ensemble.denoiser
    fused = f"{len(studio.ensemble.aggregators)} of {len(denoiser.stages)} stages fused"
    aggregators = f"{fused}, sha256 {studio.aggregators}" if studio.aggregators else "none that are trained: experts are combined while sampling"
    return [
        ("afa", __version__),
        ("source", ", ".join(studio.sources)),
        ("family", f"{denoiser.family}, {len(denoiser.stages)} stages"),
        ("aggregators", aggregators),
        ("numbers", studio.dtype),
        ("gallery", str(studio.gallery.folder)),
    ]


def _experts(studio: Studio) -> list[list[str]]:
    """Name, source and the hashes that are recorded."""
    recorded: dict[str, Any] = {}
    if is_saved(studio.sources[0]):
        recorded = {expert.name: expert for expert in read_manifest(Path(studio.sources[0])).experts}
    rows = [["expert", "source", "sha256 of its denoiser"]]
    for expert in studio.ensemble.experts:
        known = recorded.get(expert.name)
        source = known.source if known else str(expert.located.spec.source if expert.located else "in memory")
        rows.append([expert.name, source, _hash(known)])
    return rows


def _hash(recorded: Any) -> str:
    files = getattr(recorded, "files", None) or {}
    return next((digest for name, digest in files.items() if "unet" in name or "transformer" in name), next(iter(files.values()), "not recorded"))


def _refused(studio: Studio) -> str:
    return f"<h3>Not with these experts</h3>{_rows(list(studio.refused.items()))}" if studio.refused else ""


def _rows(pairs: list[tuple[str, str]]) -> str:
    return f'<dl class="afa-settings">{"".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)}</dl>'


def _table(rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
