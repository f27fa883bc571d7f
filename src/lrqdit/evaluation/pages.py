"""Results as one self-contained HTML file."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from lrqdit.evaluation.tables import format_value

_CSS = (
    "body{font:15px system-ui;margin:2em}table{border-collapse:collapse}td,th{padding:.3em .8em;border:1px solid #ccc}"
)


def html_page(title: str, rows: Sequence[dict[str, Any]], picture: Image.Image, notes: Sequence[str] = ()) -> str:
    """One self-contained HTML file: the table, the notes and the picture."""
    columns = list(rows[0]) if rows else []
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    cells = ["".join(f"<td>{html.escape(format_value(row.get(column)))}</td>" for column in columns) for row in rows]
    header = "".join(f"<th>{html.escape(column.replace('_', ' '))}</th>" for column in columns)
    title = html.escape(title)
    return "\n".join([
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_CSS}</style></head>',
        f"<body><h1>{title}</h1>",
        f"<table><tr>{header}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>",
        *(f"<p>{html.escape(note)}</p>" for note in notes),
        f'<p><img alt="pictures side by side" src="data:image/png;base64,{image}"></p>',
        "</body></html>",
    ])  # fmt: skip
