"""
Draw a run's log: train and validation loss on a log scale, HellaSwag accuracy beside it when the log has it.

    python plot_log.py --log_dir=log                                 # -> log/log_plot.png
    python plot_log.py --log_dir=log --model_size=124M               # with the published baselines as lines
    python plot_log.py --log_dir=log,log_b --out=plots/compare.png   # several runs in one figure

Reads LOG_DIR/log.txt (`step stream value` per line; where a step occurs twice the later line counts), also
the logs of build-nanogpt. Writes one figure and prints its path and the last values. Takes a few seconds.
"""

import os
from pathlib import Path

import numpy as np

from configurator import UserError, configure

log_dir = "log"  # a run's folder with log.txt, or a log file itself; several separated by commas
out = ""  # the figure, .png, .svg or .pdf; empty = log_plot.png beside the first log
model_size = ""  # 124M|350M|774M|1558M: draw that size's published baselines, for FineWeb; empty = none

# Quoted from build-nanogpt's notebook: loss of OpenAI's checkpoint on FineWeb-Edu's val shard; HellaSwag of
# OpenAI's GPT-2 in completion style, and of GPT-3 (Brown et al. 2020, table H.1), whose 350M is GPT-3 Medium.
VAL_LOSS_GPT2 = {"124M": 3.2924}
HELLASWAG_GPT2 = {"124M": 0.294463, "350M": 0.375224, "774M": 0.431986, "1558M": 0.488946}
HELLASWAG_GPT3 = {"124M": 0.337, "350M": 0.436, "774M": 0.510, "1558M": 0.547}


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
    from matplotlib.ticker import FuncFormatter, LogLocator

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
    loss_axis.set_yscale("log")
    loss_axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    loss_axis.yaxis.set_major_formatter(FuncFormatter(format_tick))
    loss_axis.yaxis.set_minor_formatter(FuncFormatter(no_tick))
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
    out_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_path.with_name(f"{out_path.stem}.tmp{out_path.suffix}")
    try:
        figure.savefig(temporary, dpi=120)
    except ValueError as error:  # matplotlib lists the suffixes it knows
        raise UserError(f"out={out_path}: {error}; type --out=FIGURE.png") from error
    os.replace(temporary, out_path)
    plt.close(figure)


def format_tick(value, position):
    return f"{value:g}"


def no_tick(value, position):
    return ""


def main() -> None:
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
