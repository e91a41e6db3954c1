"""
Tables and figures of the studies, from the logs of their runs.

    python experiments/plot.py norm                     # the runs in log_norm/
    python experiments/plot.py optimizers               # in log_optimizers/
    python experiments/plot.py vocabularies             # in log_vocabularies/
    python experiments/plot.py norm --redraw            # the published figure, from its runs.json

Writes table.txt, figure.png and runs.json (what both need of the logs, with train losses averaged over 10
steps) to the folder of the runs; norm also writes runs.csv, a row for each run. --redraw writes figure.png
alone, in results/.

Loss is the final val loss, after the last step, in nats per token. A run that gave up because its losses were
not finite has diverged. One whose loss is not 0.1 nats below a unigram model's on the same tokens has not
learned: at best it knows how often each token occurs.
"""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from xavier import gradient_table

from configurator import PathName, UserError, configure
from figures import csv_bytes, pyplot, save_figure, table
from files import read_jsonl, read_text, write_atomically
from model import GPT, GPTConfig
from plot_log import parse_log, smooth

log_dir: PathName = ""  # folder of the runs; empty = log_norm, log_optimizers or log_vocabularies
out_dir: PathName = ""  # of the results; empty = log_dir, or with redraw the folder in results/
redraw = False  # draw the figure from out_dir's runs.json instead of logs, and write nothing else

ROOT = Path(__file__).resolve().parents[1]
AVERAGED = 10  # train losses in one value of runs.json
MARGIN = 0.1  # nats below a unigram model's loss, by which a run has learned something
SHAPE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
START = {"config": {"max_steps": int, "batch_tokens": int, "norm_position": str, **dict.fromkeys(SHAPE, int)}}


# ---- logs


def read_run(folder):
    """What is kept of a run: max_steps, unigram (a unigram model's loss), ms and flops of a step, and curves
    {name: [steps, values]}. Raises UserError if the run is not finished."""
    starts, log = read_jsonl(folder / "runs.jsonl", START), parse_log(folder / "log.txt")
    config = starts[-1]["config"] if starts and {"train", "tok_s", "unigram"} <= log.keys() else {}
    gave_up = config and (not all(map(math.isfinite, log.get("val", {}).values()))
                          or max(log["train"]) in log.get("skipped", {}))
    if not gave_up and config.get("max_steps") not in log.get("val", {}):
        raise UserError(f"{folder} is not finished; run the study's shell script again")
    curves = {name: sorted(log[name].items()) for name in ("val", "val_bpb") if name in log}
    train = [log["train"][step] for step in sorted(log["train"])]
    curves["train"] = [(first, np.mean(train[first:first + AVERAGED]))
                       for first in range(0, len(train), AVERAGED)]
    for name, block in (("first_block", "norm_h0"), ("last_block", f"norm_h{config['n_layer'] - 1}")):
        if block in log:
            curves[name] = [(step, log[block][step]) for step in (min(log[block]), max(log[block]))]
    return {"max_steps": config["max_steps"], "unigram": log["unigram"][0],
            "ms": 1000 * config["batch_tokens"] / max(log["tok_s"].values()),  # of the fastest step
            "flops": flops_per_step(config),
            **{name: [[step for step, _ in points], [float(f"{value:.8g}") for _, value in points]]
               for name, points in curves.items()}}


def flops_per_step(config):
    """FLOPs of an optimizer step of a run with these settings."""
    with torch.device("meta"):
        model = GPT(GPTConfig(n_vocab=config["vocab_size"], norm_position=config["norm_position"],
                              **{name: config[name] for name in SHAPE}))
    return model.flops_per_token(config["block_size"]) * config["batch_tokens"]


def name_parts(pattern, run):
    """The groups of `pattern` in the name of a run. UserError if it is no run of the study."""
    match = re.fullmatch(pattern, run)
    if not match:
        raise UserError(f"{run} is not named like a run of this study; move that folder elsewhere")
    return match.groups()


def final(run, name="val"):
    """The value after the last step; nan if the run diverged."""
    steps, values = run.get(name, [[0], [0]])
    return values[-1] if steps[-1] == run["max_steps"] else math.nan


def outcome(run):
    """learned, not learned or diverged, as the docstring at the top defines them."""
    if not math.isfinite(final(run)):
        return "diverged"
    return "learned" if final(run) < run["unigram"] - MARGIN else "not learned"


def spread(values):
    """Mean and standard deviation as text; of one value, the value."""
    return f"{np.mean(values):.4f}" + (f" +- {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


# ---- Pre-LN against Post-LN

ARMS = {(norm, weights): (f"{norm.capitalize()}-LN, {name} initial weights", color)
        for weights, name in (("gpt2", "GPT-2's"), ("xavier", "Xavier's"))
        for norm, color in (("pre", "C0"), ("post", "C1"))}


def norm_rows(runs):
    """A dict for each run: its settings, outcome, loss and gradients at the start and the end."""
    rows = []
    for name, run in runs.items():
        norm, weights, lr, warmup, seed = name_parts(
            r"(pre|post)_(gpt2|xavier)_lr(\d+e-\d+)_w(\d+)_s(\d+)", name)
        row = {"run": name, "norm": norm, "weights": weights, "max_lr": float(lr),
               "warmup_steps": int(warmup), "seed": int(seed), "loss": final(run), "outcome": outcome(run)}
        for block in ("first_block", "last_block"):
            _, norms = run.get(block, ([], [math.nan]))
            row |= {f"{block}_start": norms[0], f"{block}_end": norms[-1]}
        rows.append(row)
    return rows


def select(rows, arm, warmup):
    """The rows of an arm of ARMS with this warm-up."""
    return [row for row in rows if (row["norm"], row["weights"], row["warmup_steps"]) == (*arm, warmup)]


def norm_table(runs):
    rows = norm_rows(runs)
    lrs = sorted({row["max_lr"] for row in rows})
    unigram = np.mean([run["unigram"] for run in runs.values()])
    lines = []
    for arm, (name, _) in ARMS.items():
        for warmup in sorted({row["warmup_steps"] for row in rows}):
            mine = select(rows, arm, warmup)
            cells = [" ".join(f"{row['loss']:.3f}{'' if row['outcome'] == 'learned' else '*'}"
                              for row in mine if row["max_lr"] == lr) or "-" for lr in lrs]
            lines.append([f"{name}, warm-up {warmup}", *cells])
    return [f"final val loss, one number per seed; a unigram model has {unigram:.3f}",
            f"* = has not learned: not {MARGIN} below a unigram model's loss; nan* = diverged", "",
            *table(["", *(f"peak lr {lr:g}" for lr in lrs)], lines)]


def norm_figure(runs):
    plt, rows = pyplot(), norm_rows(runs)
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    lrs = sorted({row["max_lr"] for row in rows})
    shown = 2e-3
    styles = dict(zip(sorted({row["warmup_steps"] for row in rows}), ("--", "-")))
    for axis, weights, title in ((axes[0], "gpt2", "GPT-2's initial weights"),
                                 (axes[1], "xavier", "Xavier's initial weights")):
        named = set()
        for row in rows:
            if row["weights"] == weights and row["max_lr"] == shown:
                steps, losses = runs[row["run"]]["train"]
                name = f"{ARMS[row['norm'], weights][0].split(',')[0]}, " + (
                    f"{row['warmup_steps']} steps of warm-up" if row["warmup_steps"] else "no warm-up")
                axis.plot(steps, smooth(np.array(losses), 3), styles[row["warmup_steps"]], linewidth=1.2,
                          color=ARMS[row["norm"], weights][1], label=None if name in named else name)
                named.add(name)
        axis.set(title=f"{title}, peak learning rate {shown:g}", xlabel="optimizer step",
                 ylabel="train loss (nats per token)", ylim=(None, 9))  # one run has a spike to 15
    for arm, (name, color) in ARMS.items():
        filled = arm[1] == "gpt2"
        for warmup, style in styles.items():
            mine = select(rows, arm, warmup)
            for seed in sorted({row["seed"] for row in mine}):  # a line for the first, points for the others
                points = sorted((row["max_lr"], row["loss"]) for row in mine if row["seed"] == seed)
                axes[2].plot(*zip(*points), style if seed == 1 else "", color=color, linewidth=1.2,
                             marker="o" if filled else "s", markerfacecolor=color if filled else "white",
                             label=name if warmup and seed == 1 else None)
    unigram = np.mean([run["unigram"] for run in runs.values()])
    axes[2].axhline(unigram, color="gray", linestyle=":", label=f"unigram model, {unigram:.2f}")
    axes[2].set(title="Final val loss (dashed: no warm-up)", xlabel="peak learning rate",
                xscale="log", ylabel="val loss (nats per token)")
    axes[2].set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    axes[2].minorticks_off()
    return figure


# ---- Muon against AdamW

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon, one rate", "separate": "Muon, AdamW's part at AdamW's rate",
              "short": "Muon, one rate, 40% of the steps"}


def crossing(steps, losses, goal):
    """The step at which the loss first is `goal`, interpolated between validations; nan if it never is."""
    steps, losses = np.array(steps), np.array(losses)
    below = np.flatnonzero(losses <= goal)
    if not below.size:
        return math.nan
    i = below[0]
    return float(np.interp(goal, losses[[i, i - 1]], steps[[i, i - 1]])) if i else float(steps[0])


def grouped(runs):
    """{(name, max_lr): {seed: run}} of runs named NAME_lrMAX_sSEED, in order of names and rates."""
    groups = {}
    for folder, run in runs.items():
        name, lr, seed = name_parts(rf"({'|'.join(OPTIMIZERS)})_lr(\d+e-\d+)_s(\d+)", folder)
        groups.setdefault((name, float(lr)), {})[int(seed)] = run
    return dict(sorted(groups.items(), key=lambda item: (list(OPTIMIZERS).index(item[0][0]), item[0][1])))


def main_groups(runs):
    """{name: (max_lr, {seed: run})}: of each, the rate with the most seeds."""
    found = {}
    for (name, lr), seeds in grouped(runs).items():
        if len(seeds) > len(found.get(name, (0, {}))[1]):
            found[name] = lr, seeds
    return found


def steps_to_adamw(runs):
    """{name: [share of AdamW's steps after which the run has AdamW's final loss, for each seed]}."""
    groups = main_groups(runs)
    adamw = groups["adamw"][1]
    return {name: [crossing(*run["val"], final(adamw[seed])) / adamw[seed]["max_steps"]
                   for seed, run in seeds.items()]
            for name, (_, seeds) in groups.items() if name in ("muon", "separate")}


def optimizers_table(runs):
    rows = [[OPTIMIZERS[name], f"{lr:g}", str(len(seeds)),
             spread([final(run) for run in seeds.values()])]
            for (name, lr), seeds in grouped(runs).items()]
    lines = ["final val loss, mean +- sd over seeds", "",
             *table(["", "peak lr", "seeds", "final val loss"], rows), ""]
    for name, shares in steps_to_adamw(runs).items():
        lines.append(f"{OPTIMIZERS[name]}: reaches AdamW's final loss after {spread(shares)} of AdamW's "
                     f"steps")
    ms = {name: min(run["ms"] for folder, run in runs.items() if folder.startswith(name))
          for name in ("adamw", "muon")}
    return [*lines, "", f"fastest step: AdamW {ms['adamw']:.0f} ms, Muon {ms['muon']:.0f} ms"]


def optimizers_figure(runs):
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=(3, 2))
    colors = dict(zip(OPTIMIZERS, ("C0", "C1", "C2", "C3")))
    for name, (lr, seeds) in main_groups(runs).items():
        for i, run in enumerate(seeds.values()):
            axes[0].plot(*run["val"], color=colors[name], linewidth=1.2, marker=".",
                         label=None if i else f"{OPTIMIZERS[name]}, {lr:g}: {len(seeds)} seeds")
    adamw = main_groups(runs)["adamw"][1].values()
    goal = np.mean([final(run) for run in adamw])
    axes[0].axhline(goal, color="black", linestyle=":", label=f"AdamW's final loss, {goal:.3f}")
    axes[0].set(title="Best learning rate of each", xlabel="optimizer step of 4,096 tokens", ylim=(None, 6.5),
                ylabel="val loss (nats per token)")
    for name in ("adamw", "muon", "separate"):
        points = [(lr, final(seeds[1])) for (its, lr), seeds in grouped(runs).items() if its == name]
        axes[1].plot(*zip(*points), color=colors[name], marker="o", label=OPTIMIZERS[name])
    axes[1].set(title="Seed 1 at every learning rate", xlabel="peak learning rate", xscale="log",
                ylabel="final val loss (nats per token)")
    lrs = sorted({lr for _, lr in grouped(runs)})
    axes[1].set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    axes[1].minorticks_off()
    return figure


# ---- vocabularies at equal FLOPs


def vocabularies(runs):
    """{thousands of ids: [run of each seed]}."""
    found = {}
    for folder, run in runs.items():
        k, _ = name_parts(r"vocab(\d+)k_s(\d+)", folder)
        found.setdefault(int(k), []).append(run)
    return dict(sorted(found.items()))


def bytes_per_token(run):
    """Of the val text, from its loss in both units."""
    return final(run) / math.log(2) / final(run, "val_bpb")


def vocabularies_table(runs):
    rows = []
    for k, seeds in vocabularies(runs).items():
        first = seeds[0]
        flops, steps = first["flops"], first["max_steps"]
        bits = [final(run, "val_bpb") for run in seeds]
        rows.append(["50,257 (GPT-2's)" if k == 50 else f"{1024 * k:,}", f"{flops / 1e9:.1f}", f"{steps}",
                     f"{flops * steps / 1e12:.2f}", f"{bytes_per_token(first):.2f}",
                     " ".join(f"{value:.4f}" for value in bits), f"{np.mean(bits):.4f}"])
    return ["bits per byte of all of val, the same text for all, after equal training FLOPs", "",
            *table(["ids", "GFLOPs/step", "steps", "TFLOPs", "bytes/token", "each seed", "mean"], rows)]


def vocabularies_figure(runs):
    figure, axis = pyplot().subplots(figsize=(8, 5), layout="constrained")
    for i, (k, seeds) in enumerate(vocabularies(runs).items()):
        name = "50,257 ids (GPT-2's)" if k == 50 else f"{1024 * k:,} ids"
        for j, run in enumerate(seeds):
            steps, bits = run["val_bpb"]
            axis.plot(np.array(steps[1:]) * run["flops"] / 1e12, bits[1:], color=f"C{i}", marker="o",
                      markersize=4, linewidth=1.2, label=None if j else name)
    axis.set(title="Four vocabularies, equal compute: a line per seed", xlabel="training compute (TFLOPs)",
             ylabel="val loss (bits per byte)")
    return figure


STUDIES = {"norm": ("norm_study", norm_table, norm_figure),
           "optimizers": ("optimizer_study", optimizers_table, optimizers_figure),
           "vocabularies": ("vocabulary_study", vocabularies_table, vocabularies_figure)}


def main(study):
    folder, make_table, make_figure = STUDIES[study]
    runs_dir = Path(log_dir or f"log_{study}")
    results = Path(out_dir or (ROOT / "results" / folder if redraw else runs_dir))
    if redraw:
        runs = json.loads(read_text(results / "runs.json"))
    else:
        folders = [path.parent for path in sorted(runs_dir.glob("*/log.txt"))]
        if not folders:
            raise UserError(f"no runs in {runs_dir}: run sh experiments/{study}.sh first, or add --redraw")
        runs = {folder.name: read_run(folder) for folder in folders}
    lines = make_table(runs)
    figure = make_figure(runs)
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    save_figure(figure, results / "figure.png")
    if not redraw:
        if study == "norm":
            lines += ["", *gradient_table()]
            write_atomically(results / "runs.csv", csv_bytes(norm_rows(runs)))
        lines_of_runs = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items())
        write_atomically(results / "runs.json", f"{{{lines_of_runs}}}\n".encode())
        write_atomically(results / "table.txt", "".join(f"{line}\n" for line in lines).encode())
    print(*lines, f"results: {results}", sep="\n")


if __name__ == "__main__":
    words = sys.argv[1:]
    configure(globals(), words[1:] if words and words[0] in STUDIES else words)
    if not words or words[0] not in STUDIES:
        raise UserError("name a study: python experiments/plot.py norm, optimizers or vocabularies")
    main(words[0])
