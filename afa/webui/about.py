"""What is loaded, and how to call it from elsewhere."""

from html import escape
from pathlib import Path
from typing import Any

from afa.checkpoint.manifest import read_manifest
from afa.generation.run import is_saved
from afa.version import __version__
from afa.webui.studio import Studio

EXAMPLE = '''from gradio_client import Client

client = Client("{url}", analytics_enabled=False)     # this page's address
print(client.predict(api_name="/methods"))                            # methods, experts, schedulers, limits
pictures = client.predict(prompt="{prompt}", methods={methods},
                          seed=1, steps=20, api_name="/generate")
for one in pictures:
    print(one["method"], one["seed"], one["seconds"], one["image"])   # image: downloaded
print(client.predict(picture=pictures[0]["picture"], step=10, api_name="/weights")["shares"])
print(client.predict(picture=pictures[0]["picture"], api_name="/settings")["generate"])'''
CURL = '''curl -s {url}/gradio_api/call/methods -H "Content-Type: application/json" -d '{"data": []}'
curl -sN {url}/gradio_api/call/methods/EVENT_ID     # the event_id that the first answered with'''


def about(studio: Studio, url: str) -> str:
    """Version, experts and their hashes, what is offered and what is not, the API. url: where the page is."""
    prompt = "a red star left of a blue ring on a dotted mint background"
    methods = "[" + ", ".join(f'"{name}"' for name in list(studio.methods)[:2]) + "]"
    example = EXAMPLE.replace("{url}", url).replace("{prompt}", prompt).replace("{methods}", methods)
    return (
        f'<div class="afa-about"><h3>Loaded</h3>{_rows(_loaded(studio))}<h3>Experts</h3>{_rows(_experts(studio))}'
        f"<h3>Methods</h3>{_rows([(method.title, method.about) for method in studio.methods.values()])}"
        f"{_refused(studio)}<h3>From Python</h3><pre><code>{escape(example)}</code></pre>"
        f"<h3>From a shell</h3><pre><code>{escape(CURL.replace('{url}', url))}</code></pre></div>"
    )


def _loaded(studio: Studio) -> list[tuple[str, str]]:
    denoiser = studio.ensemble.denoiser
    fused = f"{len(studio.ensemble.aggregators)} of {len(denoiser.stages)} stages fused"
    untrained = "none that are trained: experts are combined while sampling"
    aggregators = f"{fused}, sha256 {studio.aggregators}" if studio.aggregators else untrained
    return [
        ("afa", __version__),
        ("source", ", ".join(studio.sources)),
        ("family", f"{denoiser.family}, {len(denoiser.stages)} stages"),
        ("aggregators", aggregators),
        ("dtype", studio.dtype),
        ("gallery", str(studio.gallery.folder)),
    ]


def _experts(studio: Studio) -> list[tuple[str, str]]:
    """Name, and source with the hash that is recorded of the denoiser."""
    recorded: dict[str, Any] = {}
    if is_saved(studio.sources[0]):
        recorded = {expert.name: expert for expert in read_manifest(Path(studio.sources[0])).experts}
    rows = []
    for expert in studio.ensemble.experts:
        known = recorded.get(expert.name)
        source = known.source if known else str(expert.located.spec.source if expert.located else "in memory")
        rows.append((expert.name, f"{source}, sha256 of its denoiser {_hash(known)}"))
    return rows


def _hash(recorded: Any) -> str:
    files = getattr(recorded, "files", None) or {}
    denoiser = [digest for name, digest in files.items() if "unet" in name or "transformer" in name]
    return next(iter([*denoiser, *files.values()]), "not recorded")


def _refused(studio: Studio) -> str:
    return f"<h3>Not with these experts</h3>{_rows(list(studio.refused.items()))}" if studio.refused else ""


def _rows(pairs: list[tuple[str, str]]) -> str:
    return f'<dl class="afa-settings">{"".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)}</dl>'

