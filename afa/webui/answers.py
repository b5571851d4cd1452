"""Errors reach people as sentences; the page survives them."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr

from afa.errors import UserError
from afa.webui.job import unexpected


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
