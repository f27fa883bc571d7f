"""Results as pictures side by side, and as one self-contained HTML file."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import jinja2
from PIL import Image, ImageDraw, ImageFont

from lrqdit.evaluation.tables import format_value

CELL_PIXELS = 192
_MARGIN, _TEXT, _INK, _PAPER = 8, 15, (20, 20, 20), (255, 255, 255)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px system-ui; margin: 2em }
table { border-collapse: collapse }
td, th { padding: .3em .8em; border: 1px solid #ccc }
</style></head>
<body><h1>{{ title }}</h1>
<table>
<tr>{% for column in columns %}<th>{{ column.replace("_", " ") }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for column in columns %}<td>{{ format(row.get(column)) }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for note in notes %}<p>{{ note }}</p>
{% endfor %}<p><img alt="pictures side by side" src="data:image/png;base64,{{ image }}"></p>
</body></html>
"""


def html_page(title: str, rows: Sequence[dict[str, Any]], picture: Image.Image, notes: Sequence[str] = ()) -> str:
    """One self-contained HTML file: the table, the notes and the picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    values = {"title": title, "rows": rows, "notes": notes, "image": base64.b64encode(buffer.getvalue()).decode()}
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    return page.render(columns=list(rows[0]) if rows else [], format=format_value, **values)


def picture_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], cell_pixels: int = CELL_PIXELS
) -> Image.Image:
    """Pictures side by side, with a label for every row and column.

    Args:
        rows: label and pictures of each row.
        columns: label of each column; long ones are wrapped.
        cell_pixels: side of a cell; small pictures are enlarged by a whole factor without smoothing, large ones shrunk.

    Returns:
        An RGB picture.
    """
    font = ImageFont.load_default(size=_TEXT)
    headings = [_wrap(text, font, cell_pixels) for text in columns]
    line = _TEXT + 4
    top = max((len(lines) for lines in headings), default=0) * line + 2 * _MARGIN
    left = int(max((font.getlength(label) for label, _ in rows), default=0)) + 2 * _MARGIN
    pitch = cell_pixels + _MARGIN
    grid = Image.new("RGB", (left + pitch * len(columns), top + pitch * len(rows)), _PAPER)
    draw = ImageDraw.Draw(grid)
    for x, lines in enumerate(headings):
        for y, text in enumerate(lines):
            draw.text((left + x * pitch, _MARGIN + y * line), text, _INK, font)
    for y, (label, pictures) in enumerate(rows):
        draw.text((_MARGIN, top + y * pitch + (cell_pixels - _TEXT) // 2), label, _INK, font)
        for x, picture in enumerate(pictures):
            cell = _fit(picture.convert("RGB"), cell_pixels)
            corner = (cell_pixels - cell.width) // 2, (cell_pixels - cell.height) // 2
            grid.paste(cell, (left + x * pitch + corner[0], top + y * pitch + corner[1]))
    return grid


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """Enlarge by the largest whole factor that fits, or shrink to fit."""
    factor = side // max(picture.size)
    if factor >= 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Break a text into at most three lines of ``width`` pixels."""
    lines = [""]
    for word in text.split():
        extended = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(extended) > width:
            lines.append(word)
        else:
            lines[-1] = extended
    return [*lines[:2], lines[2] + " ..."] if len(lines) > 3 else lines
