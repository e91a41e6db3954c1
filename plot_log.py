"""
Draw a run's log: train and validation loss on a log scale, HellaSwag accuracy beside it when the log has it.
Or measure what the loss is made of: --report.

    python plot_log.py --log_dir=log                                 # -> log/log_plot.png
    python plot_log.py --log_dir=log --model_size=124M               # with the published baselines as lines
    python plot_log.py --log_dir=log,log_b --out=plots/compare.png   # several runs in one figure
    python plot_log.py --log=log/log.txt --out=plots/log_plot.png    # a log file by its name
    python plot_log.py --report --log_dir=log                        # -> log/report.png, log/report.csv
    python plot_log.py --report --checkpoint=gpt2 --data_dir=edu_fineweb10B

Reads LOG_DIR/log.txt (`step stream value` per line; where a step occurs twice the later line counts), also
the logs of build-nanogpt. Writes one figure and prints its path and the last values. Takes a few seconds.
Curves, means and minima leave out nan and inf. Crosses at the foot of the loss panel mark the steps where a
loss is nan or inf, and those that the guard of train_gpt2.py skipped.

--model_size draws the results of OpenAI's models. Their HellaSwag accuracies do not depend on a run's data.
Their val loss is on FineWeb-Edu, so it is drawn only if every run was trained on that: runs.jsonl beside the
log names the data_dir; the dataset in its manifest counts or, if it has none, the folder's name: it must
contain "fineweb" and "edu". Otherwise a note says why the line is missing; --val_baseline draws it anyway.

A report is of one checkpoint, by default the newest in log_dir, and takes as long as two validations:

train-val gap   along training, from the log beside the checkpoint, if there is one: val loss less the mean
                train loss of the steps within 5% of that step. A log's train loss is of batches just before
                they are learned from, with dropout. And at the checkpoint: both splits in eval mode, as many
                windows of train as of val, drawn from all of it. In a run of less than an epoch, those that
                it has had in its batches and those it has not are also shown apart.
position        loss by the tokens of context; windows begin anywhere in a document
frequency       loss by the rank of the token predicted, counted in the first 2**24 train tokens or all,
                beside that of a unigram model; "never" is never in those. The means of the bands, each times
                its share of the tokens, add up to the loss.

The val loss is that of `train_gpt2.py --eval_only`. A standard error takes windows as the unit. The CSV has a
row for each position, range of positions, band and point of the log (loss_report.py, Row).

The figure of a log is drawn anew where there is one. A report was measured: its files are not overwritten.
"""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np

from configurator import Between, OneOf, PathName, UserError, configure
from files import check, read_text, write_atomically
from shards import read_manifest

log_dir: PathName = "log"  # a run's folder with log.txt, or a log file itself; several separated by commas
log: PathName = ""  # a log file, or several separated by commas, in place of log_dir
out: PathName = ""  # the figure, .png, .svg or .pdf; empty = log_plot.png or report.png beside the first log
model_size: OneOf("", "124M", "350M", "774M", "1558M") = ""  # draw OpenAI's results for it; empty = none
val_baseline = False  # draw OpenAI's val loss on FineWeb-Edu even if the runs are not known to use that data
report = False  # measure what a checkpoint's loss is made of; the settings below are for this
checkpoint: PathName = ""  # a .pt file, a folder whose newest is meant, gpt2, ...; empty = newest in log_dir
data_dir: PathName = ""  # folder of token shards; empty = the one that the checkpoint was trained on
val_tokens: Between(0, 10**12) = 0  # the first N of val, N of train; 0 = as the run, or 2**20
device = "auto"  # auto|cpu|cuda|cuda:1|mps
dtype: OneOf("auto", "float32", "bfloat16", "float16") = "auto"  # of matrix products
seed: Between(0, 2**63 - 1) = 1337  # of the choice of train windows

# Quoted from build-nanogpt's notebook: loss of OpenAI's checkpoint on FineWeb-Edu's val shard; HellaSwag of
# OpenAI's GPT-2 in completion style, and of GPT-3 (Brown et al. 2020, table H.1), whose 350M is GPT-3 Medium.
VAL_LOSS_GPT2 = {"124M": 3.2924}
HELLASWAG_GPT2 = {"124M": 0.294463, "350M": 0.375224, "774M": 0.431986, "1558M": 0.488946}
HELLASWAG_GPT3 = {"124M": 0.337, "350M": 0.436, "774M": 0.510, "1558M": 0.547}

# of a report's splits: names and colours
SPLITS = {"val": "val", "train": "train", "train seen": "train seen by the run",
          "train unseen": "train not seen yet"}
COLORS = {"val": "C1", "train": "C0", "train seen": "C2", "train unseen": "C4"}


def parse_log(path: Path) -> dict[str, dict[int, float]]:
    """{stream: {step: value}} of a log file; raises UserError naming the line that does not parse."""
    streams = {}
    lines = read_text(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # half a line: the run was killed while it wrote
    for number, line in enumerate(lines, start=1):
        try:
            step, stream, value = line.split()
            if int(step) not in Between(0, 2**53):
                raise ValueError
            streams.setdefault(stream, {})[int(step)] = float(value)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: got {line.rstrip()[:80]!r}, wanted `step stream value`; "
                            f"remove the line") from error
    return streams


def find_log(name: str) -> Path:
    """The log file that a folder or file name means."""
    path = Path(name)
    for candidate in (path / "log.txt", path):
        if candidate.is_file():
            return candidate
    raise UserError(f"{name or 'an empty name'} is no log and no folder with a log.txt; name a run's folder "
                    f"(make demo makes log_demo)")


def last_start(log_path: Path) -> dict:
    """The newest start in the runs.jsonl beside a log: settings, data, versions; {} if there is none."""
    path = log_path.with_name("runs.jsonl")
    lines = read_text(path).splitlines() if path.exists() else []
    if not lines:
        return {}
    place = f"{path}, line {len(lines)}"
    try:
        record = json.loads(lines[-1])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error}); remove the line") from error
    return check(record, {"config": {"data_dir?": str, "seed": int}, "data": str}, place)


def why_no_val_baseline(log_paths: list[Path]) -> str:
    """Why FineWeb-Edu's val loss is no baseline for these runs; empty if all of them were trained on that."""
    for path in log_paths:
        folder = last_start(path).get("config", {}).get("data_dir", "")
        if not folder:
            return f"no runs.jsonl beside {path} names its data"
        settings = (read_manifest(folder) or {}).get("settings", {})
        data = str(settings.get("dataset") or Path(folder).name)
        if "fineweb" not in data.lower() or "edu" not in data.lower():
            return f"{path} is of a run on {data}"
    return ""


def finite(values: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps in order, and the values at them, without those that are nan or inf."""
    steps, values = np.array(sorted(values.items()), dtype=float).reshape(-1, 2).T
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def marked_steps(streams: dict[str, dict[int, float]]) -> dict[str, list[int]]:
    """{what: steps} that a figure of losses marks: skipped ones, and those with a loss of nan or inf."""
    bad = {stream: {step for step, value in streams.get(stream, {}).items() if not math.isfinite(value)}
           for stream in ("train", "val")}
    skipped = set(streams.get("skipped", {}))
    found = {"skipped": skipped, "train nan or inf": bad["train"] - skipped, "val nan or inf": bad["val"]}
    return {what: sorted(steps) for what, steps in found.items() if steps}


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the `width` values centred on each place, an odd number; of fewer at both ends."""
    half = width // 2
    return np.array([values[max(0, i - half):i + half + 1].mean() for i in range(len(values))])


def draw(logs: dict[str, dict], out_path: Path, with_val_baseline: bool) -> None:
    """One panel of losses, and one of HellaSwag accuracy if any log has it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    has_hella = any(len(finite(streams.get("hella", {}))[0]) for streams in logs.values())
    figure, axes = plt.subplots(1, 1 + has_hella, figsize=(14 if has_hella else 8, 5), squeeze=False,
                                layout="constrained")
    loss_axis = axes[0, 0]
    for i, (name, streams) in enumerate(logs.items()):
        color = f"C{i}"
        val_color = "black" if len(logs) == 1 else color
        train_steps, train = finite(streams.get("train", {}))
        if len(train):
            width = len(train) // 100 | 1  # odd, to be centred
            loss_axis.plot(train_steps, train, color=color, alpha=0.25, linewidth=0.8)
            loss_axis.plot(train_steps, smooth(train, width), color=color, linewidth=1.2,
                           label=f"{name} train (mean of {width} steps)")
        val_steps, val = finite(streams.get("val", {}))
        if len(val):
            loss_axis.plot(val_steps, val, color=val_color, linestyle="--", marker="o", markersize=3,
                           label=f"{name} val (last {val[-1]:.3f}, best {val.min():.3f})")
        hella_steps, hella = finite(streams.get("hella", {}))
        if len(hella):
            axes[0, 1].plot(hella_steps, hella, color=color, marker="o", markersize=3,
                            label=f"{name} (last {hella[-1]:.3f})")
        unigram = streams.get("unigram", {}).get(0, math.nan)
        if math.isfinite(unigram):
            loss_axis.axhline(unigram, color="gray", linestyle=":",
                              label=f"unigram model on {name}'s val ({unigram:.2f})")
        draw_marks(loss_axis, streams, color, val_color, f"{name} ", i)
    if with_val_baseline:
        loss_axis.axhline(VAL_LOSS_GPT2[model_size], color="red", linestyle=":",
                          label=f"OpenAI GPT-2 {model_size} on FineWeb-Edu val "
                                f"({VAL_LOSS_GPT2[model_size]:.2f})")
    log_scale(loss_axis)
    loss_axis.set(xlabel="optimizer step", ylabel="loss (nats per token, log scale)", title="Loss")
    if has_hella:
        if model_size:
            for who, accuracy, color in (("GPT-2", HELLASWAG_GPT2[model_size], "red"),
                                         ("GPT-3", HELLASWAG_GPT3[model_size], "green")):
                axes[0, 1].axhline(accuracy, color=color, linestyle=":",
                                   label=f"OpenAI {who} {model_size} on HellaSwag ({accuracy:.3f})")
        axes[0, 1].set(xlabel="optimizer step", ylabel="acc_norm, completion (chance is 0.25)",
                       title="HellaSwag")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, out_path)


def draw_marks(axis, streams: dict, train_color: str, val_color: str, name: str = "", row: int = 0) -> None:
    """Crosses at the foot of a panel where a step was skipped or a loss is nan or inf; a row for each run."""
    for what, steps in marked_steps(streams).items():
        color, marker = (val_color, "+") if what == "val nan or inf" else (train_color, "x")
        axis.plot(steps, [0.02 + 0.03 * row] * len(steps), color=color, marker=marker, linestyle="none",
                  transform=axis.get_xaxis_transform(), label=f"{name}{what} ({len(steps)})")


def save_figure(figure, out_path: Path) -> None:
    """Write a figure; UserError for a suffix that is no picture's."""
    import matplotlib.pyplot as plt

    out_path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=out_path.suffix[1:], dpi=120)
    except ValueError as error:  # matplotlib lists the suffixes it knows
        raise UserError(f"out={out_path}: {error}; type --out=FIGURE.png") from error
    write_atomically(out_path, picture.getbuffer())
    plt.close(figure)


def log_scale(axis) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axis.yaxis.set_major_formatter(FuncFormatter(format_tick))
    axis.yaxis.set_minor_formatter(FuncFormatter(no_tick))


def format_tick(value, position):
    return f"{value:g}"


def no_tick(value, position):
    return ""


# ---- the report ----------------------------------------------------------------


def pick(rows: list, kind: str, split: str) -> list:
    return [row for row in rows if row.kind == kind and row.split == split]


def draw_report(found, title: str, streams: dict, out_path: Path) -> None:
    """Loss by position and by frequency; where there is a log, the loss and the gap along training too."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    has_log = bool(pick(found.rows, "log", "val"))
    panels = [["loss", "position"], ["gap", "band"]] if has_log else [["position", "band"]]
    figure, axes = plt.subplot_mosaic(panels, figsize=(14, 9.5 if has_log else 5.5), layout="constrained")
    figure.suptitle(title)
    if has_log:
        draw_training(axes["loss"], axes["gap"], found, streams)
    draw_positions(axes["position"], found)
    draw_bands(axes["band"], found)
    for axis in axes.values():
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, out_path)


def draw_training(loss_axis, gap_axis, found, streams: dict) -> None:
    """The losses in the log; and val less train, from the log and as measured."""
    from loss_report import train_around

    steps, values = finite(streams["train"])
    loss_axis.plot(steps, values, color=COLORS["train"], alpha=0.25, linewidth=0.8)
    shown = np.unique(np.geomspace(1, len(steps), 200).astype(int)) - 1
    loss_axis.plot(steps[shown], [train_around(steps, values, step)[0] for step in steps[shown]],
                   color=COLORS["train"], label="train (mean of the steps within 5%)")
    points = pick(found.rows, "log", "val")
    loss_axis.plot([int(row.key) for row in points], [row.loss for row in points], color=COLORS["val"],
                   marker="o", linestyle="none", label="val")
    draw_marks(loss_axis, streams, COLORS["train"], COLORS["val"])
    log_scale(loss_axis)
    loss_axis.set(xlabel="optimizer step", ylabel="loss (nats per token, log scale)",
                  title="Loss along training, from the log")
    gap_axis.sharex(loss_axis)
    gaps = pick(found.rows, "log", "gap")
    gap_axis.errorbar([int(row.key) for row in gaps], [row.loss for row in gaps], [row.se for row in gaps],
                      color="gray", marker="o", markersize=3, linewidth=1,
                      label="from the log (error of train only)")
    measured = [row for row in found.rows if row.kind == "gap"]
    for i, row in enumerate(measured):  # side by side
        aside = (i - (len(measured) - 1) / 2) * 0.015 * max(steps)
        gap_axis.errorbar([found.step + aside], [row.loss], [row.se], color=COLORS[row.split], marker="D",
                          markersize=6, capsize=4, linestyle="none",
                          label=f"measured, {SPLITS[row.split]}: {row.loss:+.4f} \u00b1 {row.se:.4f}")
    gap_axis.axhline(0, color="black", linewidth=0.8)
    gap_axis.set(xlabel="optimizer step", ylabel="difference (nats per token)",
                 title="Train-val gap: val less train (bars: \u00b11 standard error)")


def draw_positions(axis, found) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    for split in ("train", "val"):
        bins = pick(found.rows, "positions", split)
        ends = np.array([[int(end) for end in row.key.split("-")] for row in bins])
        x = np.sqrt(ends.prod(axis=1))
        loss, se = np.array([(row.loss, row.se) for row in bins]).T
        axis.plot(x, loss, color=COLORS[split], marker="o", markersize=3, label=split)
        axis.fill_between(x, loss - se, loss + se, color=COLORS[split], alpha=0.2, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(format_tick))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="tokens of context (log scale)", ylabel="loss (nats per token)",
             title="Loss by position in the context (shaded: \u00b11 standard error)")


def draw_bands(axis, found) -> None:
    bands = pick(found.rows, "band", "val")
    places = np.arange(len(bands))
    for aside, split in ((-0.2, "train"), (0.2, "val")):
        rows = pick(found.rows, "band", split)
        axis.bar(places + aside, [row.loss for row in rows], 0.4, yerr=[row.se for row in rows], capsize=3,
                 color=COLORS[split], label=split)
    axis.hlines([row.unigram for row in bands], places - 0.4, places + 0.4, color="black",
                label="unigram model on val")
    names = [f"{band_name(row.key)}\n{row.token_share:.1%} of tokens\n{row.loss_share:.1%} of loss"
             for row in bands]
    axis.set_xticks(places, names, fontsize=9)
    axis.set(xlim=(-0.6, len(bands) - 0.4), ylabel="loss (nats per token)",
             xlabel="rank of the token by its count in training, and its shares of val",
             title="Loss by token frequency (bars: \u00b11 standard error)")


def band_name(key: str) -> str:
    return "-".join(f"{int(end):,}" if end.isdigit() else end for end in key.split("-"))


def table(found) -> list[str]:
    """What the report prints: each split and gap, some positions, the bands."""
    lines = [f"{'':28}{'tokens':>12}{'loss':>10}{'+-':>9}{'bits per byte':>15}{'unigram':>10}"]
    for row in found.rows:
        if row.kind == "loss":
            lines.append(f"{SPLITS[row.split]:28}{row.n_tokens:12,.0f}{row.loss:10.4f}{row.se:9.4f}"
                         f"{row.bits_per_byte:15.4f}{row.unigram:10.4f}")
        if row.kind == "gap":
            lines.append(f"{'val less ' + SPLITS[row.split]:40}{row.loss:10.4f}{row.se:9.4f}"
                         f"{row.bits_per_byte:15.4f}")
    lines += ["", f"{'tokens of context':28}{'val':>10}{'+-':>9}{'train':>10}{'+-':>9}"]
    shown = {2**i for i in range(found.T.bit_length())} | {found.T}
    for val, train in zip(pick(found.rows, "position", "val"), pick(found.rows, "position", "train")):
        if int(val.key) in shown:
            lines.append(f"{int(val.key):<28,}{val.loss:10.4f}{val.se:9.4f}{train.loss:10.4f}{train.se:9.4f}")
    lines += ["", (f"{'rank in training':18}{'ids':>8}{'of val':>9}{'val':>10}{'+-':>9}{'train':>10}{'+-':>9}"
                   f"{'unigram':>10}{'of val loss':>13}")]
    for val, train in zip(pick(found.rows, "band", "val"), pick(found.rows, "band", "train")):
        lines.append(f"{band_name(val.key):18}{found.band_ids[val.key]:8,}{val.token_share:9.2%}"
                     f"{val.loss:10.4f}{val.se:9.4f}{train.loss:10.4f}{train.se:9.4f}{val.unigram:10.4f}"
                     f"{val.loss_share:13.2%}")
    return [line.replace("nan", "  -") for line in lines]


def to_csv(rows: list) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(rows[0]._fields)
    for row in rows:
        values = (f"{value:.10g}" if isinstance(value, float) else value for value in row)
        writer.writerow("" if value == "nan" else value for value in values)
    return file.getvalue().encode()


def find_model() -> tuple[str, Path]:
    """What to measure, and the folder that its log is in and the report goes to."""
    from checkpoint import holds_checkpoint, split_best

    folder = Path(log_dir)
    if checkpoint:
        path = split_best(checkpoint)[0]
        if log_dir != "log":
            raise UserError(f"checkpoint={checkpoint} and log_dir={log_dir}: a report takes the log beside "
                            f"its checkpoint; leave one of the two out")
        if not path.exists():  # a name on the hub
            return checkpoint, Path()
        return checkpoint, path.parent if path.is_file() else path
    if "," in log_dir:
        raise UserError(f"log_dir={log_dir}: a report is of one run; type --report "
                        f"--log_dir={log_dir.split(',')[0]}")
    if not folder.is_dir() or not holds_checkpoint(folder):
        raise UserError(f"log_dir={log_dir}: no checkpoint there to report on; name a run's folder with "
                        f"--log_dir=FOLDER, or a model with --checkpoint=FILE, or train one with make demo")
    return log_dir, folder


def make_report() -> None:
    if log or model_size or val_baseline:
        raise UserError("log, model_size and val_baseline are for figures of logs; leave these or --report "
                        "out")
    source, folder = find_model()
    figure_path = Path(out) if out else folder / "report.png"
    csv_path = figure_path.with_suffix(".csv")
    if figure_path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"out={out}: wanted a figure; type --out=FIGURE.png, or .svg or .pdf")
    for path in (figure_path, csv_path):
        if path.exists():
            raise UserError(f"{path} is there already; delete it yourself if you no longer need it, or give "
                            f"another one with --out=FIGURE.png")
    log_path = folder / "log.txt"
    streams = parse_log(log_path) if log_path.is_file() else {}

    from loss_report import along_training, measure

    found = measure(source, data_dir, val_tokens, device, dtype, seed)
    found.rows.extend(along_training(streams))
    title = f"{source}, step {found.step:,}: " + (
        "what it has seen of these tokens is not known" if math.isnan(found.epochs) else
        f"{found.epochs:.2f} epochs of {found.n_train_tokens:,} train tokens")
    print(f"{title}\n"
          f"data: {found.data_dir}; val: the first of {found.n_val_tokens:,} tokens; "
          f"train: windows drawn from all {found.n_train_tokens:,}\n"
          f"ranks: by count in the first {found.n_counted:,} train tokens\n"
          f"{found.precision}, windows of {found.T} tokens; +- is one standard error, windows the unit\n")
    print("\n".join(table(found)))
    csv_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(csv_path, to_csv(found.rows))
    draw_report(found, title, streams, figure_path)
    print(f"\nfigure: {figure_path}\ntable: {csv_path}")


def main() -> None:
    if report:
        return make_report()
    if checkpoint or data_dir or val_tokens:
        raise UserError("checkpoint, data_dir and val_tokens are for a report; type --report beside them")
    if log and log_dir != "log":
        raise UserError(f"log={log} and log_dir={log_dir}: both name the logs to draw; leave one of them out")
    if val_baseline and model_size not in VAL_LOSS_GPT2:
        raise UserError(f"val_baseline: no val loss is known of model_size={model_size!r}; type "
                        f"--model_size={' or '.join(VAL_LOSS_GPT2)}")
    paths = [find_log(name) for name in (log or log_dir).split(",")]
    logs = {str(path.parent if path.name == "log.txt" else path): parse_log(path) for path in paths}
    for path, streams in zip(paths, logs.values()):
        if not {"train", "val", "hella"} & streams.keys():
            raise UserError(f"{path}: no line of train, val or hella, so nothing to draw; wait until the run "
                            f"has made a step, or name another log")
    reason = why_no_val_baseline(paths) if model_size in VAL_LOSS_GPT2 and not val_baseline else ""
    out_path = Path(out) if out else paths[0].parent / "log_plot.png"
    draw(logs, out_path, model_size in VAL_LOSS_GPT2 and not reason)
    for name, streams in logs.items():
        lines = {"last values": {}, "last gradient norms": {}, "steps marked": {
            what: len(steps) for what, steps in marked_steps(streams).items()}}
        for stream in streams:
            values = finite(streams[stream])[1]
            if len(values):
                what = "last gradient norms" if stream.startswith("norm_") else "last values"  # of the layers
                lines[what][stream.removeprefix("norm_")] = f"{values[-1]:.6g}"
        for what, values in lines.items():
            text = ", ".join(f"{stream} {value}" for stream, value in values.items())
            if text or what == "last values":
                print(f"{name}, {what}: {text or 'none yet'}")
    if reason:
        print(f"note: OpenAI GPT-2 {model_size}'s val loss on FineWeb-Edu is not drawn: {reason}; "
              f"--val_baseline draws it anyway")
    print(f"figure: {out_path}")


if __name__ == "__main__":
    configure(globals())
    main()
