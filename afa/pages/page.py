"""Pages from templates. Jinja escapes all values, except those that our own code marks as HTML."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from afa.pages.advice import Advice
from afa.pages.charts import SHAPES
from afa.pages.tables import GROUP_TITLES, MARKS
from afa.version import __version__


@dataclass(frozen=True)
class Advised:
    """The box on top of a page.

    said:    what to do, in one sentence
    details: paragraphs, and pairs of a title and a sentence under each; either may be empty
    terms:   what all of it rests on
    """

    said: Advice
    details: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()
    terms: str = ""


@dataclass(frozen=True)
class ThemedPicture:
    """A picture as a data URI, for a light and for a dark ground; dark is "" where one serves both."""

    light: str
    dark: str = ""


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The templates of afa/pages/templates. A name that a template uses and does not get is an error."""
    made = Environment(
        loader=PackageLoader("afa.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    made.globals.update(version=__version__, shapes=SHAPES, group_titles=GROUP_TITLES, marks=MARKS)
    return made


def render(
    template: str,
    heading: str,
    advice: Advised,
    command: str,
    facts: str = "",
    docs: str = "",
    **context: Any,
) -> str:
    """A whole page.

    template: a file of afa/pages/templates, based on base.html
    heading:  of the page
    advice:   the box on top
    command:  that made it
    facts:    what it is about, in one line under the heading
    docs:     the page that says how to read it
    context:  of the template's own part
    """
    around = {"heading": heading, "advice": advice, "command": command, "facts": facts, "docs": docs}
    return environment().get_template(template).render(around | context)


def style(name: str) -> str:
    """A .css file of afa/pages/templates."""
    return resources.files("afa.pages").joinpath("templates", name).read_text(encoding="utf-8")


def part(template: str, macro: str, **context: Any) -> str:
    """What a macro of a template makes of its arguments."""
    return str(getattr(environment().get_template(template).module, macro)(**context))


def data_uri(picture: Image.Image, kind: str = "png", **options: Any) -> str:
    """A picture inside the page itself. options: of Pillow's writer of that kind."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
