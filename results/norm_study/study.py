"""
Pre-LN against Post-LN: the table and the figure, from what run.py kept of its runs.

    python results/norm_study/study.py                             # of the runs that RESULTS.md speaks of
    python results/norm_study/study.py --folder=log_norm_study     # of your own

Reads the folder's streams.txt, a piece of a log per line: `run stream first_step step_interval values`. Runs
are NORM_lrMAX_wWARMUP_sSEED, and NORM_depthLAYERS_sSEED of one step. Writes table.txt, runs.csv and
figure.png beside it, anew.

A run is judged by last_loss: its mean train loss over the last 100 steps, which is a loss on text not seen
before where a run is less than one epoch. It has diverged if it gave up (its val loss, or max_bad_steps steps
in a row, were not finite). It is stuck if it has not, but last_loss is less than 0.1 nats below a unigram
model's loss on train text: then it has learned little but how frequent each id is.

A spike is a rise of a run's train loss that the other runs do not share. Runs of one seed see the same
batches, and some batches are harder. So of each run's loss at a step, less its median over the 32 steps
before, is taken the median of that over the runs of the seed (where at least three are left; of two, neither
says which is usual). What remains is a spike if it is above 1 nat and above 6 robust deviations of the run
(1.4826 times the median distance of its 32 losses before from their median). Steps in a row are one spike,
and the first 32 steps have none.
"""

import csv
import io
import json
import math
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import PathName, UserError, configure
from files import write_atomically
from plot_log import parse_log, smooth
from shards import TokenStream

matplotlib.use("Agg")
import matplotlib.pyplot as plt

folder: PathName = str(Path(__file__).parent)  # where streams.txt is, and where the results go

LAST = 100  # steps whose mean train loss a run is judged by
MARGIN = 0.1  # nats below a unigram model's loss, by which a run has learned something
WINDOW, DEVIATIONS, LEAST = 32, 6.0, 1.0  # of a spike: steps, robust deviations, nats
NAMES = {"pre": "Pre-LN", "post": "Post-LN"}
COLORS = {"pre": "C0", "post": "C1"}
STYLES = ("--", "-", ":", "-.")  # of the warm-ups, in order
KEPT = 6  # of each block's gradient norms: so many from the start, and so many from the rest


# ---- what is kept of the logs


def pieces(steps, values):
    """(first step, step interval, values) of stretches whose steps are equally far apart."""
    while steps:
        every = steps[1] - steps[0] if len(steps) > 1 else 1
        n = next((i for i, step in enumerate(steps) if step != steps[0] + i * every), len(steps))
        yield steps[0], every, values[:n]
        steps, values = steps[n:], values[n:]


def unigram_loss(data_dir):
    """Loss of a unigram model on train text: the entropy of the ids' frequencies in the first 2**24 tokens or
    all, which it has both seen and to predict."""
    stream = TokenStream(data_dir, "train")
    counts = np.bincount(stream.read(0, min(len(stream), 2**24)))
    shares = counts[counts > 0] / counts.sum()
    return -(shares * np.log(shares)).sum()


def collect(log_dir, runs):
    """The text of streams.txt: train losses with 4 digits, some of the blocks' gradient norms with 3."""
    lines, unigrams = [], {}
    for run in runs:
        *_, start = (log_dir / run / "runs.jsonl").read_text(encoding="utf-8").splitlines()
        data_dir = json.loads(start)["config"]["data_dir"]
        if data_dir not in unigrams:
            unigrams[data_dir] = unigram_loss(data_dir)
        streams = {"unigram_train": {0: unigrams[data_dir]}, **parse_log(log_dir / run / "log.txt")}
        for stream, points in streams.items():
            block = stream.startswith("norm_h")
            if not block and stream not in ("train", "val", "unigram", "unigram_train", "skipped"):
                continue
            steps, digits = sorted(points), 4 if stream == "train" else 6
            if block:
                rest, digits = steps[KEPT:-1], 3
                steps = steps[:KEPT] + rest[::math.ceil(len(rest) / KEPT) or 1] + steps[KEPT:][-1:]
            for first, every, values in pieces(steps, [points[step] for step in steps]):
                text = " ".join(f"{value:.{digits}g}" for value in values)
                lines.append(f"{run} {stream} {first} {every} {text}\n")
    return "".join(lines)


def read_streams(path):
    """{run: {stream: (steps, values)}}, two arrays each."""
    if not path.exists():
        raise UserError(f"folder={path.parent}: no streams.txt there; make experiment-norm makes one, in "
                        f"log_norm_study")
    runs = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        run, stream, first, every, *values = line.split()
        steps = int(first) + int(every) * np.arange(len(values))
        before = runs.setdefault(run, {}).get(stream, ((), ()))
        runs[run][stream] = np.append(before[0], steps).astype(int), np.append(before[1], np.float64(values))
    return runs


# ---- what is counted


def last_loss(losses):
    """Mean of the last 100 train losses, without those that are not finite; nan if none is."""
    last = np.asarray(losses, dtype=float)[-LAST:]
    last = last[np.isfinite(last)]
    return float(np.mean(last)) if last.size else math.nan


def is_stuck(loss, unigram):
    """Whether a run with this last_loss is stuck, as the docstring defines it; one that diverged is not."""
    return loss > unigram - MARGIN


def excess(losses):
    """What each of a run's train losses (steps,) is above the median of the 32 before, and the robust
    deviation of those: two (steps,), nan where there is nothing to compare."""
    above, deviations = np.full((2, len(losses)), np.nan)
    for step in range(WINDOW, len(losses)):
        past = losses[step - WINDOW:step]
        past = past[np.isfinite(past)]
        if past.size and np.isfinite(losses[step]):
            above[step] = losses[step] - np.median(past)
            deviations[step] = 1.4826 * np.median(np.abs(past - np.median(past)))
    return above, deviations


def spikes(losses):
    """{run: first steps of its spikes}, as the docstring defines them, of the runs of one seed: {run: its
    train losses, (steps,)}. Runs that gave up are shorter; steps that are not finite are none."""
    length = max(len(mine) for mine in losses.values())
    measured = {run: excess(np.pad(mine, (0, length - len(mine)), constant_values=np.nan))
                for run, mine in losses.items()}
    above = np.array([mine for mine, _ in measured.values()])
    enough = np.isfinite(above).sum(axis=0) >= 3
    common = np.zeros(length)
    common[enough] = np.nanmedian(above[:, enough], axis=0)
    found = {}
    for run, (mine, deviations) in measured.items():
        high = mine - common > np.maximum(DEVIATIONS * deviations, LEAST)
        found[run] = np.flatnonzero(high & ~np.append(False, high[:-1])).tolist()
    return found


def layer_norms(streams, index):
    """(n_layer,) gradient norm of each block at the index-th of the kept steps."""
    layers = sum(stream.startswith("norm_h") for stream in streams)
    return np.array([streams[f"norm_h{layer}"][1][index] for layer in range(layers)])


def judge(runs):
    """[{column: value}] of the training runs, and {(norm, n_layer): (seeds, n_layer)} of all, the gradient
    norms of the blocks at initialisation."""
    rows, starts = [], {}
    for run, streams in runs.items():
        norm, seed = run.split("_")[0], int(run.split("_s")[1])
        start = layer_norms(streams, 0)
        if len(start):
            starts.setdefault((norm, len(start)), {})[seed] = start  # the same at each rate
        parts = re.fullmatch(r"\w+_lr([-+.e\d]+)_w(\d+)_s\d+", run)
        if parts:
            steps, val = streams.get("val", ([-1], [math.nan]))
            last = int(streams["train"][0][-1]) + 1
            diverged = not (steps[-1] == last and math.isfinite(val[-1]))  # who gave up has none at the end
            loss = math.nan if diverged else last_loss(streams["train"][1])
            first, final = (start[0], start[-1]) if len(start) else (math.nan, math.nan)
            rows.append({
                "run": run, "norm": norm, "max_lr": float(parts[1]), "warmup_steps": int(parts[2]),
                "seed": seed, "steps": last, "last_loss": loss, "diverged": diverged,
                "stuck": is_stuck(loss, streams["unigram_train"][1][0]), "spikes": 0,
                "skipped": int(streams["skipped"][1][-1]) if "skipped" in streams else 0,
                "norm_first_block": first, "norm_last_block": final})
    for seed in {row["seed"] for row in rows}:
        mine = [row for row in rows if row["seed"] == seed]
        counted = spikes({row["run"]: runs[row["run"]]["train"][1] for row in mine})
        for row in mine:
            row["spikes"] = len(counted[row["run"]])
    return rows, {key: np.array([mine[seed] for seed in sorted(mine)]) for key, mine in starts.items()}


# ---- table and figure


def spread(values, digits=4):
    """Mean and standard deviation as text; of one value, the value."""
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def slope(starts, norm):
    """d log(gradient norm of the last block) / d log(n_layer) at initialisation, by least squares."""
    depths = sorted(depth for name, depth in starts if name == norm)
    norms = [np.mean(starts[norm, depth][:, -1]) for depth in depths]
    return np.polyfit(np.log(depths), np.log(norms), 1)[0] if len(depths) > 1 else math.nan


def cells(rows):
    """{(norm, warm-up, max_lr): its rows}"""
    found = {}
    for row in rows:
        found.setdefault((row["norm"], row["warmup_steps"], row["max_lr"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][0] == "post", *item[0][1:])))


def has_learned(row):
    return not row["diverged"] and not row["stuck"]


def make_table(rows, starts, unigram):
    columns = (("", 8), ("warm-up", 8), ("max_lr", 8), ("runs", 6), ("diverged", 10), ("stuck", 7),
               ("spikes", 8), ("skipped", 9), ("last loss", 18), ("each seed", 24))
    lines = [f"last loss: train loss of the last {LAST} steps, text not seen before; mean +- sd of runs",
             f"neither diverged nor stuck at a unigram model's loss, {unigram:.4f} on train text", "",
             "".join(f"{name:>{width}s}" for name, width in columns)]
    for (norm, warmup, lr), mine in cells(rows).items():
        good = [row["last_loss"] for row in mine if has_learned(row)]
        counts = (len(mine), *(sum(row[key] for row in mine)
                               for key in ("diverged", "stuck", "spikes", "skipped")))
        each = " ".join(f"{row['last_loss']:.4f}" for row in sorted(mine, key=lambda row: row["seed"]))
        values = (NAMES[norm], warmup, f"{lr:g}", *counts, spread(good) if good else "none", each)
        lines.append("".join(f"{value:>{width}}" for value, (_, width) in zip(values, columns)))
    lines += ["", "gradient norm of blocks at initialisation: mean over seeds (lowest to highest)",
              f"{'':8s}{'layers':>8s}{'first block':>28s}{'last block':>28s}"]
    for norm, depth in sorted(starts, key=lambda key: (key[0] == "post", key[1])):
        ends = starts[norm, depth][:, [0, -1]].T
        lines.append(f"{NAMES[norm]:>8s}{depth:8d}" + "".join(
            f"{f'{np.mean(some):.3g} ({min(some):.3g} to {max(some):.3g})':>28s}" for some in ends))
    lines += ["", "last block at initialisation, as a power of the number of layers: "
              + ", ".join(f"{name} {slope(starts, norm):.2f}" for norm, name in NAMES.items())]
    return "\n".join(lines) + "\n"


def show(axis, runs, rows, quantity, **style):
    """Draw quantity(streams) -> (x, y) of each run: a thin line, of the colour and style of its norm and
    warm-up. Runs of one setting may go quite different ways, which a mean would hide."""
    for (norm, warmup, _), mine in cells(rows).items():
        for i, row in enumerate(mine):
            axis.plot(*quantity(runs[row["run"]]), color=COLORS[norm], linestyle=style_of(rows, warmup),
                      label=None if i else label(norm, warmup), linewidth=0.8, **style)


def style_of(rows, warmup):
    return STYLES[sorted({row["warmup_steps"] for row in rows}).index(warmup) % len(STYLES)]


def label(norm, warmup):
    return f"{NAMES[norm]}, {f'{warmup} steps of warm-up' if warmup else 'no warm-up'}"


def draw(runs, rows, starts, unigram, path):
    figure, axes = plt.subplots(2, 3, figsize=(18, 10), layout="constrained")
    (initial, by_depth, last), (over_time, final, curves) = axes
    lrs = sorted({row["max_lr"] for row in rows})
    middle = [row for row in rows if row["max_lr"] == lrs[len(lrs) // 2]]
    n_layer = len(layer_norms(runs[rows[0]["run"]], 0))

    def points(axis, x, seeds, norm, label):  # seeds: the values at each x, of which mean and range are drawn
        mean = np.array([np.mean(some) for some in seeds])
        ends = mean - [min(some) for some in seeds], [max(some) for some in seeds] - mean
        axis.errorbar(x, mean, ends, color=COLORS[norm], marker="o", capsize=3, label=label)

    for norm in NAMES:
        if (norm, n_layer) in starts:
            points(initial, range(n_layer), starts[norm, n_layer].T, norm, NAMES[norm])
        depths = sorted(depth for name, depth in starts if name == norm)
        if depths:
            points(by_depth, depths, [starts[norm, depth][:, -1] for depth in depths], norm,
                   NAMES[norm] + (f": power {slope(starts, norm):.2f}" if len(depths) > 1 else ""))
    initial.set(xlabel="block", ylabel="L2 norm of the gradient",
                title=f"At initialisation, {n_layer} layers: range over seeds")
    by_depth.set(xscale="log", xlabel="layers", ylabel="L2 norm of the last block's gradient",
                 title="At initialisation, by depth: range over seeds")
    depths = sorted({depth for _, depth in starts})
    by_depth.set_xticks(depths, [f"{depth}" for depth in depths])

    first = "norm_h0"
    show(over_time, runs, middle, lambda streams: streams.get(first, ([], [])))
    over_time.set(xlabel="optimizer step", ylabel="L2 norm of the first block's gradient",
                  title=f"In training, max_lr {lrs[len(lrs) // 2]:g}: first block, a line per seed")
    show(final, runs, middle, lambda streams: (range(n_layer), layer_norms(streams, -1)), marker="o",
         markersize=3)
    final.set(xlabel="block", ylabel="L2 norm of the gradient",
              title=f"At the last step with norms, max_lr {lrs[len(lrs) // 2]:g}: a line per seed")

    table = cells(rows)
    for norm, warmup in dict.fromkeys((norm, warmup) for norm, warmup, _ in table):
        found = {lr: table[norm, warmup, lr] for lr in lrs if (norm, warmup, lr) in table}
        places = {lr: lr * (1.05 if norm == "post" else 0.95) for lr in found}  # side by side
        good = {lr: [row["last_loss"] for row in mine if has_learned(row)] for lr, mine in found.items()}
        good = {lr: losses for lr, losses in good.items() if losses}
        deviations = [np.std(losses, ddof=1) if len(losses) > 1 else 0 for losses in good.values()]
        last.errorbar([places[lr] for lr in good], [np.mean(losses) for losses in good.values()], deviations,
                     color=COLORS[norm], linestyle=style_of(rows, warmup), marker="o", capsize=3,
                     markerfacecolor=COLORS[norm] if warmup else "white", label=label(norm, warmup))
        for key, marks in (("stuck", "+x"), ("diverged", "12")):  # who diverged has no loss: at the unigram's
            bad = [(places[lr], unigram if row["diverged"] else row["last_loss"])
                   for lr, mine in found.items() for row in mine if row[key]]
            last.plot([x for x, _ in bad], [y for _, y in bad], linestyle="", color=COLORS[norm],
                      marker=marks[warmup > 0], markersize=9)
    for key, mark, words in (("stuck", "x", "stuck at a unigram model's loss, with warm-up (+: without)"),
                             ("diverged", "2", "diverged, with warm-up (upside down: without)")):
        if any(row[key] for row in rows):
            last.plot([], [], color="black", linestyle="", marker=mark, label=words)
    last.axhline(unigram, color="gray", linestyle=":", label=f"unigram model on train text, {unigram:.2f}")
    last.set(xscale="log", xlabel="max_lr", ylabel="train loss (nats per token)",
             title=f"Last {LAST} steps, text not seen before: mean and sd")
    last.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    last.minorticks_off()
    last.margins(y=0.3)
    low, high = last.get_ylim()
    last.set_ylim(low - 0.35 * (high - low), high)  # room for the legend

    def smoothed(streams):
        steps, losses = streams["train"]
        return steps, smooth(losses, max(1, len(losses) // 40))

    show(curves, runs, middle, smoothed)
    curves.set(xlabel="optimizer step", ylabel="train loss (nats per token)",
               title=f"Train loss, max_lr {lrs[len(lrs) // 2]:g}: smoothed, a line per seed")
    for axis in (initial, by_depth, over_time, final):
        if any(np.any(np.asarray(line.get_ydata(), dtype=float) > 0) for line in axis.get_lines()):
            axis.set_yscale("log")  # which knows no axis where all is nan
    by_depth.xaxis.minorticks_off()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        # over_time's lines cross all of it, and are named beside it
        if axis is not over_time and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, dpi=80)
    plt.close(figure)
    write_atomically(path, image.getvalue())


def report(folder):
    """Make table.txt, runs.csv and figure.png of a folder's streams.txt, and print the table."""
    runs = read_streams(folder / "streams.txt")
    rows, starts = judge(runs)
    if not rows:
        raise UserError(f"{folder / 'streams.txt'}: no run with a learning rate; give --max_lrs to run.py")
    unigram = float(np.mean([runs[row["run"]]["unigram_train"][1][0] for row in rows]))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.5g}" if type(value) is float else value for key, value in row.items()}
                     for row in rows)
    table = make_table(rows, starts, unigram)
    write_atomically(folder / "runs.csv", text.getvalue().encode())
    write_atomically(folder / "table.txt", table.encode())
    draw(runs, rows, starts, unigram, folder / "figure.png")
    print(table, end="")
    print(f"results: {folder / 'table.txt'}, runs.csv, figure.png")


if __name__ == "__main__":
    configure(globals())
    report(Path(folder))
