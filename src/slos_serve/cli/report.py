"""``slos-serve report``: one page and PNG files from simulation results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from slos_serve.cli.printed import failure, output_file
from slos_serve.cli.sim_options import console
from slos_serve.core.errors import InvalidFieldError, SlosServeError


def report(
    results: Annotated[list[Path], typer.Argument(help="JSON that capacity or simulate wrote; runs are overlaid.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="Page to write; default: beside the result.", callback=output_file)
    ] = None,
) -> None:
    """Write one self-contained HTML page, and beside it a PNG file for every chart."""
    from slos_serve.bench.charts import png_bytes
    from slos_serve.bench.sim_report import charts_of, page

    try:
        rows: list[Any] = []
        for path in results:
            found = _read(path)
            rows += found if isinstance(found, list) else [found]
        charts = charts_of(rows, str(results[0]))
    except SlosServeError as fault:
        raise failure(fault) from fault
    target = output or results[0].with_suffix(".html")
    target.write_text(page(target.stem, charts, rows), encoding="utf-8")
    pictures = [target.with_name(f"{target.stem}-{chart.key}.png") for chart in charts]
    for chart, picture in zip(charts, pictures, strict=True):
        picture.write_bytes(png_bytes(chart))
    console.print(f"wrote {target} and {len(pictures)} PNG files beside it", highlight=False)


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise InvalidFieldError("result", str(path), "an existing file") from fault
    except ValueError as fault:
        raise InvalidFieldError("result", str(path), f"a JSON file ({fault})") from fault
