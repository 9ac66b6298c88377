"""What came out of conversations, as a markdown table: one line for each arrangement of servers."""

from collections import Counter
from collections.abc import Mapping, Sequence

from benchmark.load import percentile
from benchmark.players import Outcome, Turn

ONE = "one server"
ORACLE = "oracle"
ROUND_ROBIN = "round-robin"


def table(outcomes: Mapping[str, Sequence[Outcome]], *, restarted: bool) -> str:
    """Rounds are pooled. After a restart, the oracle is what caches can give: one server alone would have lost all."""
    reference = ORACLE if restarted else ONE
    heads = (
        *("", "cached share", f"of {reference}'s", "first turns, TTFT p50", "p90"),
        *(
            "later turns, TTFT p50",
            "p90",
            f"of {ROUND_ROBIN}'s p90",
            "busiest / mean",
            "errors",
            "wall time",
            "CPU of others",
        ),
    )
    lines = [f"| {' | '.join(heads)} |".replace("|  |", "| |"), "|---|" + "---:|" * (len(heads) - 1)]
    best = cached_share(outcomes.get(reference, []))
    worst_p90_s = percentile(ttfts_s(outcomes.get(ROUND_ROBIN, []), first=False), 0.9)
    for name, runs in outcomes.items():
        first_s, later_s = ttfts_s(runs, first=True), ttfts_s(runs, first=False)
        cells = (
            *(name, f"{cached_share(runs):.3f}", _ratio(cached_share(runs), best, 3)),
            *(_ms(first_s, 0.5), _ms(first_s, 0.9), _ms(later_s, 0.5), _ms(later_s, 0.9)),
            _ratio(percentile(later_s, 0.9), worst_p90_s, 2),
            f"{max(map(busiest, runs)):.2f}",
            f"{sum(run.errors.total() for run in runs):,}",
            f"{sum(run.wall_s for run in runs) / len(runs):.1f} s",
            f"{max(run.others_share for run in runs):.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    lines = [
        "Cached share: prompt tokens that servers took from their caches, of all prompt tokens. TTFT: from sending, "
        "connecting included, to the first text. Busiest / mean: answers of the busiest server, the worst round. "
        "CPU of others: the machine's share that other processes and the host took, the worst round.",
    ]
    for name, runs in outcomes.items():
        routes: Counter[str] = sum((run.routes for run in runs), Counter())
        del routes[""]
        if routes:
            told = ", ".join(f"{route} {count:,}" for route, count in routes.most_common())
            lines.append(f"{name}: routes {told}")
        errors: Counter[str] = sum((run.errors for run in runs), Counter())
        lines += [f"{name}: {count:,} × {reason}" for reason, count in errors.most_common()]
    return "\n".join(f"- {line}" for line in lines)


def cached_share(runs: Sequence[Outcome]) -> float:
    turns = _turns(runs)
    prompt_tokens = sum(turn.prompt_tokens for turn in turns)
    return sum(turn.cached_tokens for turn in turns) / prompt_tokens if prompt_tokens else 0.0


def ttfts_s(runs: Sequence[Outcome], *, first: bool) -> list[float]:
    return [turn.ttft_s for turn in _turns(runs) if (turn.number == 0) is first]


def busiest(run: Outcome) -> float:
    """The answers of the busiest server, over the mean of all servers."""
    counts = Counter(turn.server for turn in run.turns)
    return max(counts.values(), default=0) * run.servers / len(run.turns) if run.turns else 0.0


def _turns(runs: Sequence[Outcome]) -> list[Turn]:
    return [turn for run in runs for turn in run.turns]


def _ms(seconds: list[float], share: float) -> str:
    return f"{percentile(seconds, share) * 1e3:,.0f} ms" if seconds else "–"


def _ratio(value: float, base: float, digits: int) -> str:
    return f"{value / base:.{digits}f}×" if base else "–"
