"""
Draw a run's log: train and validation loss on a log scale, HellaSwag accuracy beside it when the log has it.
Or measure what the loss is made of: --report.

    python plot_log.py --log_dir=log                                 # -> log/log_plot.png
    python plot_log.py --log_dir=log --model_size=124M               # with the published baselines as lines
    python plot_log.py --log_dir=log,log_b --out=plots/compare.png   # several runs in one figure
    python plot_log.py --report --log_dir=log                        # -> log/report.png, log/report.csv
    python plot_log.py --report --checkpoint=gpt2 --data_dir=edu_fineweb10B

Reads LOG_DIR/log.txt (`step stream value` per line; where a step occurs twice the later line counts), also
the logs of build-nanogpt. Writes one figure and prints its path and the last values. Takes a few seconds.

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
import math
import os
from pathlib import Path

import numpy as np

from configurator import UserError, configure

log_dir = "log"  # a run's folder with log.txt, or a log file itself; several separated by commas
out = ""  # the figure, .png, .svg or .pdf; empty = log_plot.png, or report.png, beside the first log
model_size = ""  # 124M|350M|774M|1558M: draw that size's published baselines, for FineWeb; empty = none
report = False  # measure what a checkpoint's loss is made of; the settings below are for this
checkpoint = ""  # a .pt file, a folder whose newest is meant, gpt2, ...; empty = the newest in log_dir
data_dir = ""  # folder of token shards; empty = the one that the checkpoint was trained on
val_tokens: int | None = None  # the first so many of val, and as many of train; none = as the run, or 2**20
device = "auto"  # auto|cpu|cuda|cuda:1|mps
dtype = "auto"  # auto|float32|bfloat16|float16
seed = 1337  # of the choice of train windows

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
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # half a line: the run was killed while it wrote
    for number, line in enumerate(lines, start=1):
        try:
            step, stream, value = line.split()
            streams.setdefault(stream, {})[int(step)] = float(value)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: got {line.rstrip()!r}, wanted `step stream value`; "
                            f"remove the line") from error
    return streams


def find_log(name: str) -> Path:
    """The log file that a folder or file name means."""
    path = Path(name)
    for candidate in (path / "log.txt", path):
        if candidate.is_file():
            return candidate
    raise UserError(f"log_dir={name}: no log.txt there; give --log_dir=FOLDER of a run (make demo makes one)")


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` values at each place (fewer at the beginning)."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(logs: dict[str, dict], out_path: Path) -> None:
    """One panel of losses, and one of HellaSwag accuracy if any log has it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    has_hella = any("hella" in streams for streams in logs.values())
    figure, axes = plt.subplots(1, 1 + has_hella, figsize=(14 if has_hella else 8, 5), squeeze=False,
                                layout="constrained")
    loss_axis = axes[0, 0]
    for i, (name, streams) in enumerate(logs.items()):
        color = f"C{i}"
        if "train" in streams:
            steps, values = np.array(sorted(streams["train"].items())).T
            width = max(1, len(values) // 100)
            loss_axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            loss_axis.plot(steps, smooth(values, width), color=color, linewidth=1.2,
                           label=f"{name} train (mean of {width} steps)")
        if "val" in streams:
            steps, values = np.array(sorted(streams["val"].items())).T
            loss_axis.plot(steps, values, color="black" if len(logs) == 1 else color, linestyle="--",
                           marker="o", markersize=3,
                           label=f"{name} val (last {values[-1]:.3f}, best {values.min():.3f})")
        if "hella" in streams:
            steps, values = np.array(sorted(streams["hella"].items())).T
            axes[0, 1].plot(steps, values, color=color, marker="o", markersize=3,
                            label=f"{name} (last {values[-1]:.3f})")
        if "unigram" in streams:
            loss_axis.axhline(streams["unigram"][0], color="gray", linestyle=":",
                              label=f"unigram model on {name}'s val ({streams['unigram'][0]:.2f})")
    if model_size in VAL_LOSS_GPT2:
        loss_axis.axhline(VAL_LOSS_GPT2[model_size], color="red", linestyle=":",
                          label=f"OpenAI GPT-2 {model_size} on FineWeb val ({VAL_LOSS_GPT2[model_size]:.2f})")
    log_scale(loss_axis)
    loss_axis.set(xlabel="optimizer step", ylabel="loss (nats per token, log scale)", title="Loss")
    if has_hella:
        if model_size:
            axes[0, 1].axhline(HELLASWAG_GPT2[model_size], color="red", linestyle=":",
                               label=f"OpenAI GPT-2 {model_size}")
            axes[0, 1].axhline(HELLASWAG_GPT3[model_size], color="green", linestyle=":",
                               label=f"OpenAI GPT-3 {model_size}")
        axes[0, 1].set(xlabel="optimizer step", ylabel="acc_norm, completion (chance is 0.25)",
                       title="HellaSwag")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, out_path)


def save_figure(figure, out_path: Path) -> None:
    """Write a figure under a temporary name, and rename it; UserError for a suffix that is no picture's."""
    import matplotlib.pyplot as plt

    out_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_path.with_name(f"{out_path.stem}.tmp{out_path.suffix}")
    try:
        figure.savefig(temporary, dpi=120)
    except ValueError as error:  # matplotlib lists the suffixes it knows
        raise UserError(f"out={out_path}: {error}; type --out=FIGURE.png") from error
    os.replace(temporary, out_path)
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

    log = pick(found.rows, "log", "val")
    panels = [["loss", "position"], ["gap", "band"]] if log else [["position", "band"]]
    figure, axes = plt.subplot_mosaic(panels, figsize=(14, 9.5 if log else 5.5), layout="constrained")
    figure.suptitle(title)
    if log:
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

    steps, values = np.array(sorted(streams["train"].items())).T
    loss_axis.plot(steps, values, color=COLORS["train"], alpha=0.25, linewidth=0.8)
    shown = np.unique(np.geomspace(1, len(steps), 200).astype(int)) - 1
    loss_axis.plot(steps[shown], [train_around(steps, values, step)[0] for step in steps[shown]],
                   color=COLORS["train"], label="train (mean of the steps within 5%)")
    points = pick(found.rows, "log", "val")
    loss_axis.plot([int(row.key) for row in points], [row.loss for row in points], color=COLORS["val"],
                   marker="o", linestyle="none", label="val")
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
    from checkpoint import holds_checkpoint

    folder = Path(log_dir)
    if checkpoint:
        path = Path(checkpoint)
        if log_dir != "log":
            raise UserError(f"checkpoint={checkpoint} and log_dir={log_dir}: a report takes the log beside "
                            f"its checkpoint; leave one of the two out")
        if not path.exists():  # a name on the hub
            return checkpoint, Path()
        alone = path.is_file() or path.name.startswith("ckpt_")  # one may be a folder, of a sharded model
        return checkpoint, path.parent if alone else path
    if "," in log_dir:
        raise UserError(f"log_dir={log_dir}: a report is of one run; type --report "
                        f"--log_dir={log_dir.split(',')[0]}")
    if not folder.is_dir() or not holds_checkpoint(folder):
        raise UserError(f"log_dir={log_dir}: no checkpoint there to report on; name a run's folder with "
                        f"--log_dir=FOLDER, or a model with --checkpoint=FILE, or train one with make demo")
    return log_dir, folder


def make_report() -> None:
    if model_size:
        raise UserError(f"model_size={model_size}: a report has no baselines; leave that or --report out")
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

    from files import write_atomically
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
    if checkpoint or data_dir or val_tokens is not None:
        raise UserError("checkpoint, data_dir and val_tokens are for a report; type --report beside them")
    if model_size and model_size not in HELLASWAG_GPT2:
        raise UserError(f"model_size={model_size!r}: wanted one of {', '.join(HELLASWAG_GPT2)}, "
                        f"or nothing for no baselines")
    paths = [find_log(name) for name in log_dir.split(",")]
    logs = {str(path.parent if path.name == "log.txt" else path): parse_log(path) for path in paths}
    out_path = Path(out) if out else paths[0].parent / "log_plot.png"
    draw(logs, out_path)
    for name, streams in logs.items():
        last = {stream: f"{list(values.values())[-1]:.6g}" for stream, values in streams.items()}
        norms = {stream.removeprefix("norm_"): last.pop(stream) for stream in streams
                 if stream.startswith("norm_")}  # of the layers
        for what, values in {"last values": last, "last gradient norms": norms}.items():
            text = ", ".join(f"{stream} {value}" for stream, value in values.items())
            if text or what == "last values":
                print(f"{name}, {what}: {text or 'none yet'}")
    print(f"figure: {out_path}")


if __name__ == "__main__":
    configure(globals())
    main()
