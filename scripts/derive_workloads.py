"""Derives the shipped length tables and arrival parameters from the original trace files.

    python scripts/derive_workloads.py --data FOLDER

FOLDER holds azure_llm_2023_conv.csv, azure_llm_2023_code.csv, arxiv_summarization_lengths.csv,
servegen_deepseek_r1_draws.csv and servegen_deepseek_r1_arrivals.csv; docs/workloads.md says where each is published.
Writes one JSON file a table to
src/slos_serve/workload/tables/.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slos_serve.workload.lengths import PROBABILITIES
from slos_serve.workload.trace_files import read_trace

TABLES = Path(__file__).resolve().parent.parent / "src" / "slos_serve" / "workload" / "tables"
BURST_GAP_S = 0.15
PEAK_WINDOWS_S = (1.0, 10.0, 60.0)
Floats = NDArray[np.float64]


def main() -> None:
    """Write every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data: Path = parser.parse_args().data
    for name in ("conv", "code"):
        path = data / f"azure_llm_2023_{name}.csv"
        trace = read_trace(path)
        times = np.array([request.arrival_s for request in trace])
        prompts = np.array([request.prompt_tokens for request in trace], dtype=float)
        outputs = np.array([request.output_tokens for request in trace], dtype=float)
        source = f"Azure LLM inference trace 2023, {name} (CC-BY 4.0; Splitwise, ISCA 2024), {len(trace)} requests"
        write(f"azure_{name}_lengths", lengths(source, prompt_tokens=prompts, output_tokens=outputs))
        write(f"azure_{name}_arrivals", {"source": source, **arrival_figures(times), **arrival_parameters(name, times)})
    rows = read_columns(data / "arxiv_summarization_lengths.csv", "num_prefill_tokens", "num_decode_tokens")
    rows = rows[rows[:, 1] <= rows[:, 0]]
    source = f"arXiv summarization lengths (MIT; Vidur), {len(rows)} rows, those with output > input dropped"
    write("arxiv_lengths", lengths(source, prompt_tokens=rows[:, 0], output_tokens=rows[:, 1]))
    rows = read_columns(data / "servegen_deepseek_r1_draws.csv", "input_tokens", "reasoning_tokens", "answer_tokens")
    source = f"DeepSeek-R1 requests drawn with ServeGen (Apache-2.0), {len(rows)} rows"
    columns = {"prompt_tokens": rows[:, 0], "reasoning_tokens": rows[:, 1], "answer_tokens": rows[:, 2]}
    write("reasoning_lengths", lengths(source, **{name: np.maximum(column, 1) for name, column in columns.items()}))
    rates = read_columns(data / "servegen_deepseek_r1_arrivals.csv", "total_rate_rps")[:, 0]
    source = f"DeepSeek-R1 requests of ServeGen (Apache-2.0): rate in {len(rates)} windows of ten minutes"
    relative = [round(float(rate), 4) for rate in rates / rates.mean()]
    write("day_arrivals", {"source": source, "mean_rps": round(float(rates.mean()), 3), "relative_rate": relative})


def lengths(source: str, **columns: Floats) -> dict[str, object]:
    """Quantiles of each column and the rank correlations between them."""
    ranks = np.array([np.argsort(np.argsort(column, kind="stable"), kind="stable") for column in columns.values()])
    return {
        "source": source,
        "columns": list(columns),
        "mean": {name: round(float(column.mean()), 1) for name, column in columns.items()},
        "rank_correlation": np.round(np.corrcoef(ranks), 3).tolist(),
        "quantiles": {name: rounded(np.quantile(column, PROBABILITIES)) for name, column in columns.items()},
    }


def arrival_figures(times: Floats) -> dict[str, float]:
    """What generated arrivals are held to."""
    gaps = np.diff(times)
    figures = {"rate_rps": len(gaps) / times[-1], "cv": gaps.std() / gaps.mean()}
    for window in PEAK_WINDOWS_S:
        counts = np.histogram(times, np.arange(0.0, times[-1] + window, window))[0]
        figures[f"peak_to_mean_{window:g}s"] = counts.max() / (len(times) * window / times[-1])
    return {name: round(float(value), 4) for name, value in figures.items()}


def arrival_parameters(name: str, times: Floats) -> dict[str, object]:
    """Bursts for the on/off trace, slow drift of the rate for the other."""
    if name == "code":
        return {"process": "on-off", "burst_gap_s": BURST_GAP_S, **burst_tables(times)}
    counts = np.histogram(times, np.arange(0.0, times[-1], 10.0))[0].astype(float)
    mean = counts.mean()
    variance = (counts.var() - mean) / mean**2  # Poisson noise taken out
    lags = np.arange(1, 31)
    covariance = np.array([np.mean((counts[:-lag] - mean) * (counts[lag:] - mean)) for lag in lags]) / mean**2
    decay_s = -10.0 / np.polyfit(lags, np.log(np.maximum(covariance, 1e-6) / variance), 1)[0]
    return {"process": "drift", "sigma": round(float(np.sqrt(variance)), 4), "decay_s": round(float(decay_s), 1)}


def burst_tables(times: Floats) -> dict[str, object]:
    """Size, mean gap and following silence of each burst, in order, and quantiles of gaps relative to their mean.

    Bursts come in order because neighbours resemble each other; the generator draws short runs of them.
    """
    gaps = np.diff(times)
    breaks = np.flatnonzero(gaps > BURST_GAP_S)
    starts, ends = np.concatenate(([0], breaks + 1)), np.concatenate((breaks, [len(times) - 1]))
    sizes = ends - starts + 1
    mean_gaps = (times[ends] - times[starts]) / np.maximum(sizes - 1, 1)
    owner = np.searchsorted(starts, np.arange(len(gaps)), side="right") - 1
    inside = gaps <= BURST_GAP_S
    relative = gaps[inside] / np.maximum(mean_gaps[owner[inside]], 1e-9)
    return {
        "burst_size": sizes.tolist(),
        "mean_gap_s": rounded(mean_gaps, 4),
        "silence_s": rounded(np.append(gaps[breaks], gaps[breaks].mean()), 2),
        "relative_gap": rounded(np.quantile(relative, PROBABILITIES), 4),
    }


def read_columns(path: Path, *names: str) -> Floats:
    """float64 [rows, names]."""
    with path.open(encoding="utf-8", newline="") as file:
        return np.array([[float(row[name]) for name in names] for row in csv.DictReader(file)])


def rounded(values: Floats, digits: int = 1) -> list[float]:
    """Short enough to ship."""
    return [round(float(value), digits) for value in values]


def write(name: str, table: dict[str, object]) -> None:
    """One table, keys on lines of their own."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items()]
    (TABLES / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(
        f"{name}: {', '.join(f'{key} {value}' for key, value in table.items() if not isinstance(value, (list, dict)))}"
    )


if __name__ == "__main__":
    main()
