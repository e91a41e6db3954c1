"""
Runs A and B as we ran them, beside what their authors state.

    python experiments/published.py    # results/published/RUN/log.txt -> results/published/runs.png

The runs: a, run A with its own settings; tuned_SEED, the same model with ours; b, the first steps of run B.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import UserError
from figures import pyplot, save_figure
from plot_log import parse_log, smooth

FOLDER = Path(__file__).resolve().parents[1] / "results" / "published"
BATCH = 8192  # tokens of a step of run A and of its tuned version


def of(log: dict, stream: str) -> np.ndarray:
    """(2, n): steps and values."""
    return np.array(sorted(log[stream].items())).T


def draw_a(axis, log: dict) -> None:
    """Train and val loss of run A, with its author's last losses as lines."""
    for stream, color, quoted in (("train", "C0", 5.3), ("val", "C1", 9.4)):
        steps, losses = of(log, stream)
        width = 29 if stream == "train" else 1
        axis.plot(steps * BATCH / 1e6, smooth(losses, width), color=color,
                  label=f"{stream}, ours (at the end {losses[-width:].mean():.2f})")
        axis.axhline(quoted, color=color, linestyle="--", label=f"{stream}, its author's last ({quoted})")
    axis.plot(0, 13.0, "kx", label="first loss, its author's (13.0)")
    axis.set(title=f"Run A: {max(log['train']) + 1:,} of 2,848 steps", xlabel="million tokens",
             ylabel="loss (nats per token)")


def draw_tuned(axis, logs: dict[str, dict]) -> None:
    """Val loss of run A and of our settings, in bits per byte, because the vocabularies differ."""
    for name, log in logs.items():
        steps, bits = of(log, "val_bpb")
        label = "run A" if name == "a" else f"ours, seed {name.removeprefix('tuned_')}"
        axis.plot(steps * BATCH / 1e6, bits, marker=".",
                  label=f"{label} ({bits[-1]:.3f} at step {steps[-1]:,.0f})")
    axis.set(title="Run A and our settings", xlabel="million tokens", ylabel="val loss (bits per byte)")


def draw_b(axis, log: dict) -> None:
    """Train and val loss of run B's first steps, and its author's."""
    axis.plot(*of(log, "train"), label="train, ours")
    axis.plot(*of(log, "val"), marker="o", label="val, ours")
    axis.plot([0, 100], [10.972, 6.61], "kx", label="train, its author's")
    axis.set(title=f"Run B: its first {max(log['train']):,} steps", xlabel="optimizer step of 4,096 tokens",
             ylabel="loss (nats per token)")


def draw(folder: Path):
    """The figure of the logs in a folder: a panel for each kind of run there is."""
    logs = {path.parent.name: parse_log(path) for path in sorted(folder.glob("*/log.txt"))}
    of_a = {name: log for name, log in logs.items() if name != "b"}
    panels = [(draw_a, logs.get("a")), (draw_tuned, of_a if len(of_a) > 1 else None), (draw_b, logs.get("b"))]
    panels = [(draw_panel, given) for draw_panel, given in panels if given]
    if not panels:
        raise UserError(f"there are no logs in {folder}/*; copy them there from the runs' folders")
    figure, axes = pyplot().subplots(1, len(panels), figsize=(5.5 * len(panels), 5), squeeze=False,
                                     layout="constrained")
    for axis, (draw_panel, given) in zip(axes[0], panels):
        draw_panel(axis, given)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    return figure


if __name__ == "__main__":
    save_figure(draw(FOLDER), FOLDER / "runs.png")
    print(f"figure: {FOLDER / 'runs.png'}")
