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
    """Wrap a function of the page so that its errors become sentences, escaped because Gradio shows HTML."""
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
    """Capitalise and escape a message for Gradio, which shows messages as HTML."""
    first = text.partition(" ")[0]
    begun = text[:1].upper() + text[1:] if first.isalpha() else text  # the name of a file is not changed
    return escape(begun, quote=False)


class Page(gr.Blocks):
    """Blocks that answer invalid input of a field with a sentence instead of a traceback in the terminal."""

    async def process_api(self, *args: Any, **kwargs: Any) -> Any:
        """Raises gr.Error."""
        try:
            return await super().process_api(*args, **kwargs)
        except Exception as error:
            if isinstance(error, gr.Error) and not error.print_exception:
                raise  # it has its sentence already
            words = (
                error.message
                if isinstance(error, gr.Error)
                else f"what was sent does not fit this page ({type(error).__name__})"
            )
            raise gr.Error(sentence(str(words)), print_exception=False) from None


DRAWING = "drawing"  # Gradio's concurrency group without a limit: queue.py decides which run is next
PLACES = 4  # decimals of weights


class Api:
    """The functions that clients can call: generate, cancel, weights, methods, settings."""

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
        prompt_syntax: str = "plain",
        regions: list[dict[str, Any]] = [],  # noqa: B006
        method_options: dict[str, dict[str, Any]] = {},  # noqa: B006
    ) -> list[dict[str, Any]]:
        """Make pictures with every method, from the noise of the same seeds.

        Returns a list of method, title, seed, seconds, picture (its name, for weights and settings), settings
        and image (a file that gradio_client downloads). A method that fails has an error instead.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "request")}
        job = self.sessions.begin(request.session_hash, given)
        self.engine.run(job)
        if job.state == "cancelled":
            raise gr.Error("Cancelled.", print_exception=False)
        return [one for column in job.columns for one in _told(column)]

    def cancel(self, request: gr.Request) -> bool:
        """Cancel the run of this client. Returns False if there is none."""
        job = self.sessions.job(request.session_hash)
        if job is None or job.over:
            return False
        job.cancel()
        return True

    def weights(self, picture: str, step: int = 0, stage: str = "", maps: bool = False) -> dict[str, Any]:
        """Return the weights of the experts in a recent picture.

        step counts from 1, 0 is the mean over steps; stage is a name, "" is the mean over stages.
        Returns stages, timesteps and the share of each expert; with maps, also each expert's weight in every
        pixel, as rows of numbers.
        """
        kept = self.engine.shelf.get(text("picture", picture))
        found = kept.look(whole("step", step, 0, MOST), text("stage", stage))
        answer: dict[str, Any] = {"stages": list(kept.maps), "timesteps": list(kept.timesteps)}
        answer["shares"] = {
            name: round(float(found[index].mean()), PLACES) for index, name in enumerate(kept.experts)
        }
        if maps:
            answer["maps"] = {
                name: found[index].round(PLACES).tolist() for index, name in enumerate(kept.experts)
            }
        return answer

    def methods(self) -> dict[str, Any]:
        """Return methods with their help, refused methods and why, experts, schedulers and limits."""
        return {
            "methods": {
                method.name: f"{method.title}: {method.about}" for method in self.engine.methods.values()
            },
            "refused": self.engine.refused,
            "experts": list(self.engine.ensemble.names),
            "schedulers": self.engine.schedulers,
            "loras": self.engine.loras,
            "limits": vars(self.engine.limits),
        }

    def settings(self, picture: str) -> dict[str, Any]:
        """Return a picture's metadata, arguments for generate, and notes on what cannot be reproduced."""
        metadata = read_metadata(self.engine.gallery.find(picture))
        found, notes = request_from_metadata(metadata, self.engine)
        asked = {name: value for name, value in found.items() if value is not None}
        return {"metadata": metadata, "generate": asked, "notes": notes}


def offer(api: Api) -> None:
    """Add the functions as endpoints to the page that is being built."""
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
