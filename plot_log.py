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

--model_size draws OpenAI's results. Their val loss is on FineWeb-Edu, so it is drawn only if every run was
trained on that: its runs.jsonl names a data_dir whose dataset (in the manifest, otherwise the folder's name)
contains "fineweb" and "edu". --val_baseline draws it anyway.

--a and --b: at least two seeds each, and nothing else differs within a group. Prints the difference of the
last val losses, its standard error, p by Welch's t test, and how many seeds per group detect half of it.

--ref: exit code 1 if a value is outside the bands, 2 if the two cannot be compared, as with different
settings; a run still in training is compared up to its latest step. Bits per byte, and nats per token less a
unigram model's, carry over best to a slightly different corpus. A reference from one seed has no bands: the
distance from it is printed, without a verdict.
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
from shards import read_manifest

log_dir: PathName = "log"  # a run's folder with log.txt, or a log file itself; several separated by commas
log: PathName = ""  # a log file, or several separated by commas, in place of log_dir
out: PathName = ""  # the figure, .png, .svg or .pdf; empty = beside the first log
model_size: OneOf("", "124M", "350M", "774M", "1558M") = ""  # draw OpenAI's results for it; empty = none
val_baseline = False  # draw OpenAI's val loss on FineWeb-Edu even if the runs are not known to use that data
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

# The streams with bands, each with the one whose mean its narrowest band is a share of: val_minus_unigram
# itself crosses zero.
BANDED = {"val_bpb": "val_bpb", "val_minus_unigram": "val"}
FLOOR = 0.01  # that share: other hardware and dtypes move a correct run too
TITLES = {"val": ("Val loss", "nats per token"), "val_bpb": ("Val loss", "bits per byte"),
          "val_minus_unigram": ("Val loss less a unigram model's", "nats per token")}
CURVE = ("tokenizer n_layer n_head n_embd block_size vocab_size dropout norm_position batch_tokens max_steps "
         "warmup_steps max_lr min_lr schedule decay_fraction optimizer weight_decay beta1 beta2 grad_clip "
         "max_z_score val_tokens"
         ).split()  # settings that change the curve

STEP, NUMBER = Between(0, 2**53), Between(-sys.float_info.max, sys.float_info.max)
START = {"config": {"data_dir?": str, "seed": int}, "data": str}  # what is read of runs.jsonl
REFERENCE = {  # "bands": [step, mean, low, high]; "data" and "settings": what a comparable run has
    "source": str, "data": str, "settings": {}, "val": [[STEP, NUMBER]],
    "bands": {f"{stream}?": [[STEP, NUMBER, NUMBER, NUMBER]] for stream in BANDED}}


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
    """The runs that a setting names, each with a name of its own and the stream val_minus_unigram."""
    runs = []
    for text in names.split(","):
        path = next((path for path in (Path(text, "log.txt"), Path(text)) if path.is_file()), None)
        if path is None:
            raise UserError(f"{text or 'an empty name'} is neither a log nor a folder with a log.txt; name a "
                            f"run's folder (make demo makes log_demo)")
        streams, starts = parse_log(path), read_jsonl(path.with_name("runs.jsonl"), START)
        if 0 in streams.get("unigram", {}):
            streams["val_minus_unigram"] = {step: value - streams["unigram"][0]
                                            for step, value in streams.get("val", {}).items()}
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


def why_no_val_baseline(runs: list[Run]) -> str:
    """Why FineWeb-Edu's val loss is no baseline for these runs; empty if all of them were trained on that."""
    for run in runs:
        folder = run.start.get("data_dir", "")
        if not folder:
            return f"no runs.jsonl beside {run.path} names its data"
        settings = (read_manifest(folder) or {}).get("settings", {})
        data = str(settings.get("dataset") or Path(folder).name)
        if "fineweb" not in data.lower() or "edu" not in data.lower():
            return f"{run.name} was trained on {data}"
    return ""


# ---- the figure of runs --------------------------------------------------------


def plot_runs(runs: list[Run], out_path: Path) -> None:
    """Draw losses, and HellaSwag accuracy beside them if any log has it; print the last values."""
    for run in runs:
        if not {"train", "val", "hella"} & run.streams.keys():
            raise UserError(f"{run.path} has no train, val or hella values: nothing to draw; wait for the "
                            f"first step, or name another log")
    baseline = VAL_LOSS_GPT2.get(model_size)
    reason = why_no_val_baseline(runs) if baseline and not val_baseline else ""
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
    if baseline and not reason:
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
    if reason:
        print(f"note: OpenAI GPT-2 {model_size}'s val loss on FineWeb-Edu is not drawn: {reason}; "
              f"--val_baseline draws it anyway")


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


def draw_band(axis, steps, middle, low, high, color: str, label: str) -> None:
    axis.plot(steps, middle, color=color, marker="o", markersize=3, label=label)
    axis.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)


def finish(axis, ylabel: str, title: str) -> None:
    """Grid and labels of a panel; its legend below it, where it hides no curve."""
    axis.set(xlabel="optimizer step", ylabel=ylabel, title=title)
    axis.grid(alpha=0.3)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4, frameon=False, fontsize=9)


# ---- two groups of runs --------------------------------------------------------


def differing(a: dict, b: dict, keys: Iterable[str] = CURVE) -> str:
    """The settings that are known of both and differ."""
    return "; ".join(f"{key}={a[key]} and {b[key]}" for key in keys if {key} <= a.keys() & b.keys()
                     and a[key] != b[key])


def read_group(names: str) -> list[Run]:
    """Two runs or more that differ by the seed alone, with finite val losses; UserError for any others."""
    runs = read_runs(names)
    for run in runs:
        losses = [*run.streams.get("val", {}).values()]
        if not (run.start and losses and np.isfinite(losses).all()):
            raise UserError(f"{run.name} has no runs.jsonl with its seed, no val loss, or one that is nan or "
                            f"inf; name finished runs of train_gpt2.py")
        if others := differing(runs[0].start, run.start, (*CURVE, "data")):
            raise UserError(f"{runs[0].name} and {run.name} differ in more than the seed: {others}; name "
                            f"runs with the same settings and data")
    seeds = [run.start["seed"] for run in runs]
    if len(set(seeds)) < max(2, len(runs)):
        raise UserError(f"{names}: seeds {', '.join(map(str, seeds))}, and estimating how much a loss varies "
                        f"takes at least two different ones; train with another --seed=N")
    return runs


def series(runs: list[Run], stream: str) -> tuple[list[int], np.ndarray]:
    """The steps at which all runs have a value, and the values, (runs, steps)."""
    steps = sorted(set.intersection(*(set(run.streams[stream]) for run in runs)))
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
    """(mean of b less mean of a, its standard error, degrees of freedom, two-sided p): Welch (1947)."""
    of_a, of_b = (group.var(ddof=1) / len(group) for group in (a, b))
    difference, se = b.mean() - a.mean(), math.sqrt(of_a + of_b)
    df = (of_a + of_b)**2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    return difference, se, df, incomplete_beta(df / 2, 0.5, df / (df + (difference / se)**2))


def seeds_needed(effect: float, a: np.ndarray, b: np.ndarray) -> float:
    """Runs per group that detect a difference of `effect` with 80% power at 5%, two-sided, if losses vary as
    in a and b: the normal approximation with Guenther's (1981) correction for the t test. inf for none."""
    z, z_power = (statistics.NormalDist().inv_cdf(share) for share in (0.975, 0.8))
    variance = a.var(ddof=1) + b.var(ddof=1)
    return math.ceil((z + z_power)**2 * variance / effect**2 + z**2 / 4) if effect else math.inf


def compare_groups(groups: dict[str, list[Run]], out_path: Path) -> None:
    """Print and draw whether the runs of group b end with another val loss than those of group a."""
    runs = [run for group in groups.values() for run in group]
    steps, values = series(runs, "val")
    for run in runs:
        if max(run.streams["val"]) > steps[-1]:
            raise UserError(f"{run.name} has a val loss at step {max(run.streams['val']):,}, and another run "
                            f"has none there; compare finished runs of the same length")
    losses = dict(zip(groups, np.split(values, [len(groups["a"])])))  # (runs, steps) each
    a, b = (group[:, -1] for group in losses.values())
    for (name, group), last in zip(groups.items(), (a, b)):
        each = ", ".join(f"{run.name} {loss:.4f}" for run, loss in zip(group, last))
        print(f"{name}: mean {last.mean():.4f}, standard deviation {last.std(ddof=1):.4f} ({each})")
    print(f"a and b differ in {differing(runs[0].start, runs[-1].start, (*CURVE, 'data')) or 'no setting'}")
    if not a.std() + b.std() > 0:
        raise UserError("equal losses in each group: copies of one run; name runs with different seeds")
    difference, se, df, p = welch(a, b)
    print(f"last val loss, step {steps[-1]:,}, b less a: {difference:+.4f} nats per token, standard error "
          f"{se:.4f}, p = {p:.2g} (Welch's t test, {df:.1f} degrees of freedom): "
          f"{'a difference' if p < 0.05 else 'no difference shown'} at the 5% level\n"
          f"detecting half of it takes {seeds_needed(difference / 2, a, b):,} seeds per group (80% power, 5% "
          f"two-sided, the same spread)")

    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 5), layout="constrained")
    for i, (name, values) in enumerate(losses.items()):
        label = f"{name}: {', '.join(run.name for run in groups[name][:3])}{', ...' * (len(values) > 3)}"
        for axis, shown in ((left, values), (right, values - losses["a"].mean(axis=0))):
            draw_band(axis, steps, shown.mean(axis=0), shown.min(axis=0), shown.max(axis=0), f"C{i}", label)
    log_ticks(left.yaxis)
    finish(left, "loss (nats per token, log scale)", "Val loss: mean, lowest and highest of a group")
    finish(right, "difference (nats per token)", "The same less the mean of a")
    save_figure(figure, out_path)


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
    """Write the mean val losses and the bands of runs that differ by the seed alone."""
    if path.exists() or path.suffix != ".json":
        raise UserError(f"ref={path} {'exists' if path.exists() else 'is not a .json'}; give another name: "
                        f"--ref=NAME.json")
    if any(stream not in run.streams for run in runs for stream in BANDED):
        raise UserError(f"make={make}: a log has no {' or '.join(BANDED)}; name runs of train_gpt2.py")
    found = {stream: series(runs, stream) for stream in ("val", *BANDED)}
    start, steps = runs[0].start, found["val"][0]
    reference = {
        "source": f"{len(runs)} runs, bands mean +- max(3 sd sqrt(1 + 1/{len(runs)}), {FLOOR:.0%} of loss); "
                  + "; ".join(f"seed {run.start['seed']}, git {run.start.get('git')}, "
                              f"{run.start.get('device')}" for run in runs),
        "data": start["data"], "settings": {key: start[key] for key in CURVE if key in start},
        "val": [*zip(steps, found["val"][1].mean(axis=0).tolist())],
        "bands": {stream: band(*found[stream], FLOOR * found[scale][1].mean(axis=0))
                  for stream, scale in BANDED.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in reference.items())
    write_atomically(path, f"{{{lines}}}\n".encode())
    print(f"{path}: {len(steps)} steps, {steps[0]} to {steps[-1]}, {reference['source']}")


def compare(run: Run, path: Path, out_path: Path) -> bool:
    """Print and draw a run beside a reference; False if it has bands and a value is outside."""
    reference = read_json(path, REFERENCE)
    if others := differing(reference["settings"], run.start):
        raise UserError(f"{path} and {run.name} have different settings: {others}; compare with a reference "
                        f"for these settings (--make makes one)")
    print(f"reference: {reference['source']}")
    if run.start.get("data") != reference["data"]:
        print(f"data: {run.start.get('data', 'unknown (no runs.jsonl)')}; the reference's: "
              f"{reference['data']}. Losses on different data are not directly comparable")

    # a reference without bands: val, and a band of no width
    expected = reference["bands"] or {"val": [[step, *3 * [mean]] for step, mean in reference["val"]]}
    figure, axes = pyplot().subplots(2, len(expected), figsize=(10, 8), squeeze=False, layout="constrained")
    rows = []
    for (stream, points), (top, bottom) in zip(expected.items(), axes.T):
        ours, (title, unit) = run.streams.get(stream, {}), TITLES[stream]
        steps, mean, low, high = np.array(points).reshape(-1, 4).T
        value = np.array([ours.get(int(step), math.nan) for step in steps])
        for axis, zero in ((top, 0), (bottom, mean)):
            draw_band(axis, steps, mean - zero, low - zero, high - zero, "gray", "reference")
            axis.plot(steps, value - zero, color="C0", marker="o", markersize=3, label=run.name)
        rows += [[f"{step}", stream, f"{ours[step]:.4f}", f"{mean:.4f}", f"{ours[step] - mean:+.4f}",
                  f"{low:.4f} to {high:.4f}", "inside" if low <= ours[step] <= high else "OUTSIDE"]  # nan too
                 for step, mean, low, high in points if step in ours]
        finish(top, f"loss ({unit})", title)
        finish(bottom, f"difference ({unit})", "Run less reference")
    if not rows:
        raise UserError(f"{run.name} has no {' or '.join(expected)} at any step of {path}: "
                        f"{', '.join(f'{point[0]}' for point in points[:3])}, ...; compare again later, or "
                        f"train with a --val_interval that meets these")
    save_figure(figure, out_path)
    heading = ["step", "stream", "run", "reference", "difference", "band", ""]
    if not reference["bands"]:
        print("", *table(heading[:5], [row[:5] for row in rows]), "", sep="\n")
        print("no verdict: this reference is of one seed and has no bands")
        return True
    outside, last, end = [row for row in rows if row[-1] == "OUTSIDE"], rows[-1][0], str(points[-1][0])
    print("", *table(heading, rows), "", sep="\n")
    print(f"{'' if last == end else 'so far '}{'outside' if outside else 'inside'}: "
          f"{len(rows) - len(outside)} of {len(rows)} values up to step {last} of {end} are in the bands"
          + (f"; the first that is not is {outside[0][1]} at step {outside[0][0]}" if outside else ""))
    return not outside


def main() -> int:
    """The exit code: 1 for a run outside its reference's bands, otherwise 0."""
    if make:
        make_reference(read_group(make), Path(ref))
        return 0
    groups = {"a": read_group(a), "b": read_group(b)} if a or b else {}
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
