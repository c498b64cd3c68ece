"""What the site needs beyond its plugins: equations without JavaScript, links, examples."""

import itertools
import pathlib
import re
from html import unescape
from urllib.parse import unquote

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_DOLLARS = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)
_VERBATIM = re.compile(r"(<(pre|script|style|code)\b.*?</\2>|<[^>]*>)", re.DOTALL)
_LINK = re.compile(r'(?:href|src)="(?![a-z]+:|//)([^"#?]*)[^"#]*#?([^"]*)"')
_FLAG = re.compile(r"(?<![\w-])--[a-z_]+")
_EQUATION = re.compile(r"^```math\n(.*?)\n```$", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_) -> str:
    """MkDocs: fenced LaTeX, which GitHub shows as well, becomes MathML."""
    return _EQUATION.sub(lambda found: convert(found[1], display="block"), markdown)


def on_page_content(html: str, page, **_) -> str:
    """MkDocs: in the notebook LaTeX between dollars becomes MathML, and links are its folder's.

    On other pages lines break neither after a flag's dashes nor around a plus-minus.
    """
    if not page.file.src_path.endswith(".ipynb"):
        html = re.sub(r"(\d) ± (\d)", "\\1\u00a0±\u00a0\\2", html)
        parts = re.split(r"(<[^>]*>)", html)  # text, tag, text, ...
        parts[::2] = [_FLAG.sub(r'<span class="flag">\g<0></span>', text) for text in parts[::2]]
        return "".join(parts)
    html = re.sub(r'<a href="(?=\w+\.html)', '<a href="../', html)
    parts = _VERBATIM.split(html)  # text, tag or code, the tag's name, text, ...
    text = [_DOLLARS.sub(_mathml, part) for part in parts[::3]]
    pairs = itertools.zip_longest(text, parts[1::3], fillvalue="")
    return "".join(itertools.chain.from_iterable(pairs))


def _mathml(found: re.Match) -> str:
    block, inline = found.groups()
    return convert(unescape(block or inline), display="block" if block else "inline")


def on_post_build(config, **_) -> None:
    """MkDocs: each link within the finished site leads to a file, and to its heading."""
    site, broken = pathlib.Path(config["site_dir"]).resolve(), []
    pages = {path: path.read_text() for path in site.rglob("*.html") if path.name != "404.html"}
    for page, text in pages.items():
        for link, anchor in _LINK.findall(re.sub(r"(?s)<(script|code)\b.*?</\1>", "", text)):
            target = (page.parent / unquote(link)).resolve() if link else page
            target = target / "index.html" if target.is_dir() else target
            found = target.is_file() and (
                not anchor or target not in pages or f'id="{unquote(anchor)}"' in pages[target]
            )
            if not found:
                broken.append(f"{page.relative_to(site)}: {link}#{anchor}".rstrip("#"))
    if broken:
        raise PluginError("broken links: " + "; ".join(sorted(set(broken))))


class Examples(griffe.Extension):
    """Griffe shows doctests in a section `Examples`; the docstrings here have one and say so."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Renames the section of each object."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
