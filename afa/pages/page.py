"""Pages from templates: everything that reaches one is escaped by Jinja, unless our own code says that it is HTML."""

import base64
import io
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from afa.pages.charts import SHAPES
from afa.pages.tables import GROUP_TITLES, MARKS
from afa.version import __version__


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Of afa/pages/templates. A name that a template uses and nobody gave is an error, not an empty place."""
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


def render(template: str, **context: Any) -> Markup:
    """A whole page, or a part of one. template: a file of afa/pages/templates."""
    return Markup(environment().get_template(template).render(context))


def data_uri(picture: Image.Image, kind: str = "png", **options: Any) -> str:
    """A picture inside the page itself. options: of Pillow's writer of that kind."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
