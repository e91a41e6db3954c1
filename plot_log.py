"""
Draw the logs of runs, compare a run with a reference, or one group of runs with another.

    python plot_log.py --log_dir=log --model_size=124M                     # -> log/log_plot.png
    python plot_log.py --log_dir=log,log_b --out=plots/compare.png         # several runs in one figure
    python plot_log.py --log=log/log.txt --out=plots/log_plot.png          # a log file by its name
    python plot_log.py --a=log_1,log_2 --b=log_3,log_4                     # -> log_1/groups.png
    python plot_log.py --log_dir=log_demo --ref=reference/demo_cpu.json    # -> log_demo/comparison.png
    python plot_log.py --make=log_1,log_2,log_3 --ref=reference/mine.json  # a reference from several seeds

Reads log.txt (`step stream value` per line, also build-nanogpt's; where a step occurs twice, the later line
counts) and runs.jsonl beside it. Writes one figure, in place of an earlier one. Takes a few seconds. Curves
leave out nan and inf; crosses at the foot of a panel mark them, and steps skipped by train_gpt2.py's guard.

--model_size draws OpenAI's results. Their val loss is on FineWeb-Edu, so it is drawn only if the data_dir of
every run has "edu_fineweb" in its name.

--a and --b: finished runs, at least two seeds each, and nothing else differs within a group. Prints the
difference of the final val losses, its standard error, p by Welch's t test, and roughly how many seeds per
group detect half of it. Groups with different tokenizers are compared in bits per byte.

--make: at least three seeds. --ref: exit code 1 if a val loss is outside the reference's band or the run gave
up, 2 if the two cannot be compared, as with different settings; a run still in training is compared up to its
latest step. A reference from one seed has no band: the distance from it is printed, without a verdict.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import Between, OneOf, PathName, UserError, configure
from figures import log_ticks, pyplot, save_figure, table
from files import read_json, read_jsonl, read_text, write_atomically

log_dir: PathName = "log"  # a run's folder with log.txt, or a log file itself; several separated by commas
log: PathName = ""  # a log file, or several separated by commas, in place of log_dir
out: PathName = ""  # the figure, .png, .svg or .pdf; empty = beside the first log
model_size: OneOf("", "124M", "350M", "774M", "1558M") = ""  # draw OpenAI's results for it; empty = none
a: PathName = ""  # runs with several seeds, separated by commas, to compare with those in b
b: PathName = ""  # the other runs; a negative difference means that their loss is lower
ref: PathName = ""  # a reference to compare the run in log_dir with
make: PathName = ""  # write ref from these runs, which differ by the seed alone

# Quoted from build-nanogpt's notebook: loss of OpenAI's checkpoint on FineWeb-Edu's val shard; HellaSwag of
# OpenAI's GPT-2 in completion style, and of GPT-3 (Brown et al. 2020, table H.1), whose 350M is GPT-3 Medium.
VAL_LOSS_GPT2 = {"124M": 3.2924}
HELLASWAG = {"GPT-2": {"124M": 0.294463, "350M": 0.375224, "774M": 0.431986, "1558M": 0.488946},
             "GPT-3": {"124M": 0.337, "350M": 0.436, "774M": 0.510, "1558M": 0.547}}

PRINTED = ("train", "val", "val_bpb", "hella")

FLOOR = 0.01  # least half-width of a band, as a share of the loss: hardware and dtypes move a correct run too
UNITS = {"val": "nats per token", "val_bpb": "bits per byte"}
CURVE = (  # settings that change the curve
    "tokenizer init_from n_layer n_head n_embd block_size vocab_size dropout norm_position batch_tokens "
    "max_steps target_loss warmup_steps max_lr min_lr schedule decay_fraction optimizer adamw_lr_scale "
    "weight_decay beta1 beta2 grad_clip max_z_score val_tokens").split()

STEP, NUMBER = Between(0, 2**53), Between(-sys.float_info.max, sys.float_info.max)
START = {"config": {"data_dir?": str, "seed": int}, "data": str}  # what is read of runs.jsonl
REFERENCE = {  # points: step, mean over the seeds, low, high; data and settings: of a comparable run
    "source": str, "data": str, "settings": {}, "seeds": Between(1, 10**6), "stream": OneOf(*UNITS),
    "points": [[STEP, NUMBER, NUMBER, NUMBER]]}


class Run(NamedTuple):
    name: str  # of its folder
    path: Path  # its log
    streams: dict[str, dict[int, float]]
    start: dict  # settings, data, versions of its latest start, by runs.jsonl; {} if there is none


# ---- reading -------------------------------------------------------------------


def parse_log(path: Path) -> dict[str, dict[int, float]]:
    """{stream: {step: value}} of a log file; raises UserError naming the line that does not parse."""
    streams = {}
    lines = read_text(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # half a line: the run was killed while it wrote
    for number, line in enumerate(lines, start=1):
        try:
            step, stream, value = line.split()
            if int(step) not in STEP:
                raise ValueError
            streams.setdefault(stream, {})[int(step)] = float(value)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {line.rstrip()[:80]!r} is not `step stream value`; "
                            f"remove the line") from error
    return streams


def read_runs(names: str) -> list[Run]:
    """The runs that a setting names, each with a name of its own."""
    runs = []
    for text in map(str.strip, names.split(",")):
        path = next((path for path in (Path(text, "log.txt"), Path(text)) if path.is_file()), None)
        if path is None:
            raise UserError(f"{text or 'an empty name'} is neither a log nor a folder with a log.txt; name a "
                            f"run's folder (make demo makes log_demo)")
        streams, starts = parse_log(path), read_jsonl(path.with_name("runs.jsonl"), START)
        name = path.resolve().parent.name if path.name == "log.txt" else path.name
        if name in [run.name for run in runs]:
            name = f"{name} ({len(runs) + 1})"
        runs.append(Run(name, path, streams, {**starts[-1]["config"], **starts[-1]} if starts else {}))
    return runs


def finite(values: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps in order, and the values at them, without those that are nan or inf."""
    steps, values = np.array(sorted(values.items()), dtype=float).reshape(-1, 2).T
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the `width` values centred on each place, an odd number; of fewer at both ends."""
    half = width // 2
    return np.array([values[max(0, i - half):i + half + 1].mean() for i in range(len(values))])


# ---- the figure of runs --------------------------------------------------------


def plot_runs(runs: list[Run], out_path: Path) -> None:
    """Draw losses, and HellaSwag accuracy beside them if any log has it; print the last values."""
    for run in runs:
        if not {"train", "val", "hella"} & run.streams.keys():
            raise UserError(f"{run.path} has no train, val or hella values: nothing to draw; wait for the "
                            f"first step, or name another log")
    has_hella = any(len(finite(run.streams.get("hella", {}))[0]) for run in runs)
    figure, axes = pyplot().subplots(1, 1 + has_hella, figsize=(10, 5), squeeze=False, layout="constrained")
    for i, run in enumerate(runs):
        color, val_color = f"C{i}", "black" if len(runs) == 1 else f"C{i}"
        (train_steps, train), (val_steps, val), (hella_steps, hella) = (
            finite(run.streams.get(stream, {})) for stream in ("train", "val", "hella"))
        if len(train):
            width = len(train) // 100 | 1  # odd, to be centred
            axes[0, 0].plot(train_steps, train, color=color, alpha=0.25, linewidth=0.8)
            axes[0, 0].plot(train_steps, smooth(train, width), color=color, linewidth=1.2,
                            label=f"{run.name}: train (mean of {width} steps)")
        if len(val):
            axes[0, 0].plot(val_steps, val, color=val_color, linestyle="--", marker="o", markersize=3,
                            label=f"{run.name}: val (last {val[-1]:.3f}, best {val.min():.3f})")
        if len(hella):
            axes[0, 1].plot(hella_steps, hella, color=color, marker="o", markersize=3,
                            label=f"{run.name} (last {hella[-1]:.3f})")
        draw_marks(axes[0, 0], run.streams, color, val_color, f"{run.name}: ", i)
        last = {stream: finite(run.streams.get(stream, {}))[1][-1:] for stream in PRINTED}
        words = ", ".join(f"{stream} {values[0]:.6g}" for stream, values in last.items() if len(values))
        print(f"{run.name}, last values: {words or 'none yet'}")
    for loss in {run.streams.get("unigram", {}).get(0, math.nan) for run in runs}:  # equal for equal data
        if math.isfinite(loss):
            axes[0, 0].axhline(loss, color="gray", linestyle=":", label=f"unigram model on val ({loss:.2f})")
    on_edu = all("edu_fineweb" in Path(run.start.get("data_dir", "")).name for run in runs)
    if on_edu and (baseline := VAL_LOSS_GPT2.get(model_size)):
        axes[0, 0].axhline(baseline, color="red", linestyle=":",
                           label=f"OpenAI GPT-2 {model_size} on FineWeb-Edu val ({baseline:.2f})")
    for who, color in (("GPT-2", "red"), ("GPT-3", "green")) if has_hella and model_size else ():
        axes[0, 1].axhline(HELLASWAG[who][model_size], color=color, linestyle=":",
                           label=f"OpenAI {who} {model_size} ({HELLASWAG[who][model_size]:.3f})")
    log_ticks(axes[0, 0].yaxis)
    for axis, *words in zip(axes[0], ("loss (nats per token, log scale)", "accuracy (chance is 0.25)"),
                            ("Loss", "HellaSwag, completion style, mean per token")):
        finish(axis, *words)
    figure.set_figheight(4 + 0.2 * max(len(axis.get_legend().get_texts()) for axis in axes[0]))
    save_figure(figure, out_path)


def draw_marks(axis, streams: dict, train_color: str, val_color: str, name: str = "", row: int = 0) -> None:
    """Crosses at the foot of a panel where a step was skipped or a loss is nan or inf; a row for each run."""
    bad = {stream: {step for step, value in streams.get(stream, {}).items() if not math.isfinite(value)}
           for stream in ("train", "val")}
    skipped = set(streams.get("skipped", {}))
    for what, steps, color, marker in (("skipped", skipped, train_color, "x"),
                                       ("train nan or inf", bad["train"] - skipped, train_color, "x"),
                                       ("val nan or inf", bad["val"], val_color, "+")):
        if steps:
            axis.plot(sorted(steps), [0.02 + 0.03 * row] * len(steps), color=color, marker=marker,
                      linestyle="none", transform=axis.get_xaxis_transform(),
                      label=f"{name}{what} ({len(steps)})")


def finish(axis, ylabel: str, title: str) -> None:
    """Grid and labels of a panel; its legend below it, where it hides no curve."""
    axis.set(xlabel="optimizer step", ylabel=ylabel, title=title)
    axis.grid(alpha=0.3)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4, frameon=False, fontsize=9)


# ---- comparisons ---------------------------------------------------------------


def differing(a: dict, b: dict, keys: Iterable[str] = CURVE) -> str:
    """The settings that are known of both and differ."""
    return "; ".join(f"{key}={a[key]} and {b[key]}" for key in keys if {key} <= a.keys() & b.keys()
                     and a[key] != b[key])


def warn_of_other_data(ours: str, whose: str, theirs: str) -> None:
    if ours != theirs:
        print(f"data: {ours}; {whose}: {theirs}. Losses on different data are not directly comparable")


def draw_beside(curves: dict[str, np.ndarray], title: str, unit: str, zero: str, out_path: Path) -> None:
    """Write a figure of curves with bands, and of their differences from the first, which `zero` names.

    curves: {label: (4, steps)}, whose rows are step, loss, low and high, at the same steps.
    """
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 5), layout="constrained")
    _, first, *_ = next(iter(curves.values()))
    for axis, base in zip(axes, (0, first)):
        for i, (label, (steps, loss, low, high)) in enumerate(curves.items()):
            axis.plot(steps, loss - base, color=f"C{i}", marker="o", markersize=3, label=label)
            axis.fill_between(steps, low - base, high - base, color=f"C{i}", alpha=0.25, linewidth=0)
    log_ticks(axes[0].yaxis)
    finish(axes[0], f"loss ({unit}, log scale)", title)
    finish(axes[1], f"difference ({unit})", f"Difference from {zero}")
    save_figure(figure, out_path)


# ---- two groups of runs --------------------------------------------------------


def read_group(names: str, n_seeds: int = 2) -> list[Run]:
    """At least `n_seeds` finished runs that differ by the seed alone; UserError for any others."""
    runs = read_runs(names)
    keys = {*CURVE, "data"} - {"init_from"}  # each seed may begin with weights of its own
    for run in runs:
        val = run.streams.get("val", {})
        if not (run.start and val and np.isfinite([*val.values()]).all()):
            raise UserError(f"{run.name} has no runs.jsonl with its seed, no val loss, or one that is nan or "
                            f"inf; name finished runs of train_gpt2.py")
        if max(val) != run.start.get("max_steps"):
            raise UserError(f"{run.name} has its latest val loss at step {max(val):,} of "
                            f"{run.start.get('max_steps')}: it is not finished, or target_loss stopped it; "
                            f"name runs that reached max_steps")
        if others := differing(runs[0].start, run.start, keys):
            raise UserError(f"{runs[0].name} and {run.name} differ in more than the seed: {others}; name "
                            f"runs with the same settings and data")
    seeds = [run.start["seed"] for run in runs]
    if len(set(seeds)) < max(n_seeds, len(runs)):
        raise UserError(f"{names}: seeds {', '.join(map(str, seeds))}, and estimating how much a loss varies "
                        f"takes at least {n_seeds} different ones; train with another --seed=N")
    return runs


def series(runs: list[Run], stream: str) -> tuple[list[int], np.ndarray]:
    """The steps at which all runs have a value, and the values, (runs, steps)."""
    steps = sorted(set.intersection(*(set(run.streams.get(stream, {})) for run in runs)))
    if not steps:
        raise UserError(f"there is no step at which all of {', '.join(run.name for run in runs)} have "
                        f"{stream}; name runs of train_gpt2.py with the same --val_interval")
    return steps, np.array([[run.streams[stream][step] for step in steps] for run in runs])


def incomplete_beta(p: float, q: float, x: float) -> float:
    """The regularized I_x(p, q), by a series of positive terms (NIST DLMF 8.17.8)."""
    if x > 0.5:
        return 1 - incomplete_beta(q, p, 1 - x)
    term = total = math.exp(math.lgamma(p + q) - math.lgamma(p + 1) - math.lgamma(q)) * x**p * (1 - x)**q
    n = 0
    while term > 1e-17 * total:
        term *= (p + q + n) / (p + 1 + n) * x
        total, n = total + term, n + 1
    return total


def welch(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float, float]:
    """(mean of b minus mean of a, its standard error, degrees of freedom, two-sided p): Welch (1947)."""
    of_a, of_b = (group.var(ddof=1) / len(group) for group in (a, b))
    difference, se = b.mean() - a.mean(), math.sqrt(of_a + of_b)
    df = (of_a + of_b)**2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    return difference, se, df, incomplete_beta(df / 2, 0.5, df / (df + (difference / se)**2))


def seeds_needed(effect: float, a: np.ndarray, b: np.ndarray) -> float:
    """Roughly the runs per group that detect a difference of `effect` with 80% power at 5%, two-sided, if
    losses vary as in a and b; inf for no effect. The normal approximation with Guenther's (1981) correction
    for the t test, which below 10 runs is one too low."""
    if not effect:
        return math.inf
    z, z_power = (statistics.NormalDist().inv_cdf(share) for share in (0.975, 0.8))
    variance = a.var(ddof=1) + b.var(ddof=1)
    n = math.ceil((z + z_power)**2 * variance / effect**2 + z**2 / 4)
    return max(3, n + (n < 10))


def compare_groups(groups: dict[str, list[Run]], out_path: Path) -> None:
    """Print and draw whether the runs of group b end with another val loss than those of group a."""
    runs = [run for group in groups.values() for run in group]
    of_a, of_b = groups["a"][0].start, groups["b"][0].start
    if both := {run.path.resolve() for run in groups["a"]} & {run.path.resolve() for run in groups["b"]}:
        raise UserError(f"{both.pop()} is in both groups; name each run once")
    if others := differing(of_a, of_b, ("max_steps", "val_tokens")):
        raise UserError(f"a and b have {others}: their final val losses are not comparable; name runs with "
                        f"the same number of steps and of val tokens")
    stream = "val_bpb" if differing(of_a, of_b, ["tokenizer"]) else "val"
    steps, values = series(runs, stream)
    losses = dict(zip(groups, np.split(values, [len(groups["a"])])))  # (runs, steps) each
    a, b = (group[:, -1] for group in losses.values())
    for (name, group), final in zip(groups.items(), (a, b)):
        each = ", ".join(f"{run.name} {loss:.4f}" for run, loss in zip(group, final))
        print(f"{name}: mean {final.mean():.4f}, standard deviation {final.std(ddof=1):.4f} ({each})")
        if not np.ptp(final):
            raise UserError(f"equal losses in {name}: copies of one run; name runs with different seeds")
    print(f"a and b differ in {differing(of_a, of_b) or 'no setting'}")
    warn_of_other_data(of_a["data"], "that of b", of_b["data"])
    if {run.start["seed"] for run in groups["a"]} & {run.start["seed"] for run in groups["b"]}:
        print("a and b share seeds; Welch's t test ignores this pairing")
    difference, se, df, p = welch(a, b)
    print(f"final val loss, step {steps[-1]:,}, b minus a: {difference:+.4f} {UNITS[stream]}, standard error "
          f"{se:.4f}, p = {p:.2g} (Welch's t test, {df:.1f} degrees of freedom): "
          f"{'a difference' if p < 0.05 else 'no difference shown'} at the 5% level\n"
          f"detecting half of it takes roughly {seeds_needed(difference / 2, a, b):,} seeds per group (80% "
          f"power, 5% two-sided, the same spread)")

    curves = {f"{name}: {', '.join(run.name for run in groups[name][:3])}{', ...' * (len(values) > 3)}":
              np.array([steps, values.mean(axis=0), values.min(axis=0), values.max(axis=0)])
              for name, values in losses.items()}
    draw_beside(curves, "Val loss: mean, lowest and highest of a group", UNITS[stream], "the mean of a",
                out_path)


# ---- a run and a reference -----------------------------------------------------


def band(steps: list[int], values: np.ndarray, floor: np.ndarray) -> list[list[float]]:
    """[step, mean, low, high] of each step: the range expected for a run with another seed.

    values: (seeds, steps); floor: minimum half-width, (steps,). A new value differs from the mean of n by
    sd sqrt(1 + 1/n), its own spread plus the mean's; a band is three times that to either side. The sd of
    three seeds at one step is uncertain, and by itself would put a correct run outside at one step in ten
    (Student's t, 2 degrees of freedom): so the sd is taken as at least its median over the steps.
    """
    mean, sd = values.mean(axis=0), values.std(axis=0, ddof=1)
    half = np.maximum(3 * np.maximum(sd, np.median(sd)) * math.sqrt(1 + 1 / len(values)), floor)
    return [list(row) for row in zip(steps, mean.tolist(), (mean - half).tolist(), (mean + half).tolist())]


def make_reference(runs: list[Run], path: Path) -> None:
    """Write the mean val loss, in bits per byte, and the band of runs that differ by the seed alone."""
    if path.exists() or path.suffix != ".json":
        raise UserError(f"ref={path} {'already exists' if path.exists() else 'is not a .json'}; give another "
                        f"name: --ref=NAME.json")
    steps, values = series(runs, "val_bpb")
    start = runs[0].start
    reference = {
        "source": f"{len(runs)} runs, band mean +- max(3 sd sqrt(1 + 1/{len(runs)}), {FLOOR:.0%} of loss); "
                  + "; ".join(f"seed {run.start['seed']}, git {run.start.get('git')}, "
                              f"{run.start.get('device')}" for run in runs),
        "data": start["data"],
        "settings": {key: start[key] for key in CURVE if key in start
                     and {run.start.get(key) for run in runs} == {start[key]}},
        "seeds": len(runs), "stream": "val_bpb", "points": band(steps, values, FLOOR * values.mean(axis=0))}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in reference.items())
    write_atomically(path, f"{{{lines}}}\n".encode())
    print(f"{path}: {len(steps)} steps, {steps[0]} to {steps[-1]}, {reference['source']}")


def gave_up(run: Run) -> bool:
    """Whether the latest train step was skipped, or its loss is nan or inf."""
    train = run.streams.get("train", {0: 0.0})
    return max(train) in run.streams.get("skipped", {}) or not math.isfinite(train[max(train)])


def compare(run: Run, path: Path, out_path: Path) -> bool:
    """Print and draw a run beside a reference; False if it gave up, or a value is outside the band."""
    reference = read_json(path, REFERENCE)
    points, stream = reference["points"], reference["stream"]
    if not points:
        raise UserError(f"{path} has no points; make it again with --make")
    if others := differing(reference["settings"], run.start):
        raise UserError(f"{path} and {run.name} have different settings: {others}; compare with a reference "
                        f"for these settings (--make makes one)")
    print(f"reference: {reference['source']}")
    warn_of_other_data(run.start.get("data", "unknown (no runs.jsonl)"), "the reference's", reference["data"])

    ours = run.streams.get(stream, {})
    rows = [[f"{step}", f"{ours[step]:.4f}", f"{mean:.4f}", f"{ours[step] - mean:+.4f}",
             f"{low:.4f} to {high:.4f}", "inside" if low <= ours[step] <= high else "OUTSIDE"]  # nan too
            for step, mean, low, high in points if step in ours]
    if not rows:
        raise UserError(f"{run.name} has no {stream} at any step of {path}: "
                        f"{', '.join(f'{point[0]}' for point in points[:3])}, ...; compare again later, or "
                        f"train with a --val_interval that meets these")
    expected = np.array(points).T
    values = np.array([ours.get(int(step), math.nan) for step in expected[0]])
    curves = {"reference": expected, run.name: np.array([expected[0], values, values, values])}
    draw_beside(curves, "Val loss", UNITS[stream], "the reference", out_path)
    columns = 6 if reference["seeds"] > 1 else 4
    heading = ["step", "run", "reference", "difference", "band", ""]
    print(f"val loss, {UNITS[stream]}", "", *table(heading[:columns], [row[:columns] for row in rows]), "",
          sep="\n")
    outside, latest, end = [row for row in rows if row[-1] == "OUTSIDE"], rows[-1][0], f"{points[-1][0]}"
    failed = latest != end and gave_up(run)
    if failed:
        print(f"{run.name} gave up at step {max(run.streams['train']):,}: its loss was nan, inf or a spike")
    if columns == 4:
        print("no verdict: this reference is of one seed and has no band")
        return not failed
    print(f"{'' if latest == end else 'so far '}{'outside' if outside else 'inside'}: "
          f"{len(rows) - len(outside)} of {len(rows)} values up to step {latest} of {end} are in the band"
          + (f"; the first that is not is at step {outside[0][0]}" if outside else ""))
    return not (outside or failed)


def main() -> int:
    """The exit code: 1 for a run that gave up or is outside its reference's band, otherwise 0."""
    if make and not ref:
        raise UserError("--make has no file to write; name the reference too: --ref=NAME.json")
    if bool(a) != bool(b):
        raise UserError("--a and --b are compared with each other; name the runs of both")
    if make:
        make_reference(read_group(make, 3), Path(ref))
        return 0
    groups = {"a": read_group(a), "b": read_group(b)} if a else {}
    runs = groups["a"] if groups else read_runs(log or log_dir)
    if sum(map(bool, (groups, ref, model_size))) > 1 or (ref and len(runs) > 1):
        raise UserError("several runs, --ref of one run, and --a with --b are different figures; draw one")
    name = "groups.png" if groups else "comparison.png" if ref else "log_plot.png"
    out_path = Path(out or runs[0].path.with_name(name))
    inside = True
    if groups:
        compare_groups(groups, out_path)
    elif ref:
        inside = compare(runs[0], Path(ref), out_path)
    else:
        plot_runs(runs, out_path)
    print(f"figure: {out_path}")
    return int(not inside)


if __name__ == "__main__":
    configure(globals())
    sys.exit(main())
