"""Results, made readable: tables for the terminal, a labelled picture grid, and one HTML file that holds everything."""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

CELL_PIXELS = 192
_MARGIN, _TEXT, _INK, _PAPER = 8, 15, (20, 20, 20), (255, 255, 255)


def format_value(value: object) -> str:
    """A table cell: four significant digits, thousands separated, a dash for nothing."""
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def build_table(rows: Sequence[dict[str, Any]], columns: Sequence[str], title: str | None = None) -> Table:
    """A terminal table of dictionaries.

    Args:
        rows: one dictionary per row.
        columns: their keys to show, in order; a key's underscores become spaces.
        title: above the table.
    """
    table = Table(title=title)
    for column in columns:
        is_text = all(isinstance(row.get(column), str | None) for row in rows)
        table.add_column(column.replace("_", " "), justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(format_value(row.get(column)) for column in columns))
    return table


def evaluation_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of `lrqdit evaluate`: one row per quantity, original beside quantized."""
    rows: list[dict[str, Any]] = [
        {
            "quantity": name.replace("_", " "),
            "original": results[name]["reference"],
            "quantized": results[name]["candidate"],
        }
        for name in ("true_bits", "file_bytes")
    ]
    for name, value in results["metrics"].items():
        note = results["notes"].get(name)
        rows.append(
            {"quantity": name.replace("_", " "), "original": None, "quantized": note if value is None else value}
        )
    return rows


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
