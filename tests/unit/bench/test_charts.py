"""Charts: series that belong together look it."""

from __future__ import annotations

from slos_serve.bench.charts import OUR_COLOUR, Chart, Series, plotly_figure


def _lines(series: list[Series]) -> list[tuple[str, str]]:
    chart = Chart(key="k", title="t", x_label="x", y_label="y", series=series)
    return [(trace.line.color, trace.line.dash) for trace in plotly_figure(chart).data]


def test_a_group_has_one_colour_and_its_lines_differ_in_dashes() -> None:
    names = [(scenario, router) for scenario in ("chat", "coding") for router in ("slo", "round-robin", "least-loaded")]
    lines = _lines([Series(f"{s}, {r}", [1, 2], [1.0, 2.0], group=s) for s, r in names])
    colours, dashes = [{colour for colour, _ in part} for part in (lines[:3], lines[3:])], [d for _, d in lines]
    assert all(len(part) == 1 for part in colours) and colours[0] != colours[1]
    assert len(set(dashes[:3])) == 3 and dashes[:3] == dashes[3:]


def test_lines_without_a_group_are_solid_and_ours_has_its_colour() -> None:
    lines = _lines([Series(name, [1, 2], [1.0, 2.0]) for name in ("vllm", "slos-serve:max_draft_tokens=4", "edf")])
    assert len({colour for colour, _ in lines}) == 3 and {dash for _, dash in lines} == {"solid"}
    assert [colour == OUR_COLOUR for colour, _ in lines] == [False, True, False]
