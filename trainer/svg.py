"""Elements of an SVG drawing as text, and the style that makes it readable by day and by night.

Colours of text, cards and lines follow the reader's light or dark scheme; those of bars suit both.
"""

from __future__ import annotations

from collections.abc import Iterable
from colorsys import hls_to_rgb
from xml.sax.saxutils import escape

STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-size: 13px; }
.ink { fill: #1f2328; } .dim { fill: #59636e; }
.title { font-size: 21px; font-weight: 600; } .heading { font-size: 15px; font-weight: 600; }
.small { font-size: 11px; } .tiny { font-size: 9px; } .middle { text-anchor: middle; }
.canvas { fill: #ffffff; } .card { fill: #f6f8fa; stroke: #d1d9e0; }
.level { stroke: #59636e; stroke-dasharray: 3 3; }
.hatch { stroke: #b3261e; stroke-width: 1.5; opacity: 0.5; }
.empty { fill: url(#hatch); stroke: #b3261e; stroke-dasharray: 4 3; }
.arrow { fill: none; opacity: 0.75; } .head { fill: #59636e; }
@media (prefers-color-scheme: dark) {
.ink { fill: #e6edf3; } .dim { fill: #9198a1; }
.canvas { fill: #0d1117; } .card { fill: #161b22; stroke: #3d444d; }
.level { stroke: #9198a1; } .hatch { stroke: #ff8a80; } .empty { stroke: #ff8a80; }
.head { fill: #9198a1; }
}
"""

DEFINITIONS = """<defs>
<pattern id="hatch" width="8" height="8" patternUnits="userSpaceOnUse" \
patternTransform="rotate(45)"><line class="hatch" x1="0" y1="0" x2="0" y2="8"/></pattern>
<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" \
markerUnits="userSpaceOnUse" orient="auto"><path class="head" d="M0 0 L8 4 L0 8 Z"/></marker>
</defs>"""


def document(title: str, width: float, height: float, body: Iterable[str]) -> str:
    """A whole SVG file of `width` x `height` pixels."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            DEFINITIONS,
            f'<rect class="canvas" width="{width:g}" height="{height:g}"/>',
            *body,
            "</svg>\n",
        ]
    )


def rect(x: float, y: float, width: float, height: float, attributes: str) -> str:
    """A rectangle; `attributes` as they stand in the file."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {attributes}/>'


def text(x: float, y: float, words: str, classes: str) -> str:
    """A line of text, whose baseline begins at (x, y)."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}">{escape(words)}</text>'


def home_colour(slot: int) -> str:
    """The colour of a slot's home, the same in every drawing; neighbours are far apart."""
    red, green, blue = hls_to_rgb((0.58 + 0.381966 * slot) % 1.0, 0.55, 0.52)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
