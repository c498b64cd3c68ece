"""One HTML file with a slider between before and after for each image; it needs no other file."""

import base64
import html
from collections.abc import Mapping, Sequence

import numpy as np

from warm_diffusion.data.images import png

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 0 0 3rem; }
.pair { position: relative; width: 100%; max-width: 56rem; }
.pair img { display: block; width: 100%; image-rendering: pixelated; }
.pair .after { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--cut, 50%)); }
.pair::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--cut, 50%);
  width: 2px; margin-left: -1px; background: #fff; box-shadow: 0 0 3px #000; }
.pair input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize; }
.pair:focus-within { outline: 3px solid #2171b5; }
"""
_SCRIPT = """
for (const figure of document.querySelectorAll("figure")) {
  const pair = figure.querySelector(".pair");
  const slider = pair.querySelector("input");
  slider.addEventListener("input", () => pair.style.setProperty("--cut", slider.value + "%"));
  for (const [name, part] of [["left", ".before"], ["right", ".after"]]) {
    const choice = figure.querySelector(`select[name=${name}]`);
    const show = () => {
      pair.querySelector(part).src = figure.querySelector(`[data-name="${choice.value}"]`).src;
    };
    choice.addEventListener("change", show);
    show();
  }
}
"""


def _figure(name: str, caption: str, versions: Mapping[str, np.ndarray]) -> str:
    names = list(versions)

    def select(side: str, chosen: str) -> str:
        options = "".join(
            f"<option{' selected' if one == chosen else ''}>{html.escape(one)}</option>"
            for one in names
        )
        return f'<label>{side} <select name="{side}">{options}</select></label>'

    hidden = "".join(
        f'<img hidden data-name="{html.escape(one)}" alt="" src="data:image/png;base64,'
        f'{base64.b64encode(png(image)).decode()}">'
        for one, image in versions.items()
    )
    title = html.escape(name)
    return f"""<figure>
<h2>{title}</h2>
<p>{html.escape(caption)}<br>{select("left", names[0])} {select("right", names[1])}</p>
<div class="pair"><img class="before" alt="{title}, left"><img class="after" alt="{title}, right">
<input type="range" min="0" max="100" value="50" step="0.5" aria-label="{title}: left and right">
</div>{hidden}
</figure>"""


def page(title: str, figures: Sequence[tuple[str, str, Mapping[str, np.ndarray]]]) -> bytes:
    """The page of several images.

    Args:
      title: heading.
      figures: of each image its name, a caption, and its versions as uint8 [H, W, C] by name: the
        first is shown on the left, the second on the right.
    """
    body = "\n".join(_figure(*figure) for figure in figures)
    text = f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body><h1>{html.escape(title)}</h1>
<p>Drag across an image, or use the arrow keys, to move between left and right.</p>
{body}
<script>{_SCRIPT}</script></body></html>
"""
    return text.encode()
