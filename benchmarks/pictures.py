"""The pictures of docs/scheduling.md, one an idea, each drawn from what the code itself answers.

python -m benchmarks.pictures [--output docs/pictures]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slos_serve.bench.plots import STYLE
from slos_serve.core.plan import EngineView, Reason, StepPlan
from slos_serve.core.slo import SLO, single_stage
from slos_serve.perf.lengths import EDGES, LengthForecast, forecast_lengths
from slos_serve.planning.demand import SIZES, build_demand, is_lost
from slos_serve.planning.memory import forecast
from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from slos_serve.planning.speculation import rate_of, table_of_lengths
from slos_serve.planning.state import FloatArray, peak_blocks
from slos_serve.planning.supply import MOMENT_TOKENS, rate_beside
from slos_serve.planning.tiers import Tiers
from slos_serve.policies.slos_serve import SLOsServePolicy
from slos_serve.sim.cluster import Cluster
from slos_serve.sim.drafters import with_drafter
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.limits import ReplicaSettings
from slos_serve.sim.profiles import find_profile, limits_of
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.sim.routers import make_router
from slos_serve.workload.calls import Workload, empty_calls
from slos_serve.workload.scenarios import make_workload
from tests.builders import EngineBuilder

PROFILE = "opt-13b-a100"
OURS, GREY, WARM, GREEN = "#1f6fb4", "#9a9a9a", "#c8442b", "#3a8f5c"


def lengths(axes: Axes) -> None:
    """What is forecast for an answer that has got so far, beside how often answers get there."""
    answers = make_workload("chat", 1.0, 4000, seed=1).calls["output_tokens"]
    learnt = LengthForecast(1, PlannerSettings().length_quantile)
    for tokens in answers:
        learnt.observe(0, int(tokens))
    shown = EDGES <= 1024
    axes.plot(EDGES[shown], learnt.table()[0][shown], color=OURS, label="forecast: 70 % of such answers end by here")
    axes.plot([0, 1024], [0, 1024], color=GREY, linewidth=0.8, linestyle=":", label="it ends now")
    axes.set_xlabel("tokens generated so far")
    axes.set_ylabel("length of the whole answer, tokens")
    share = axes.twinx()
    share.plot(EDGES[shown], 100.0 * learnt.survival()[0][:-1][shown], color=WARM, linewidth=1.0)
    share.set_ylabel("answers that get that far, %", color=WARM)
    share.set_ylim(0, 100)
    axes.legend(loc="lower right")
    axes.set_title("The longer an answer already is, the longer it will be (chat)")


def lost(axes: Axes) -> None:
    """Until when a waiting prompt can still make its first token, and when that is due."""
    model = find_profile(PROFILE).model
    prompts = np.arange(50, 4001, 50)
    alone_s = np.array([model.zero_load_s(int(tokens)) for tokens in prompts])
    due_s = np.maximum(3.0 * alone_s, 0.2)
    latest_s = np.array([_latest_s(model.coefficients, int(p), float(d)) for p, d in zip(prompts, due_s, strict=True)])
    axes.fill_between(prompts, 0.0, latest_s, color=OURS, alpha=0.15, label="can still be promised")
    axes.fill_between(prompts, latest_s, due_s, color=WARM, alpha=0.15, label="lost: best effort from here on")
    axes.plot(prompts, due_s, color="black", linewidth=1.0, label="first token due (3 times the prompt alone)")
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("seconds after arrival")
    axes.set_xlim(0, 4000)
    axes.set_ylim(0, None)
    axes.legend(loc="upper left")
    axes.set_title("A prompt is given up as soon as it cannot make it even alone")


def _latest_s(coefficients: FloatArray, prompt_tokens: int, due_s: float) -> float:
    low, high = 0.0, due_s
    while high - low > 1e-4:
        middle = 0.5 * (low + high)
        engine = EngineBuilder()
        slot = engine.wait(prompt_tokens, due_in_s=due_s)
        state = engine.state()._replace(now_s=engine.now_s + middle, coefficients=coefficients)
        given_up = is_lost(state, slot)
        low, high = (low, middle) if given_up else (middle, high)
    return low


def admission(axes: Axes) -> None:
    """Prefill budget over time under what the program takes, and what each prompt asks of it."""
    engine = EngineBuilder(total_blocks=20_000)
    for number in range(40):
        engine.decode(prompt_tokens=400, output_tokens=20 + number, max_tokens=400, ahead_s=0.02)
    for prompt, due_in_s in ((900, 0.4), (2600, 0.7), (700, 0.8), (500, 1.0), (1500, 1.2), (3000, 1.4), (800, 1.7)):
        engine.wait(prompt, due_in_s=due_in_s, max_tokens=400)
    model = find_profile(PROFILE).model
    planner, state = Planner(model, 1), engine.state(model=model)
    demand, supply, found, *_ = planner.ask_now(state)
    counts = supply.counts.copy()
    at_s, spent = 0.0, 0.0
    budget, line = 0.0, [(0.0, 0.0)]
    for number, slot in enumerate(demand.slots):
        rate = rate_beside(counts, supply)
        due_s = float(demand.due_s[number]) - engine.now_s
        budget += rate * (due_s - at_s)
        at_s = due_s
        line.append((at_s, budget))
        cost = float(demand.tokens[number])
        if found.taken[number]:
            axes.bar(due_s, cost, 0.035, bottom=spent, color=OURS)
            spent += cost
            counts[demand.tier[number]] += 1.0
        else:
            axes.bar(due_s, cost, 0.035, bottom=spent, color="none", edgecolor=WARM, linestyle="--")
        text = f"{int(engine.table.rows['prompt_tokens'][slot])}"
        axes.annotate(text, (due_s, spent), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    axes.plot(*np.array(line).T, color="black", linewidth=1.0, label="prefill budget beside the decodes")
    axes.bar([0], [0], 0.0, color=OURS, label="taken, on top of those due before")
    axes.bar([0], [0], 0.0, color="none", edgecolor=WARM, linestyle="--", label="passed over: a later one would miss")
    axes.set_xlabel("first token due, seconds from now")
    axes.set_ylabel("prefill tokens, attention counted in")
    axes.set_ylim(0, None)
    axes.legend(loc="upper left")
    axes.set_title(f"{int(found.taken.sum())} of {len(demand.slots)} prompts fit under the budget at every deadline")


def memory(axes: Axes) -> None:
    """KV that promises will hold over time, beside the sum of their peaks."""
    engine = EngineBuilder(total_blocks=4000)
    random = np.random.default_rng(3)
    load = make_workload("chat", 1.0, 4000, seed=1).calls
    learnt = LengthForecast(1)
    for tokens in load["output_tokens"]:
        learnt.observe(0, int(tokens))
    for prompt, whole in zip(load["prompt_tokens"][:60], load["output_tokens"][:60], strict=True):
        engine.decode(prompt_tokens=int(prompt), output_tokens=int(1 + whole * random.random() * 0.9), max_tokens=1024)
    rows, running = engine.table.rows, np.array(engine.running)
    forecast_lengths(rows, running, learnt.table())
    state = engine.state()
    demand = build_demand(state, state.waiting, np.array([0.1]), 30.0, 0.0, np.zeros((2, SIZES)))
    # With a cache of no size every moment is short of room, so all of them are answered.
    _, room, _ = forecast(state, demand, 0.1, learnt.survival(), 0)
    peak = sum(peak_blocks(rows, slot, state.block_size) for slot in running)
    held = sum(-(-int(rows["computed_tokens"][slot]) // 16) for slot in running)
    at_s = 0.1 * MOMENT_TOKENS
    axes.plot(
        at_s[: len(room)], -room, color=OURS, marker="o", markersize=4, label="forecast, a standard deviation added"
    )
    axes.axhline(peak, color=WARM, linewidth=1.0, label="sum of forecast peaks")
    axes.axhline(held, color=GREY, linewidth=1.0, linestyle=":", label="held now")
    axes.set_xlabel("seconds from now, every decode at its TPOT of 100 ms")
    axes.set_ylabel("KV blocks of 60 promised decodes")
    axes.set_ylim(0, None)
    axes.legend(loc="lower left")
    axes.set_title("Most answers end before the longest have grown")


# What is in a step: its reason and colour.
KINDS = {
    "decodes that are due": (Reason.DECODE_DUE, OURS),
    "decodes that could wait": (Reason.DECODE_EARLY, "#8fbce0"),
    "promised prompts": (Reason.PREFILL_DEADLINE, GREEN),
    "best effort": (Reason.BEST_EFFORT, "#d9b382"),
}
HELD = "decodes held for a later step"


class Watched(SLOsServePolicy):
    """The policy, and what it planned: start, predicted seconds, tokens by what they are."""

    steps: list[tuple[float, float, dict[str, int]]]

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """As the policy does, noted."""
        step = super().plan(now_s, view)
        tokens = {name: int(step.tokens[step.reasons == reason].sum()) for name, (reason, _) in KINDS.items()}
        tokens[HELD] = len(step.held)
        self.steps.append((now_s, step.predicted_s, tokens))
        return step


def batches(axes: Axes) -> None:
    """Steps of a loaded engine, as wide as they last: what is in them."""
    profile = find_profile(PROFILE)
    load = make_workload("mixed", 2.4, 120, seed=2, arrivals="poisson").bound(profile.model)
    recording = Recording.of(load)
    policy = Watched(profile.model, len(load.classes))
    policy.steps = []
    replica = Replica(0, policy, profile.model, limits_of(profile), recording, ReplicaSettings())
    Cluster(recording, [replica], make_router("round-robin")).run()
    holding = [start_s for start_s, _, tokens in policy.steps if tokens[HELD] > 0 and tokens["promised prompts"] > 0]
    begin_s = max(holding, key=lambda at_s: sum(at_s <= other < at_s + 1.5 for other in holding))
    shown = [step for step in policy.steps if begin_s <= step[0] < begin_s + 1.5]
    for start_s, step_s, tokens in shown:
        bottom = 0.0
        for name, (_, color) in KINDS.items():
            width_s = 0.92 * step_s
            axes.bar(start_s - begin_s, tokens[name], width_s, bottom=bottom, align="edge", color=color)
            bottom += tokens[name]
        if tokens[HELD]:
            at = (start_s - begin_s + 0.46 * step_s, bottom)
            axes.annotate(f"{tokens[HELD]}", at, (0, 2), textcoords="offset points", ha="center", fontsize=7)
    for name, (_, color) in KINDS.items():
        axes.bar([0], [0], 0.0, color=color, label=name)
    axes.plot([], [], linestyle="none", marker="$12$", color="black", label=HELD)
    axes.set_xlabel("seconds; a bar is a step, as wide as it lasts")
    axes.set_ylabel("tokens in the step")
    axes.set_ylim(0, 1.6 * max(sum(tokens[name] for name in KINDS) for _, _, tokens in shown))
    axes.legend(loc="upper left", ncols=2)
    axes.set_title("Decodes that can wait are held, and their room goes to prompts")


def drafts(axes: Axes) -> None:
    """Prefill rate beside 40 decodes by draft length and acceptance."""
    profile = with_drafter(find_profile(PROFILE), "opt-125m")
    model = profile.model
    pace_s, extra_s = np.array([0.095]), np.array([model.k_ctx_s * 700.0 + model.k_seq_s])
    counts = np.array([40.0])
    for acceptance, color in ((0.9, GREEN), (0.7, OURS), (0.5, "#8fbce0"), (0.11, WARM)):
        tiers = Tiers(pace_s, counts, counts, counts, counts, extra_s, np.array([acceptance]))
        table = table_of_lengths(pace_s, tiers, 10, 0.14, model.k_seq_s)
        rates = [rate_of(np.array([draft]), counts, table, model.coefficients, 2048.0) for draft in range(11)]
        best = int(np.argmax(rates))
        axes.plot(range(11), rates, color=color, label=f"a draft token is right {100 * acceptance:.0f} % of the time")
        axes.plot(best, rates[best], "o", color=color)
    axes.set_xlabel("draft length")
    axes.set_ylabel("prefill tokens a second beside 40 decodes")
    axes.legend(loc="lower left")
    axes.set_title("Drafts are made where they leave more room for prompts (dots: the length chosen)")


def turns(axes: Axes) -> None:
    """Best-effort requests that have ended while overload lasts, with and without turns."""
    profile = find_profile(PROFILE)
    chat = make_workload("chat", 5.0, 600, seed=1, arrivals="poisson")
    free = empty_calls(12)
    free["arrival_s"] = 5.0
    free["prompt_tokens"], free["output_tokens"], free["max_tokens"] = 400, 60, 60
    free["first_stage_tokens"], free["class_index"] = 60, 1
    calls = np.concatenate((chat.calls, free))
    calls["session"] = np.arange(len(calls))
    load = Workload("overload", (*chat.classes, single_stage("batch", SLO())), calls)
    last_s = float(chat.calls["arrival_s"].max())
    for aging_s, color, label in ((10.0, OURS, "a turn every 10 s"), (0.0, GREY, "no turns")):
        settings = SimSettings(policy="slos-serve", parameters={"aging_s": aging_s})
        recording = simulate(load, profile.model, limits_of(profile, prefix_cache=False), settings)
        ended = np.sort(recording.calls["done_s"][len(chat.calls) :])
        ended = ended[ended <= last_s]
        axes.step([0.0, *ended, last_s], [*range(len(ended) + 1), len(ended)], where="post", color=color, label=label)
    axes.set_xlabel("seconds; chat takes twice what fits")
    axes.set_ylabel("best-effort requests ended, of 12")
    axes.set_ylim(0, 12.5)
    axes.legend(loc="upper left")
    axes.set_title("The oldest request without a promise goes on while overload lasts")


PICTURES: dict[str, Callable[[Axes], None]] = {
    "lengths": lengths,
    "lost": lost,
    "admission": admission,
    "memory": memory,
    "batches": batches,
    "drafts": drafts,
    "turns": turns,
}


def main() -> None:
    """Draw them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "pictures")
    parser.add_argument("--only", choices=sorted(PICTURES), action="append")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context():
        mpl.rcParams.update(STYLE | {"legend.frameon": False})
        for name in given.only or PICTURES:
            figure = Figure(figsize=(7.2, 3.4), layout="constrained")
            PICTURES[name](figure.add_subplot())
            figure.savefig(given.output / f"{name}.png")
            print(given.output / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
