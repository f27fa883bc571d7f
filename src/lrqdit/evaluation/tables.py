"""Results as tables for the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table


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
