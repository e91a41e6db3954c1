"""
What the scripts that draw share: figures without a display, axes with plain numbers, text tables and CSV.
"""

import csv
import io
from pathlib import Path

from configurator import UserError
from files import write_atomically


def pyplot():
    """matplotlib.pyplot, which then needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save_figure(figure, path: str | Path) -> None:
    """Write a figure, in the format of the path's suffix, and close it. Raises UserError for a bad suffix."""
    path, picture = Path(path), io.BytesIO()
    try:
        figure.savefig(picture, format=path.suffix[1:], dpi=90)
    except ValueError as error:  # matplotlib lists the suffixes it knows
        raise UserError(f"cannot draw {path}: {error}; name the figure FIGURE.png") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, picture.getbuffer())
    pyplot().close(figure)


def log_ticks(axis, subs: tuple = (1, 1.5, 2, 3, 4, 5, 6, 8)) -> None:
    """A log scale on `axis`, an XAxis or YAxis, with plain numbers at these multiples of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def short_number(value: float, position: int | None = None) -> str:
    """4096 -> "4k": powers of two in ticks, which call it with their position."""
    return f"{value / 1024:,.0f}k" if value >= 1024 and value % 1024 == 0 else f"{value:,g}"


def table(heading: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table, as wide as its contents: the first column to the left, the others to the right."""
    cells = [heading, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heading))]
    return ["  ".join(cell.rjust(width) if i else cell.ljust(width)
                      for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells]


def csv_bytes(rows: list[dict]) -> bytes:
    """A CSV file of one row or more with the same keys; nan is an empty cell."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value != value else value for key, value in row.items()} for row in rows)
    return file.getvalue().encode()
