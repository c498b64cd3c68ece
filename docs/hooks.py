"""What the site needs beyond its plugins: equations without JavaScript, examples in docstrings."""

import re

import griffe
from latex2mathml.converter import convert

_EQUATION = re.compile(r"^```math\n(.*?)\n```$", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_) -> str:
    """MkDocs: fenced LaTeX, which GitHub shows as well, becomes MathML."""
    return _EQUATION.sub(lambda found: convert(found[1], display="block"), markdown)


class Examples(griffe.Extension):
    """Griffe shows doctests in a section `Examples`; the docstrings here have one and say so."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Renames the section of each object."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
