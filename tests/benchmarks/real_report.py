"""Make the tables and figures of the convergence benchmark on real sets, from the results of its jobs."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from jobs import Job, is_ours

SCORES = ("ap50", "ap", "ap_small")


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return [median, minimum, maximum] over seeds of each score and of the CPU seconds, and the seeds.

    A score is None if a seed does not define it: if no held-out object is small.
    """
    results = [row["result"] for row in rows]
    summary: dict[str, Any] = {name: _range([result[name] for result in results], 4) for name in SCORES}
    return {
        **summary,
        "cpu_s": _range([result["cpu_s"] for result in results], 1),
        "seeds": sorted(row["settings"]["seed"] for row in rows),
        "rate": rows[0]["settings"]["rate"],
    }


def _range(values: Sequence[float | None], digits: int) -> list[float] | None:
    defined = [value for value in values if value is not None]
    if len(defined) < len(values):
        return None
    return [round(value, digits) for value in (median(defined), min(defined), max(defined))]


def figures_of(found: Sequence[tuple[Job, bool, dict[str, Any]]]) -> dict[str, Any]:
    """Return `real` and `rates` of the last line, from jobs, whether their rates were chosen, and their results.

    `peer` is the one of the largest median AP50; it also holds its `name`. `rates` is `default`, `chosen`, or
    `partly chosen`.
    """
    rows: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
    for job, _, row in found:
        rows.setdefault(job.set, {}).setdefault(job.task, {}).setdefault(job.model, []).append(row)
    real: dict[str, Any] = {}
    for name, tasks in rows.items():
        for task, models in tasks.items():
            entry = {model: summarize(seeds) for model, seeds in models.items()}
            peers = {model: summary for model, summary in entry.items() if not is_ours(model) and summary["ap50"]}
            if peers:
                best = max(peers, key=lambda model: peers[model]["ap50"][0])
                entry["peer"] = {"name": best, **peers[best]}
            entry["cpu_s"] = median(row["result"]["cpu_s"] for seeds in models.values() for row in seeds)
            real.setdefault(name, {})[task] = entry
    chosen = {is_chosen for _, is_chosen, _ in found}
    rates = "partly chosen" if len(chosen) > 1 else "chosen" if True in chosen else "default"
    return {"real": real, "rates": rates}


def print_tables(real: dict[str, Any]) -> None:
    """Print one table for each set and task, the best median AP50 first."""
    for name, tasks in real.items():
        for task, entry in tasks.items():
            models = {model: value for model, value in entry.items() if model not in ("peer", "cpu_s")}
            print(f"\n{name}, {task}: median (range) of seeds\n")
            print("| model | AP50 | AP | AP small | CPU s | seeds | rate |")
            print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
            for model in sorted(models, key=lambda model: -(models[model]["ap50"] or [0])[0]):
                row = models[model]
                cells = [_cell(row[score], 3) for score in SCORES]
                cells += [_cell(row["cpu_s"], 0), str(len(row["seeds"])), f"{row['rate']:g}"]
                print(f"| {model} | {' | '.join(cells)} |")
    print()


def _cell(values: list[float] | None, digits: int) -> str:
    if values is None:
        return "-"
    middle, least, most = (f"{value:.{digits}f}" for value in values)
    return middle if least == most else f"{middle} ({least}-{most})"
