"""Pages for people: one HTML file that needs no other, from a template in templates/.

Templates extend base.html, which brings the style, light and dark. What they show is text unless a
filter says otherwise: `image` makes a PNG file's bytes the source of an <img>, `safe` passes SVG.
"""

import base64
import functools
from typing import Any

import jinja2


def render(template: str, **values: Any) -> bytes:
    """The page of a template, such as restore.html, with its values by name.

    Raises:
      jinja2.UndefinedError: a value that the template needs is not there.
    """
    return _templates().get_template(template).render(values).encode()


@functools.cache
def _templates() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("warm_diffusion"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["image"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return found
