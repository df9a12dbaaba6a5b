"""README's tables of results, made of experiments/results/*/seed*.json and of what rows.json says of each row.

    python experiments/results/table.py            # prints them
    python experiments/results/table.py --write    # puts them into README.md, between their marks

A row of rows.json names an experiment, whose seeds are its files, and says in words what was trained on what. Metrics,
seeds, dates and commands come from the files alone. `differences` of a table sets each row beside the first.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent
README = RESULTS.parents[1] / "README.md"
HEAD = ("model", "seeds", "recall@10", "ndcg@10", "validation ndcg@10", "command, date")
SPLITS = {"leave_one_out": "leave-one-out", "global_time": "by a moment in time"}


def seeds_of(name: str) -> list[dict[str, Any]]:
    """The results of an experiment, by seed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS / name).glob("seed*.json")]
    if not found:
        raise SystemExit(
            f"table: {RESULTS / name}: has no seed*.json, and rows.json names it; record it first"
        )
    return sorted(found, key=lambda each: int(each["config"]["seed"]))


def mean(values: list[float]) -> str:
    """`0.1234 ± 0.0012`: the mean and, of several seeds, the standard deviation (n - 1)."""
    told = f"{statistics.mean(values):.4f}"
    return f"{told} ± {statistics.stdev(values):.4f}" if len(values) > 1 else told


def row(model: str, seeds: list[dict[str, Any]]) -> list[str]:
    """The cells of an experiment's row."""
    test = [each["test"] for each in seeds]
    date = max(each["date"] for each in seeds)
    command = seeds[0]["command"]
    if together := seeds[0].get("together"):
        numbers = " + ".join(map(str, together))
    else:
        numbers = ", ".join(str(each["config"]["seed"]) for each in seeds)
        command = re.sub(r"(--config\.seed=)\d+", r"\1K", command)
        command = command.replace(f"/seed{seeds[0]['config']['seed']}", "/seedK")
    return [
        model,
        numbers,
        mean([each["recall@10"] for each in test]),
        mean([each["ndcg@10"] for each in test]),
        mean([each["validation"]["ndcg@10"] for each in seeds]),
        f"`{command}`, {date}",
    ]


def difference(seeds: list[dict[str, Any]], first: list[dict[str, Any]]) -> str:
    """`-3.5 %`: ndcg@10 on test beside that of the table's first row, by the mean of the seeds that both have.

    Behind it, of several seeds, the deviation of their differences: what both owe to a seed is no difference. Where the
    first row lacks some of the seeds, those that it has are named.
    """
    if "together" in seeds[0]:
        return ""  # several models beside one
    base = {each["config"]["seed"]: each["test"]["ndcg@10"] for each in first}
    both = [each for each in seeds if each["config"]["seed"] in base]
    if not both:
        return ""
    pairs = [(each["test"]["ndcg@10"], base[each["config"]["seed"]]) for each in both]
    level = statistics.mean(value for _, value in pairs)
    apart = [100 * (value - other) / level for value, other in pairs]
    told = f"{statistics.mean(apart):+.1f}"
    told += f" ± {statistics.stdev(apart):.1f} %" if len(apart) > 1 else " %"
    if len(both) < len(seeds):
        told += f" (seed {', '.join(str(each['config']['seed']) for each in both)})"
    return told


def baseline(name: str, seeds: list[dict[str, Any]]) -> list[str]:
    """The cells of a baseline's row: the same for every seed."""
    numbers = seeds[0]["baselines"][name]
    told = "the best possible (the planted truth)" if name == "oracle" else name.replace("_", " ")
    return [
        told,
        "",
        f"{numbers['recall@10']:.4f}",
        f"{numbers['ndcg@10']:.4f}",
        "",
        "the same `dynrec evaluate`",
    ]


def protocol(group: str, files: list[dict[str, Any]]) -> str:
    """What the numbers of a table mean; ends the program where its files differ in that.

    Whether a model was told the time of the next event may differ, and is said where it does not.
    """
    p = files[0]["protocol"]
    for key in ("split", "filter_seen", "ties", "users", "catalogue", "target_events"):
        if len(found := {str(each["protocol"][key]) for each in files}) > 1:
            raise SystemExit(f"table: {group}: the rows differ in {key}: {', '.join(sorted(found))}")
    told = [
        f"{p['users']:,} users, {p['catalogue']:,} items",
        SPLITS[p["split"]],
        "whole catalogue ranked",
        "seen items masked" if p["filter_seen"] else "seen items ranked",
        f"ties: {p['ties']}",
    ]
    asked = {bool(each["protocol"]["query_time"]) for each in files}
    if len(asked) == 1:
        told.append(f"{'' if asked.pop() else 'not '}told when the next event is asked for")
    return "; ".join(told)


def tables() -> str:
    """All tables, in Markdown."""
    parts = []
    for group in json.loads((RESULTS / "rows.json").read_text(encoding="utf-8")):
        seeds = {each["experiment"]: seeds_of(each["experiment"]) for each in group["rows"]}
        contents = {each["content"] for found in seeds.values() for each in found}
        if len(contents) > 1:
            raise SystemExit(
                f"table: {group['data']}: the rows are of different datasets: {', '.join(contents)}"
            )
        first = next(iter(seeds.values()))
        cells = [list(HEAD)]
        cells += [row(each["model"], seeds[each["experiment"]]) for each in group["rows"]]
        cells += [baseline(name, first) for name in group.get("baselines", [])]
        if group.get("differences"):
            apart = [difference(seeds[each["experiment"]], first) for each in group["rows"][1:]]
            apart += [""] * len(group.get("baselines", []))
            for line, told in zip(cells, ["difference", "", *apart], strict=True):
                line.insert(-1, told)
        lines = [f"| {' | '.join(line)} |" for line in cells]
        lines.insert(1, "|" + " --- |" * len(cells[0]))
        files = [each for found in seeds.values() for each in found]
        title = f"**{group['data']}** ({protocol(group['data'], files)})."
        parts.append("\n".join([" ".join(filter(None, [title, group.get("note", "")])), "", *lines]))
    return "\n\n".join(parts)


def between_marks(text: str, made: str) -> str:
    """README with the tables in their place."""
    start, end = "<!-- results -->", "<!-- end of results -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n\n{made}\n\n{end}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        README.write_text(between_marks(README.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    else:
        sys.stdout.write(tables() + "\n")
