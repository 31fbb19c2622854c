"""A figure as SVG for a page: it follows the theme and the width of the page, and its ids are unique."""

import re
from hashlib import sha256
from io import StringIO
from typing import TYPE_CHECKING

from .._extras import need
from .colours import both

if TYPE_CHECKING:
    import matplotlib.figure


def svg(figure: "matplotlib.figure.Figure") -> str:
    """The figure as one `<svg>` element to put into HTML, or into a file.

    The same figure gives the same text. Colours follow the page's `color-scheme`. Words remain text, in the system's
    font. Ids differ from those of other figures. The figure fills the width of its place, up to 640 px.

    Raises: `ImportError` without matplotlib.
    """
    written = StringIO()
    with need("matplotlib", "viz").rc_context({"svg.hashsalt": "adadepth", "svg.fonttype": "none"}):
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = written.getvalue()
    used = set(re.findall(r'(?:url\(|xlink:href=")#([\w.-]+)', text))
    own = f"a{sha256(text.encode()).hexdigest()[:8]}"
    text = re.sub(r"<style.*?</style>", "", text[text.index("<svg") :])  # its rules would apply to the whole page
    return re.sub(r"<[^>]+>", lambda tag: _inline(tag[0], own, used), text)


def _inline(tag: str, own: str, used: set[str]) -> str:
    """One tag, with unique ids, or none if nothing refers to them; with colours of the page and the system's font."""
    if tag.startswith("<svg"):
        box = re.search(r'viewBox="[^"]*"', tag)
        look = "max-width:640px;height:auto;stroke-linejoin:round;stroke-linecap:butt"
        return f'<svg xmlns="http://www.w3.org/2000/svg" {box and box[0]} width="100%" style="{look}">'
    tag = re.sub(r' id="([^"]*)"', lambda name: f' id="{own}{name[1]}"' if name[1] in used else "", tag)
    tag = tag.replace('xlink:href="', 'href="')  # the root has no other namespace
    tag = tag.replace("url(#", f"url(#{own}").replace('href="#', f'href="#{own}')
    tag = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", lambda found: f"{found[1]}: {both(found[2])}", tag)
    return re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", tag)
