"""Colours and marks, the same in pictures and page.

Okabe and Ito's colours are told apart with every kind of colour vision ("Color Universal Design",
2008). Some are a shade darker here, so that each has a contrast of 3:1 or more to white and to the
dark page, and they stay apart. Marks tell vector precisions apart without any colour.
"""

from __future__ import annotations

#: Weight precision -> colour; None: that of text, which is black on white and white on black.
COLOURS: dict[str, str | None] = {
    "fp32": "#0072B2",
    "fp16": "#C48700",
    "bf16": "#B64E00",
    "int8": "#009E73",
    "int8-dynamic": "#3A9BD6",
    "int8-static": "#CC79A7",
    "int8-weight-only": None,
    "int4-weight-only": "#6F6F6F",
}
#: Vector precision -> mark of matplotlib, mark of plotly, and a sign for text.
MARKS = {
    "float32": ("o", "circle", "●"),
    "int8": ("s", "square", "■"),
    "int8-symmetric": ("P", "cross", "✚"),
    "int4": ("^", "triangle-up", "▲"),
    "ubinary": ("D", "diamond", "◆"),
    "binary": ("X", "x", "✖"),
}
#: The parts of a file -> colour, in the order of ``SizeParts``.
PARTS = {
    "token table": "#0072B2",
    "layers": "#C48700",
    "tokenizer": "#009E73",
    "other": "#6F6F6F",
}
#: Perceived alike with every kind of colour vision (Nuñez, Anderton and Renslow, 2018).
SCALE = "cividis"
#: Below this share of the scale white is read better than black, and above it black.
SCALE_TURN = 0.47


def literal(text: str) -> str:
    """Return a text as matplotlib shows it as it is: a dollar sign starts no formula."""
    return text.replace("$", r"\$")
