"""
Where a checkpoint's loss comes from: train and val, position in the context, frequency of the token.

    python analyze_loss.py --checkpoint=log                             # -> log/report.png, log/report.csv
    python analyze_loss.py --checkpoint=gpt2 --data_dir=edu_fineweb10B --out_dir=gpt2_loss

Reads one checkpoint, both splits of its shards and, if there is one, log.txt beside it. Prints tables and
writes report.png and report.csv, never over an earlier report. Takes as long as two validations.

train-val gap   along training, from the log: val loss minus the mean train loss of the steps within 5% of
                that step. A log's train loss is of batches just before they are learned from, with dropout.
                And at the checkpoint: both splits in eval mode, as many windows of train as of val, drawn
                from all of it. In a run of less than an epoch, the windows it has already seen are also
                shown apart.
position        loss by the tokens of context; windows begin anywhere in a document
frequency       loss by the rank of the token predicted, counted in the first 2**24 train tokens or all,
                beside that of a unigram model; "never" does not occur there. The means of the bands, each
                times its share of the tokens, add up to the loss.

The val loss is that of `train_gpt2.py --eval_only`. Which windows a run has seen follows from its seed, but
not if it began with other weights. Standard errors take windows as the unit, since the tokens of a window are
not independent. Windows of one document are not quite independent either: with few long documents the true
error is larger. Nats per token also depend on how long a text's tokens are; bits per byte do not.

Shapes: W windows, T tokens in each.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import find_data_dir, newest_checkpoint, split_best
from configurator import Between, OneOf, PathName, UserError, configure
from convert_hf import open_model
from device import Device, resolve_device
from figures import csv_bytes, log_ticks, pyplot, save_figure, table
from files import write_atomically
from model import GPT
from plot_log import draw_marks, finite, parse_log
from shards import WindowLoader, open_stream, permute

checkpoint: PathName = ""  # a file, FOLDER (its newest), FOLDER:best, gpt2, ...; empty = newest of log*/
data_dir: PathName = ""  # token shards of the checkpoint's tokenizer; empty = those it was trained on
out_dir: PathName = ""  # report.png and report.csv go here; empty = beside the checkpoint
val_tokens: Between(0, 10**12) = 0  # the first N of val, N of train; 0 = as the run, or 2**20
device = "auto"  # auto|cpu|cuda|cuda:1|mps
dtype: OneOf("auto", "float32", "bfloat16", "float16") = "auto"  # of matrix products
seed: Between(0, 2**63 - 1) = 1337  # of the choice of train windows

BAND_ENDS = (10, 100, 1000, 10_000)  # last ranks of the frequency bands; one more has the rest
COUNTED = 2**24  # train tokens that ids are ranked by, and train_gpt2.py's unigram model counts
DEFAULT_VAL_TOKENS = 2**20  # for a model that comes without the settings of a run
FORWARD_TOKENS = 2**14  # per forward pass
NAMES = {"val": "val", "train": "train", "train seen": "train, seen by the run",
         "train unseen": "train, not seen yet"}
COLORS = {"val": "C1", "train": "C0", "train seen": "C2", "train unseen": "C4"}


class Row(NamedTuple):
    """A line of the CSV: the mean loss of some tokens. nan where a column does not apply."""
    kind: str  # loss, gap, position, positions (a range of them), band
    split: str  # val, train, train seen, train unseen; of a gap, what is subtracted from val
    key: str  # all; position, which is tokens of context; ranks, or never
    n_tokens: float
    loss: float  # nats per token
    se: float  # standard error of the loss
    unigram: float = math.nan  # a unigram model's loss on these tokens
    token_share: float = math.nan  # of the split's tokens
    loss_share: float = math.nan  # of the split's summed loss
    bits_per_byte: float = math.nan


class Report(NamedTuple):
    rows: list[Row]
    step: int
    epochs: float  # passes over the train windows so far; nan if unknown, or trained on other data
    T: int
    train_tokens: int  # in the whole split
    band_ids: dict[str, int]  # ids in each band
    setup: str  # in words: data, ranks, precision


# ---- statistics ----------------------------------------------------------------


def ratio(s: np.ndarray, n: np.ndarray) -> tuple[float, float, float]:
    """(tokens, mean, standard error) of windows whose losses sum to s over n tokens, (W,) each.

    The mean is S / N, a ratio of two sums over windows; its error is that of sum(s - mean n) / N (Cochran
    1977, "Sampling Techniques", chapter 6). With equally many tokens in all windows that is sd / sqrt(W). A
    mean without tokens is nan, and so is an error from fewer than two windows with tokens.
    """
    N, W = n.sum(), len(n)
    if N == 0:
        return 0.0, math.nan, math.nan
    mean = s.sum() / N
    if (n > 0).sum() < 2:
        return N, mean, math.nan
    return N, mean, math.sqrt(((s - mean * n)**2).sum() * W / (W - 1)) / N


def rank_bands(counts: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of the frequency bands, and the band of each id (n_vocab,), from how often each id was counted.

    The most frequent id has rank 1; of equal ones the lower id comes first. Ids that were never counted have
    no rank and are the last band, which is there only if there are such ids.
    """
    n_ranked = int((counts > 0).sum())
    ranks = np.empty(len(counts), dtype=np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    ends = [end for end in BAND_ENDS if end < n_ranked] + [n_ranked]
    names = [f"{start + 1}-{end}" for start, end in zip([0, *ends], ends)]
    return names + ["never"] * (n_ranked < len(counts)), np.searchsorted(ends, ranks)


def position_bins(T: int) -> np.ndarray:
    """Where ranges of positions begin, counted from 0: two to each doubling, where there are as many."""
    return np.unique((2 ** np.arange(0, max(0.5, math.log2(T)), 0.5)).astype(np.int64)) - 1


def split_rows(split: str, losses: np.ndarray, targets: np.ndarray, counts: np.ndarray,
               token_bytes: np.ndarray) -> list[Row]:
    """The rows of one split: losses and targets are (W, T), counts and token_bytes (n_vocab,)."""
    W, T = losses.shape
    names, band_of = rank_bands(counts)
    unigram = (math.log((counts + 1).sum()) - np.log(counts + 1))[targets]  # add-one, as train_gpt2.py's
    total = losses.sum()
    rows = [Row("loss", split, "all", *ratio(losses.sum(axis=1), np.full(W, T)), unigram.mean(), 1.0, 1.0,
                total / math.log(2) / token_bytes[targets].sum())]
    starts = position_bins(T).tolist()
    ranges = [("position", t, t + 1) for t in range(T)] + [
        ("positions", start, end) for start, end in zip(starts, [*starts[1:], T])]
    for kind, start, end in ranges:
        key = f"{end}" if kind == "position" else f"{start + 1}-{end}"
        rows.append(Row(kind, split, key, *ratio(losses[:, start:end].sum(axis=1), np.full(W, end - start))))
    for band, name in enumerate(names):
        inside = band_of[targets] == band  # (W, T)
        n = inside.sum()
        rows.append(Row("band", split, name, *ratio((losses * inside).sum(axis=1), inside.sum(axis=1)),
                        unigram[inside].mean() if n else math.nan, n / inside.size,
                        losses[inside].sum() / total))
    return rows


def gap(rows: list[Row], split: str) -> Row:
    """Val minus `split`. The two are of different windows, so that their errors add up in squares."""
    (val,), (other,) = pick(rows, "loss", "val"), pick(rows, "loss", split)
    return Row("gap", split, "all", math.nan, val.loss - other.loss, math.hypot(val.se, other.se),
               bits_per_byte=val.bits_per_byte - other.bits_per_byte)


def pick(rows: list[Row], kind: str, split: str) -> list[Row]:
    return [row for row in rows if (row.kind, row.split) == (kind, split)]


def train_around(steps: np.ndarray, losses: np.ndarray, step: float) -> tuple[float, float]:
    """Mean of the finite losses of the steps within 5% of `step`, and its standard error; nan of too few.

    5%, because a loss falls ever more slowly. At the end of a run there are only earlier steps.
    """
    near = losses[(np.abs(steps - step) <= max(1, step / 20)) & np.isfinite(losses)]
    return (float(near.mean()) if len(near) else math.nan,
            float(near.std(ddof=1)) / math.sqrt(len(near)) if len(near) > 1 else math.nan)


def along_training(streams: dict[str, dict[int, float]]) -> np.ndarray:
    """Step, val loss, train loss around it and that one's standard error, (n, 4): a row for each step of a
    log with a finite val loss and finite train losses around it. A log does not have the error of val."""
    train = finite(streams.get("train", {}))
    rows = np.array([(step, val, *train_around(*train, step))
                     for step, val in zip(*finite(streams.get("val", {})))]).reshape(-1, 4)
    return rows[np.isfinite(rows[:, 2])]


# ---- measuring -----------------------------------------------------------------


def draw_windows(n: int, loader: WindowLoader, seed: int, run_seed: int, n_seen: int
                 ) -> tuple[np.ndarray, np.ndarray]:
    """`n` windows of the whole stream, each once, in file order, and whether a run has seen them.

    (n,) each. The run with seed `run_seed` has seen the first `n_seen` of its first epoch's order.
    """
    places = permute(np.arange(n), loader.n_windows, seed, 0)
    windows = permute(places, loader.n_windows, run_seed, 0)
    order = np.argsort(windows)
    return windows[order], places[order] < n_seen


@torch.no_grad()
def window_losses(model: GPT, loader: WindowLoader, windows: np.ndarray, dev: Device
                  ) -> tuple[np.ndarray, np.ndarray]:
    """Losses and targets of `windows`, float64 and int64 (W, T)."""
    rows, parts = max(1, FORWARD_TOKENS // loader.T), []
    for first in tqdm(range(0, len(windows), rows), disable=None, unit="batch", leave=False):
        x, y = loader.read_windows(windows[first:first + rows])
        with dev.autocast():
            loss = model(dev.to_device(x), dev.to_device(y), reduction="none")  # (B, T)
        parts.append((loss.double().cpu().numpy(), y))
    losses, targets = map(np.concatenate, zip(*parts))
    if not np.isfinite(losses).all():
        raise UserError("the model's loss is not finite; try --dtype=float32, or a checkpoint of an earlier "
                        "step with --checkpoint=FILE")
    return losses, targets


def measure(source: str | Path, data_dir: str, val_tokens: int, device: str, dtype: str, seed: int
            ) -> Report:
    """The report of a model: `source` as load_any takes it, the others as the settings above."""
    dev = resolve_device(device, dtype)
    _, state, model, tok = open_model(source, dev.device)
    config, data_dir = state.get("config", {}), find_data_dir(state, source, data_dir)
    model.loss_chunk = dev.loss_chunk
    T = model.config.block_size
    val, train = (open_stream(data_dir, split, tok) for split in ("val", "train"))
    # with init_from, what the initial weights have seen is unknown
    known = (config and not config.get("init_from") and state.get("data") == train.fingerprint
             and config["block_size"] == T)
    batch_tokens, run_seed = (config["batch_tokens"], config["seed"]) if known else (T, seed)
    val_loader = WindowLoader(val, T, T, seed, tok.n_vocab, shuffle=False)
    train_loader = WindowLoader(train, T, batch_tokens, run_seed, tok.n_vocab)
    val_tokens = val_tokens or config.get("val_tokens", DEFAULT_VAL_TOKENS)
    n_val = min(val_loader.n_windows, max(1, val_tokens // T))
    n_counted = min(train_loader.n_windows, COUNTED // T + 1)
    counts = train_loader.count_targets(n_counted)
    n_seen = state["step"] * train_loader.windows_per_step if known else 0
    windows, seen = draw_windows(min(n_val, train_loader.n_windows), train_loader, seed, run_seed, n_seen)

    found = {"val": window_losses(model, val_loader, np.arange(n_val), dev),
             "train": window_losses(model, train_loader, windows, dev)}
    if 0 < seen.sum() < len(seen):  # after an epoch all have been seen, before the first step none
        for name, chosen in (("train seen", seen), ("train unseen", ~seen)):
            found[name] = tuple(values[chosen] for values in found["train"])
    rows = [row for split, values in found.items()
            for row in split_rows(split, *values, counts, tok.token_bytes())]
    rows += [gap(rows, split) for split in list(found)[1:]]
    names, band_of = rank_bands(counts)
    setup = (f"data: {data_dir}; val: the first of {len(val):,} tokens; train: windows drawn from all "
             f"{len(train):,}\nranks: by count in the first {n_counted * T:,} train tokens\n"
             f"{str(dev.dtype).removeprefix('torch.')} on {dev.name}, windows of {T} tokens; +- is one "
             f"standard error, windows the unit")
    return Report(rows, state["step"], state["step"] / train_loader.steps_per_epoch if known else math.nan, T,
                  len(train), dict(zip(names, np.bincount(band_of).tolist())), setup)


# ---- what is shown -------------------------------------------------------------


def tables(found: Report) -> list[str]:
    """What is printed: each split and gap, some positions, the bands."""
    def text(*values):
        return ["-" if math.isnan(value) else f"{value:.4f}" for value in values]

    of = {kind: {split: pick(found.rows, kind, split) for split in NAMES}
          for kind in ("loss", "gap", "position", "band")}
    splits = [[NAMES[row.split], f"{row.n_tokens:,}",
               *text(row.loss, row.se, row.bits_per_byte, row.unigram)]
              for rows in of["loss"].values() for row in rows]
    splits += [[f"val minus {NAMES[row.split]}", "", *text(row.loss, row.se, row.bits_per_byte), ""]
               for rows in of["gap"].values() for row in rows]
    shown = {2**i for i in range(found.T.bit_length())} | {found.T}
    positions = [[val.key, *text(val.loss, val.se, train.loss, train.se)]
                 for val, train in zip(of["position"]["val"], of["position"]["train"])
                 if int(val.key) in shown]
    bands = [[band_name(val.key), f"{found.band_ids[val.key]:,}", f"{val.token_share:.2%}",
              *text(val.loss, val.se, train.loss, train.se, val.unigram), f"{val.loss_share:.2%}"]
             for val, train in zip(of["band"]["val"], of["band"]["train"])]
    return [*table(["", "tokens", "loss", "+-", "bits per byte", "unigram"], splits), "",
            *table(["tokens of context", "val", "+-", "train", "+-"], positions), "",
            *table(["rank in training", "ids", "share", "val", "+-", "train", "+-", "unigram", "loss share"],
                   bands)]


def band_name(key: str) -> str:
    return "-".join(f"{int(end):,}" if end.isdigit() else end for end in key.split("-"))


def draw_report(found: Report, title: str, streams: dict):
    """Loss by position and by frequency; where there is a log, the loss and the gap along training too."""
    has_log = len(along_training(streams)) > 0
    panels = [["loss", "position"], ["gap", "band"]] if has_log else [["position", "band"]]
    figure, axes = pyplot().subplot_mosaic(panels, figsize=(11, 9 if has_log else 5), layout="constrained")
    figure.suptitle(title)
    if has_log:
        draw_training(axes["loss"], axes["gap"], found, streams)
    draw_positions(axes["position"], found)
    draw_bands(axes["band"], found)
    for axis in axes.values():
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    return figure


def draw_training(loss_axis, gap_axis, found: Report, streams: dict) -> None:
    """The losses in the log; and val minus train, from the log and as measured."""
    steps, values = finite(streams["train"])
    loss_axis.plot(steps, values, color=COLORS["train"], alpha=0.25, linewidth=0.8)
    shown = np.unique(np.geomspace(1, len(steps), 200).astype(int)) - 1
    loss_axis.plot(steps[shown], [train_around(steps, values, step)[0] for step in steps[shown]],
                   color=COLORS["train"], label="train (mean of the steps within 5%)")
    val_steps, val, train, se = along_training(streams).T
    loss_axis.plot(val_steps, val, color=COLORS["val"], marker="o", linestyle="none", label="val")
    draw_marks(loss_axis, streams, COLORS["train"], COLORS["val"])
    log_ticks(loss_axis.yaxis)
    loss_axis.set(xlabel="optimizer step", ylabel="loss (nats per token, log scale)", title="Loss in the log")
    gap_axis.errorbar(val_steps, val - train, se, color="gray", marker="o", markersize=3,
                      label="from the log (error of train)")
    for i, row in enumerate(row for row in found.rows if row.kind == "gap"):  # side by side
        gap_axis.errorbar([found.step + 0.02 * i * max(steps)], [row.loss], [row.se], color=COLORS[row.split],
                          marker="D", markersize=5, capsize=3, linestyle="none",
                          label=f"{NAMES[row.split]}: {row.loss:+.3f} \u00b1 {row.se:.3f}")
    gap_axis.axhline(0, color="black", linewidth=0.8)
    gap_axis.set(xlabel="optimizer step", ylabel="difference (nats per token)",
                 title="Val minus train (bars: \u00b11 standard error)")


def draw_positions(axis, found: Report) -> None:
    for split in ("train", "val"):
        bins = pick(found.rows, "positions", split)
        ends = np.array([[int(end) for end in row.key.split("-")] for row in bins])
        x = np.sqrt(ends.prod(axis=1))
        loss, se = np.array([(row.loss, row.se) for row in bins]).T
        axis.plot(x, loss, color=COLORS[split], marker="o", markersize=3, label=split)
        axis.fill_between(x, loss - se, loss + se, color=COLORS[split], alpha=0.2, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.set(xlabel="tokens of context (log scale)", ylabel="loss (nats per token)",
             title="Loss by position (shaded: \u00b11 standard error)")


def draw_bands(axis, found: Report) -> None:
    """A pair of bars for each band, the most frequent at the top: its name and shares fit on the left."""
    bands = pick(found.rows, "band", "val")
    places = np.arange(len(bands))
    for aside, split in ((-0.2, "train"), (0.2, "val")):
        rows = pick(found.rows, "band", split)
        axis.barh(places + aside, [row.loss for row in rows], 0.4, xerr=[row.se for row in rows], capsize=3,
                  color=COLORS[split], label=split)
    axis.vlines([row.unigram for row in bands], places - 0.4, places + 0.4, color="black",
                label="unigram model on val")
    axis.set_yticks(places, [f"{band_name(row.key)}\n{row.token_share:.1%} of tokens\n"
                             f"{row.loss_share:.1%} of loss" for row in bands], fontsize=9)
    axis.set(ylim=(len(bands) - 0.4, -0.6), xlabel="loss (nats per token)",
             ylabel="rank of the token in training; shares of val",
             title="Loss by token frequency (bars: \u00b11 standard error)")


def main() -> None:
    source = checkpoint or str(newest_checkpoint())
    path = split_best(source)[0]
    beside = path if path.is_dir() else path.parent if path.exists() else Path()  # a name on the hub
    folder = Path(out_dir or beside)
    for name in ("report.png", "report.csv"):
        if (folder / name).exists():
            raise UserError(f"{folder / name} already exists; delete it yourself if you no longer need it, "
                            f"or give another folder with --out_dir=FOLDER")
    log_path = beside / "log.txt"
    streams = parse_log(log_path) if log_path.is_file() and path.exists() else {}
    found = measure(source, data_dir, val_tokens, device, dtype, seed)
    title = f"{beside.resolve().name if path.exists() else source}, step {found.step:,}: " + (
        "which of these tokens it has seen is unknown" if math.isnan(found.epochs) else
        f"{found.epochs:.2f} epochs of {found.train_tokens:,} train tokens")
    print(title, found.setup, "", *tables(found), sep="\n")
    save_figure(draw_report(found, title, streams), folder / "report.png")
    write_atomically(folder / "report.csv", csv_bytes([row._asdict() for row in found.rows]))
    print(f"\nfigure: {folder / 'report.png'}\ntable: {folder / 'report.csv'}")


if __name__ == "__main__":
    configure(globals())
    main()
