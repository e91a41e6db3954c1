"""
Which optimizer needs fewer steps: the table and the figure, from the val losses that run.sh kept.

    python results/optimizer_study/study.py

Reads streams.txt; writes table.txt and curves.png beside it. A run is OPTIMIZER_LR_sSEED: adamw, muon, muon60
and muon40 (Muon, a schedule of 60% and 40% of the steps) or wsd (Muon); the stream ms is a turn's fastest
step. The best max_lr is that of seed 1. Steps are compared seed by seed: same initial weights, same batches.
"""

import collections
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
NAMES = {"adamw": "AdamW", "muon": "Muon", "muon60": "Muon, 60% of the steps",
         "muon40": "Muon, 40% of the steps", "wsd": "Muon, wsd"}


def read_streams(path):
    """{(optimizer, lr, seed): (steps, val losses)} and {optimizer: each turn's fastest step, ms}."""
    runs, times = collections.defaultdict(list), collections.defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        run, step, stream, value = line.split()
        optimizer, lr, seed = run.split("_")
        if stream == "val":
            runs[optimizer, float(lr), int(seed[1:])].append((int(step), float(value)))
        else:
            times[optimizer].append(float(value))
    return {run: np.array(points).T for run, points in runs.items()}, times


def crossing(steps, losses, goal):
    """The step at which the val loss first is `goal`, on lines between validations; nan if it never is."""
    below = np.flatnonzero(losses <= goal)
    if not below.size:
        return np.nan
    i = below[0]
    return np.interp(goal, losses[[i, i - 1]], steps[[i, i - 1]])


def seed_1(runs, optimizer):
    """[(max_lr, last val loss)] of an optimizer's runs with seed 1, in order of max_lr."""
    return sorted((lr, losses[-1]) for (name, lr, seed), (_, losses) in runs.items()
                  if (name, seed) == (optimizer, 1))


def best_runs(runs):
    """{optimizer: its best max_lr} and {optimizer: its runs at that, seed by seed}."""
    best, chosen = {}, {}
    for name in NAMES:
        if ends := seed_1(runs, name):
            best[name] = min((loss, lr) for lr, loss in ends)[1]
            chosen[name] = [run for key, run in sorted(runs.items()) if key[:2] == (name, best[name])]
    return best, chosen


def make_table(runs, times, best, chosen, crossed):
    lines = ["val loss after the last step, seed 1", f"{'max_lr':>10s}{'AdamW':>10s}{'Muon':>10s}"]
    grids = [dict(seed_1(runs, name)) for name in ("adamw", "muon")]
    for lr in sorted(grids[0] | grids[1]):
        cells = (f"{grid[lr]:10.4f}" if lr in grid else f"{'-':>10s}" for grid in grids)
        lines.append(f"{lr:10g}{''.join(cells)}")

    def add(what, values, digits):
        cells = "".join(f"{value:9.{digits}f}" for value in values)
        if len(values) > 1:
            cells += f"{np.mean(values):12.{digits}f} +- {np.std(values, ddof=1):.{digits}f}"
        lines.append(f"{what:36s}{cells}")

    seeds = "".join(f"{f'seed {i + 1}':>9s}" for i in range(len(crossed)))
    lines += ["", f"{'the best max_lr of each':36s}{seeds}{'mean +- sd':>18s}"]
    for name, mine in chosen.items():
        add(f"{NAMES[name]}, {best[name]:g}", [losses[-1] for _, losses in mine], 4)
    total = chosen["adamw"][0][0][-1]
    add("Muon has AdamW's last loss at step", crossed, 1)
    add(f"the same, of {total:.0f} steps", crossed / total, 3)
    adamw, muon = min(times["adamw"]), min(times["muon"])
    lines += ["", f"fastest step: AdamW {adamw:.1f} ms, Muon {muon:.1f} ms, ratio {muon / adamw:.3f}",
              f"Muon's time to AdamW's last loss, of AdamW's: {np.mean(crossed / total) * muon / adamw:.3f}"]
    return "\n".join(lines) + "\n"


def draw(runs, best, chosen, crossed, path):
    figure, (curves, grid) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=(3, 2))
    for name, color in (("adamw", "C0"), ("muon", "C1")):
        for i, (steps, losses) in enumerate(chosen[name]):
            label = None if i else f"{NAMES[name]}, max_lr {best[name]:g}, {len(chosen[name])} seeds"
            curves.plot(steps, losses, color=color, linewidth=1, marker="o", markersize=2.5, label=label)
        grid.plot(*zip(*seed_1(runs, name)), color=color, marker="o", label=NAMES[name])
    goal = np.mean([losses[-1] for _, losses in chosen["adamw"]])
    step, total = np.mean(crossed), chosen["adamw"][0][0][-1]
    curves.axhline(goal, color="black", linestyle=":", label=f"AdamW's last loss, {goal:.3f}")
    curves.plot(step, goal, color="black", marker="D", linestyle="",
                label=f"Muon has it at step {step:.0f}, {step / total:.2f} of {total:.0f}")
    curves.set(xlabel="optimizer step of 4,096 tokens", ylabel="val loss (nats per token)", ylim=(None, 6.5),
               title="Best max_lr of each")
    grid.set(xlabel="max_lr", ylabel="val loss after the last step", title="The grid, seed 1")
    lrs = sorted({lr for _, lr, seed in runs if seed == 1})
    grid.set_xscale("log", base=2)
    grid.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    for axis in (curves, grid):
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=90)


def main():
    runs, times = read_streams(HERE / "streams.txt")
    best, chosen = best_runs(runs)
    goals = [losses[-1] for _, losses in chosen["adamw"]]
    crossed = np.array([crossing(*run, goal) for run, goal in zip(chosen["muon"], goals)])
    table = make_table(runs, times, best, chosen, crossed)
    (HERE / "table.txt").write_text(table, encoding="utf-8")
    draw(runs, best, chosen, crossed, HERE / "curves.png")
    print(table, end="")


if __name__ == "__main__":
    main()
