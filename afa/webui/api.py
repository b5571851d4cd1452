"""The functions of the page by name, for gradio_client and curl: plain values in, plain values out."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr

from afa.errors import UserError
from afa.images import read_metadata
from afa.webui.queue import GalleryPicture, MethodColumn, unexpected
from afa.webui.request_validation import MOST, text, whole
from afa.webui.sessions import Sessions, request_from_metadata


def answering(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function for the page: what it raises is said there, escaped, since Gradio shows messages as HTML."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with _said():
                yield from function(*args, **kwargs)

        return stream

    @functools.wraps(function)
    def answer(*args: Any, **kwargs: Any) -> Any:
        with _said():
            return function(*args, **kwargs)

    return answer


@contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise gr.Error(sentence(str(error)), print_exception=False) from None
    except gr.Error:
        raise
    except Exception as error:
        raise gr.Error(sentence(unexpected(error)), print_exception=False) from None


def sentence(text: str) -> str:
    """As Gradio shall show it, which takes messages for HTML."""
    first = text.partition(" ")[0]
    begun = text[:1].upper() + text[1:] if first.isalpha() else text  # a file's name stays as it is
    return escape(begun, quote=False)


DRAWING = "drawing"  # let in all at once: whose turn it is, queue.py decides
PLACES = 4  # decimals of weights


class Api:
    """What can be called: generate, cancel, weights, methods, settings."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions, self.engine = sessions, sessions.engine

    def generate(
        self,
        request: gr.Request,
        prompt: str,
        methods: list[str] = ["afa"],  # noqa: B006 - the page shows it as the default
        negative_prompt: str = "",
        seed: int = 0,
        images: int = 1,
        steps: int = 20,
        guidance: float | None = None,
        scheduler: str = "",
        width: int = 0,
        height: int = 0,
        strengths: dict[str, float] = {},  # noqa: B006
        true_guidance: float | None = None,
    ) -> list[dict[str, Any]]:
        """Pictures of every method from the noise of the same seeds: a list of method, seed, seconds, picture (for weights and settings),
        settings and image (a file, which gradio_client downloads). A method that cannot has an error instead."""
        given = {name: value for name, value in locals().items() if name not in ("self", "request")}
        job = self.sessions.begin(request.session_hash, given)
        self.engine.run(job)
        if job.state == "cancelled":
            raise gr.Error("Cancelled.", print_exception=False)
        return [one for column in job.columns for one in _told(column)]

    def cancel(self, request: gr.Request) -> bool:
        """Stop the run of this client: True, or False if there was none."""
        job = self.sessions.job(request.session_hash)
        if job is None or job.over:
            return False
        job.cancel()
        return True

    def weights(self, picture: str, step: int = 0, stage: str = "", maps: bool = False) -> dict[str, Any]:
        """Which expert shaped a picture that was made lately, at a step (from 1; 0: the mean) and stage ("": the mean): stages, timesteps,
        shares by expert; with maps their weights in every pixel, by expert, as rows of numbers."""
        kept = self.engine.shelf.get(text("picture", picture))
        found = kept.look(whole("step", step, 0, MOST), text("stage", stage))
        told: dict[str, Any] = {"stages": list(kept.maps), "timesteps": list(kept.timesteps)}
        told["shares"] = {
            name: round(float(found[index].mean()), PLACES) for index, name in enumerate(kept.experts)
        }
        if maps:
            told["maps"] = {
                name: found[index].round(PLACES).tolist() for index, name in enumerate(kept.experts)
            }
        return told

    def methods(self) -> dict[str, Any]:
        """What can be asked for: methods by name with what they are, methods that do not go with these experts and why, experts,
        schedulers, limits."""
        return {
            "methods": {
                method.name: f"{method.title}: {method.about}" for method in self.engine.methods.values()
            },
            "refused": self.engine.refused,
            "experts": list(self.engine.ensemble.names),
            "schedulers": self.engine.schedulers,
            "limits": vars(self.engine.limits),
        }

    def settings(self, picture: str) -> dict[str, Any]:
        """How a picture of the gallery was made: what it says of itself, what to hand to generate, what of it cannot be asked for here."""
        metadata = read_metadata(self.engine.gallery.find(picture))
        found, notes = request_from_metadata(metadata, self.engine)
        asked = {name: value for name, value in found.items() if value is not None}
        return {"metadata": metadata, "generate": asked, "notes": notes}


def offer(api: Api) -> None:
    """Make the functions endpoints of the page that is being built."""
    gr.api(answering(api.generate), api_name="generate", concurrency_id=DRAWING, concurrency_limit=None)
    for name in ("cancel", "weights", "methods", "settings"):
        gr.api(answering(getattr(api, name)), api_name=name, queue=name != "cancel")


def _told(column: MethodColumn) -> list[dict[str, Any]]:
    failed = [{"method": column.method, "title": column.title, "error": column.error}] if column.error else []
    return [*(_one(column, picture) for picture in column.pictures), *failed]


def _one(column: MethodColumn, picture: GalleryPicture) -> dict[str, Any]:
    file = {"path": str(picture.path), "orig_name": picture.path.name, "mime_type": "image/png"}
    return {
        "method": column.method,
        "title": column.title,
        "seed": picture.seed,
        "seconds": round(column.seconds / len(column.pictures), 3),
        "picture": picture.path.name,
        "settings": picture.metadata,
        "image": file | {"meta": {"_type": "gradio.FileData"}},
    }
