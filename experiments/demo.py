"""
The picture at the top of README.md: the demo's loss beside two of its samples.

    python experiments/demo.py                        # results/demo_cpu/ -> results/demo_cpu/demo.png
    python experiments/demo.py --log_dir=log_demo     # your own run, with samples in log_demo/sample.txt

Train losses are turned into bits per byte with the bytes per token of val, and so are a little off.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import PathName, configure
from figures import pyplot, save_figure
from files import read_text
from plot_log import parse_log

log_dir: PathName = "results/demo_cpu"  # log.txt and sample.txt


def draw(folder: Path):
    log, sample = parse_log(folder / "log.txt"), read_text(folder / "sample.txt")
    per_nat = log["val_bpb"][max(log["val"])] / log["val"][max(log["val"])]  # bits per byte
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(13, 4.6), layout="constrained",
                                              width_ratios=(4, 5))
    train = sorted(log["train"].items())
    left.plot([step for step, _ in train], [loss * per_nat for _, loss in train], color="C0", alpha=0.35,
              linewidth=0.8, label="train, each step")
    left.plot(*zip(*sorted(log["val_bpb"].items())), color="C1", marker="o", label="validation")
    left.axhline(log["unigram"][0] * per_nat, color="gray", linestyle=":",
                 label=f"unigram model, {log['unigram'][0] * per_nat:.2f}")
    left.set(title="The demo, three minutes on two CPU cores", xlabel="optimizer step of 4,096 tokens",
             ylabel="loss (bits per byte)", ylim=(1, 4))
    left.grid(alpha=0.3)
    left.legend()
    right.axis("off")
    right.set_title("Two samples at the end", loc="left")
    right.text(0, 1, sample, family="monospace", fontsize=9, verticalalignment="top",
               transform=right.transAxes)
    return figure


if __name__ == "__main__":
    configure(globals())
    save_figure(draw(Path(log_dir)), Path(log_dir) / "demo.png")
    print(f"figure: {Path(log_dir) / 'demo.png'}")
