"""The contest of methods on the embedded model: who picks best at the same cost?  `make contest`.

Every method makes one cut entering the middle layer, at three budgets, alone or with a quota for each modality; beside
them stand the paper's plan and published recipes as they are. Rows go to results/toy-world.jsonl (a run that was
interrupted goes on), the chart to results/toy-world.svg.
"""

import sys
import tempfile
from pathlib import Path

from fastav.cli import main
from fastav.plan import Keep, Plan, Share, Step

ROOT = Path(__file__).parents[1]
SHARES = (0.5, 0.25, 0.1)
POOLED = ("last-query", "text-queries", "window", "rollout", "position", "random", "strided", "dart", "divprune")
BALANCED = (
    "last-query",
    "text-queries",
    "window",
    "rollout",
    "random",
    "strided",
    "keep-first",
    "evs",
    "dycoke",
    "vidcom2",
)
LOWEST = ("last-query", "rollout")
RECIPES = ("none", "fastav", "fastav-trim", "fastav-plus", "fastv", "pyramiddrop", "vtw", "snapkv@0.25", "tova@0.25")


def contestants() -> list[Plan]:
    """Plans with one cut entering the middle layer."""
    plans = []
    for share in SHARES:
        kept = Share(share)
        pooled, each = Keep(media=kept), Keep(audio=kept, video=kept)
        plans += [at_middle(method, pooled, f"{method} {share:.0%}") for method in POOLED]
        plans += [at_middle(method, each, f"{method} {share:.0%} each") for method in BALANCED]
        plans += [at_middle(method, pooled, f"lowest {method} {share:.0%}", lowest=True) for method in LOWEST]
    return plans


def at_middle(method: str, keep: Keep, name: str, **options: bool) -> Plan:
    """A plan of one cut."""
    return Plan((Step(layers="middle", method=method, keep=keep, options=options),), name)


def run(arguments: list[str]) -> int:
    """Evaluate, then draw.  arguments: passed on to `fastav eval`, e.g. --limit 400 --jobs 2."""
    rows = str(ROOT / "results" / "toy-world.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        for plan in contestants():
            (Path(folder) / f"{plan.name}.json").write_text(plan.to_json(), encoding="utf-8")
        plans = [part for name in (*RECIPES, folder) for part in ("--plans", name)]
        if code := main(["eval", "tiny", "toy-world", *plans, "--out", rows, *arguments]):
            return code
    return main(["leaderboard", rows, "--out", str(ROOT / "results" / "toy-world.svg")])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
