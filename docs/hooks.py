"""What the site needs beyond its plugins: equations without JavaScript, examples in docstrings."""

import itertools
import re
from html import unescape

import griffe
from latex2mathml.converter import convert

_DOLLARS = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)
_VERBATIM = re.compile(r"(<(pre|script|style|code)\b.*?</\2>|<[^>]*>)", re.DOTALL)
_EQUATION = re.compile(r"^```math\n(.*?)\n```$", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_) -> str:
    """MkDocs: fenced LaTeX, which GitHub shows as well, becomes MathML."""
    return _EQUATION.sub(lambda found: convert(found[1], display="block"), markdown)


def on_page_content(html: str, page, **_) -> str:
    """MkDocs: LaTeX between dollars in the notebook's text becomes MathML, too."""
    if not page.file.src_path.endswith(".ipynb"):
        return html
    parts = _VERBATIM.split(html)  # text, tag or code, the tag's name, text, ...
    text = [_DOLLARS.sub(_mathml, part) for part in parts[::3]]
    pairs = itertools.zip_longest(text, parts[1::3], fillvalue="")
    return "".join(itertools.chain.from_iterable(pairs))


def _mathml(found: re.Match) -> str:
    block, inline = found.groups()
    return convert(unescape(block or inline), display="block" if block else "inline")


class Examples(griffe.Extension):
    """Griffe shows doctests in a section `Examples`; the docstrings here have one and say so."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Renames the section of each object."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
