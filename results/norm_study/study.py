"""
Pre-LN against Post-LN: the table and the figure, from what run.py kept of its runs.

    python results/norm_study/study.py                             # of the runs that RESULTS.md speaks of
    python results/norm_study/study.py --folder=log_norm_study     # of your own

Reads the folder's streams.txt, a piece of a log per line: `run stream first_step step_interval values`. Runs
are NORM_lrMAX_wWARMUP_sSEED, and NORM_depthLAYERS_sSEED of one step. Writes table.txt, runs.csv and
figure.png beside it, anew.

A spike is a step whose train loss is above the median of the 32 steps before it by more than 6 robust
deviations (1.4826 times the median distance of those 32 from it) and more than 0.5 nats; steps in a row are
one spike, and the first 32 steps have none. Runs of one seed see the same batches, so a step at which more
than half of them spike is the data's doing, and counts for none. A run has diverged if it gave up (its val
loss, or max_bad_steps steps in a row, were not finite), or if its last val loss is less than 0.1 nats below a
unigram model's: then it has learned little but how frequent each id is.
"""

import csv
import io
import math
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, configure
from plot_log import parse_log, smooth
from shards import write_atomically

matplotlib.use("Agg")
import matplotlib.pyplot as plt

folder = str(Path(__file__).parent)  # where streams.txt is, and where the results go

WINDOW, DEVIATIONS, LEAST = 32, 6.0, 0.5  # of a spike: steps, robust deviations, nats
MARGIN = 0.1  # nats below a unigram model's val loss, by which a run has learned something
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


def collect(log_dir, runs):
    """The text of streams.txt: train losses with 4 digits, some of the blocks' gradient norms with 3."""
    lines = []
    for run in runs:
        streams = parse_log(log_dir / run / "log.txt")
        for stream, points in streams.items():
            block = stream.startswith("norm_h")
            if not block and stream not in ("train", "val", "unigram", "skipped"):
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


def spikes(losses):
    """First steps of the spikes in a run's train losses (steps,), as the docstring defines them; steps that
    are not finite are none, and are left out of the median."""
    found, above = [], False
    for step in range(WINDOW, len(losses)):
        past = losses[step - WINDOW:step]
        past = past[np.isfinite(past)]
        if not past.size or not np.isfinite(losses[step]):
            continue
        median = np.median(past)
        deviation = 1.4826 * np.median(np.abs(past - median))
        was, above = above, losses[step] - median > max(DEVIATIONS * deviation, LEAST)
        if above and not was:
            found.append(step)
    return found


def without_data(found):
    """{run: spikes} of runs with the same batches, without the steps at which more than half of them do."""
    steps = [step for mine in found.values() for step in mine]
    return {run: [step for step in mine if 2 * steps.count(step) <= len(found)]
            for run, mine in found.items()}


def has_diverged(val_loss, unigram):
    """Whether a run counts as diverged, as the docstring defines it; val_loss is nan if it gave up."""
    return not val_loss <= unigram - MARGIN


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
            loss = float(val[-1]) if steps[-1] == last else math.nan  # who finishes is judged at the end
            first, final = (start[0], start[-1]) if len(start) else (math.nan, math.nan)
            rows.append({
                "run": run, "norm": norm, "max_lr": float(parts[1]), "warmup_steps": int(parts[2]),
                "seed": seed, "steps": last, "val_loss": loss, "gave_up": not math.isfinite(loss),
                "diverged": has_diverged(loss, streams["unigram"][1][0]), "spikes": 0,
                "skipped": int(streams["skipped"][1][-1]) if "skipped" in streams else 0,
                "norm_first_block": first, "norm_last_block": final, "last_to_first": final / first})
    for seed in {row["seed"] for row in rows}:
        mine = [row for row in rows if row["seed"] == seed]
        counted = without_data({row["run"]: spikes(runs[row["run"]]["train"][1]) for row in mine})
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


def make_table(rows, starts, unigram):
    columns = (("", 8), ("warm-up", 8), ("max_lr", 8), ("runs", 6), ("diverged", 10), ("spikes", 8),
               ("skipped", 9), ("val loss", 18), ("each seed", 24))
    lines = ["val loss after the last step, mean +- sd over the runs that did not diverge",
             f"a unigram model has {unigram:.4f}", "",
             "".join(f"{name:>{width}s}" for name, width in columns)]
    for (norm, warmup, lr), mine in cells(rows).items():
        good = [row["val_loss"] for row in mine if not row["diverged"]]
        counts = (len(mine), sum(row["diverged"] for row in mine), sum(row["spikes"] for row in mine),
                  sum(row["skipped"] for row in mine))
        each = " ".join(f"{row['val_loss']:.4f}" for row in sorted(mine, key=lambda row: row["seed"]))
        values = (NAMES[norm], warmup, f"{lr:g}", *counts, spread(good) if good else "none", each)
        lines.append("".join(f"{value:>{width}}" for value, (_, width) in zip(values, columns)))
    lines += ["", "gradient norm of blocks at initialisation: mean over seeds (lowest to highest)",
              f"{'':8s}{'layers':>8s}{'first block':>28s}{'last block':>28s}{'last / first':>28s}"]
    for norm, depth in sorted(starts, key=lambda key: (key[0] == "post", key[1])):
        blocks = starts[norm, depth]
        measured = blocks[:, 0], blocks[:, -1], blocks[:, -1] / blocks[:, 0]
        lines.append(f"{NAMES[norm]:>8s}{depth:8d}" + "".join(
            f"{f'{np.mean(some):.3g} ({min(some):.3g} to {max(some):.3g})':>28s}" for some in measured))
    lines += ["", "last block at initialisation, as a power of the number of layers: "
              + ", ".join(f"{name} {slope(starts, norm):.2f}" for norm, name in NAMES.items())]
    return "\n".join(lines) + "\n"


def show(axis, runs, rows, quantity, **style):
    """Draw quantity(streams) -> (x, y) of each norm and warm-up: the geometric mean over seeds, and their
    range."""
    for (norm, warmup, _), mine in cells(rows).items():
        curves = [quantity(runs[row["run"]]) for row in mine]
        length = min(len(y) for _, y in curves)  # runs that gave up are shorter
        if length:
            x, all_y = curves[0][0][:length], np.array([y[:length] for _, y in curves])
            mean = np.exp(np.mean(np.log(np.maximum(all_y, 1e-30)), axis=0))
            axis.plot(x, mean, color=COLORS[norm], linestyle=style_of(rows, warmup),
                      label=label(norm, warmup), **style)
            axis.fill_between(x, all_y.min(axis=0), all_y.max(axis=0), color=COLORS[norm], alpha=0.15,
                              linewidth=0)


def style_of(rows, warmup):
    return STYLES[sorted({row["warmup_steps"] for row in rows}).index(warmup) % len(STYLES)]


def label(norm, warmup):
    return f"{NAMES[norm]}, {f'{warmup} steps of warm-up' if warmup else 'no warm-up'}"


def draw(runs, rows, starts, unigram, path):
    figure, axes = plt.subplots(2, 3, figsize=(18, 10), layout="constrained")
    (initial, by_depth, val), (over_time, final, curves) = axes
    lrs = sorted({row["max_lr"] for row in rows})
    middle = [row for row in rows if row["max_lr"] == lrs[len(lrs) // 2]]
    n_layer = len(layer_norms(runs[rows[0]["run"]], 0))

    def points(axis, x, seeds, norm, label):  # seeds: the values at each x, of which mean and range are drawn
        mean = np.array([np.mean(some) for some in seeds])
        ends = mean - [min(some) for some in seeds], [max(some) for some in seeds] - mean
        axis.errorbar(x, mean, ends, color=COLORS[norm], marker="o", capsize=3, label=label)
        return mean

    for norm in NAMES:
        if (norm, n_layer) in starts:
            points(initial, range(n_layer), starts[norm, n_layer].T, norm, NAMES[norm])
        depths = np.array(sorted(depth for name, depth in starts if name == norm))
        if len(depths):
            mean = points(by_depth, depths, [starts[norm, depth][:, -1] for depth in depths], norm,
                          NAMES[norm] + (f": power {slope(starts, norm):.2f}" if len(depths) > 1 else ""))
            if norm == "pre" and len(depths) > 1:
                by_depth.plot(depths, mean[0] * np.sqrt(depths[0] / depths), color="black", linestyle=":",
                              label="power -0.5: Pre-LN in Xiong et al. 2020")
    initial.set(xlabel="block", ylabel="L2 norm of the gradient",
                title=f"At initialisation, {n_layer} layers: range over seeds")
    by_depth.set(xscale="log", xlabel="layers", ylabel="L2 norm of the last block's gradient",
                 title="At initialisation, by depth: range over seeds")
    depths = sorted({depth for _, depth in starts})
    by_depth.set_xticks(depths, [f"{depth}" for depth in depths])

    first = "norm_h0"
    show(over_time, runs, middle, lambda streams: streams.get(first, ([], [])))
    over_time.set(xlabel="optimizer step", ylabel="L2 norm of the first block's gradient",
                  title=f"In training, max_lr {lrs[len(lrs) // 2]:g}: first block, range over seeds")
    show(final, runs, middle, lambda streams: (range(n_layer), layer_norms(streams, -1)), marker="o",
         markersize=4)
    final.set(xlabel="block", ylabel="L2 norm of the gradient",
              title=f"At the last step with norms, max_lr {lrs[len(lrs) // 2]:g}: range over seeds")

    table = cells(rows)
    for norm, warmup in dict.fromkeys((norm, warmup) for norm, warmup, _ in table):
        found = {lr: table[norm, warmup, lr] for lr in lrs if (norm, warmup, lr) in table}
        places = {lr: lr * (1.05 if norm == "post" else 0.95) for lr in found}  # side by side
        good = {lr: [row["val_loss"] for row in mine if not row["diverged"]] for lr, mine in found.items()}
        good = {lr: losses for lr, losses in good.items() if losses}
        deviations = [np.std(losses, ddof=1) if len(losses) > 1 else 0 for losses in good.values()]
        val.errorbar([places[lr] for lr in good], [np.mean(losses) for losses in good.values()], deviations,
                     color=COLORS[norm], linestyle=style_of(rows, warmup), marker="o", capsize=3,
                     markerfacecolor=COLORS[norm] if warmup else "white", label=label(norm, warmup))
        bad = [(places[lr], row["val_loss"]) for lr, mine in found.items() for row in mine if row["diverged"]]
        val.plot([x for x, _ in bad], [y if math.isfinite(y) else unigram for _, y in bad], linestyle="",
                 color=COLORS[norm], marker="x" if warmup else "+", markersize=9)
    val.plot([], [], color="black", linestyle="", marker="x", label="diverged, with warm-up (+: without)")
    val.axhline(unigram, color="gray", linestyle=":", label=f"unigram model, {unigram:.2f}")
    val.set(xscale="log", xlabel="max_lr", ylabel="val loss after the last step (nats per token)",
            title="Val loss: mean and sd over seeds")
    val.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    val.minorticks_off()

    def smoothed(streams):
        steps, losses = streams["train"]
        return steps, smooth(losses, max(1, len(losses) // 40))

    show(curves, runs, middle, smoothed, linewidth=1.2)
    curves.set(xlabel="optimizer step", ylabel="train loss (nats per token)",
               title=f"Train loss, max_lr {lrs[len(lrs) // 2]:g}: smoothed, range over seeds")
    for axis in (initial, by_depth, over_time, final):
        if any(np.any(np.asarray(line.get_ydata(), dtype=float) > 0) for line in axis.get_lines()):
            axis.set_yscale("log")  # which knows no axis where all is nan
    by_depth.xaxis.minorticks_off()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
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
    unigram = float(np.mean([streams["unigram"][1][0] for run, streams in runs.items() if "_lr" in run]))
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
