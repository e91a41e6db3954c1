"""
Where a model's loss comes from: train and val, position in the context, frequency of the token.

    from loss_report import measure
    report = measure("log", data_dir="", val_tokens=0, device="auto", dtype="auto", seed=1337)

`plot_log.py --report` prints and draws this. A file of its own because measuring needs a model and torch, and
drawing a log needs neither. Reads one checkpoint and both splits of its shards; writes nothing. Takes two
validations' time.

The val tokens are those that train_gpt2.py judges on: the first of the split. Of train, as many windows are
drawn by `seed`, each at most once, from the whole split. Which of them a run has had in its batches is
known, because its order is a function of its seed: all of them after an epoch, else those early in that
order. Not of a run that began with other weights: what those had seen, nobody noted.

A standard error takes windows as the unit: tokens of a window are no independent draws. Nor quite are windows
of one document, so with few and long ones the true error is larger. Nats per token also depend on how long
the tokens of a text are; the bits per byte beside them do not, which tells a gap of texts from one of memory.

Shapes: B windows, T tokens in each, K groups of tokens.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import build_model, checkpoint_tokenizer
from configurator import UserError
from convert_hf import load_any
from device import Device, resolve_device
from model import GPT
from shards import TokenStream, WindowLoader, permute

BAND_ENDS = (10, 100, 1000, 10_000)  # last ranks of the frequency bands; one more has the rest
COUNTED = 2**24  # train tokens that ids are ranked by, and train_gpt2.py's unigram model counts
DEFAULT_VAL_TOKENS = 2**20  # for a model that comes without the settings of a run
FORWARD_TOKENS = 2**14  # per forward pass


class Row(NamedTuple):
    """A line of the CSV: the mean loss of some tokens. nan stands for what there is not."""
    kind: str  # loss, gap, position, positions (a range of them), band, log
    split: str  # val, train, train seen, train unseen; of a gap, what is subtracted from val
    key: str  # all; position, which is tokens of context; ranks, or never; of log, the step
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
    epochs: float  # passes over the train windows so far; nan where the run's data are others, or unknown
    T: int
    data_dir: str
    n_val_tokens: int  # in the whole split
    n_train_tokens: int
    n_counted: int  # of those, tokens that ids are ranked by
    band_ids: dict[str, int]  # ids in each band
    precision: str  # float32 on NAME


class Sums:
    """Sums over windows, from which K groups' means and standard errors follow: the memory is K's."""

    def __init__(self, K: int):
        self.n_windows = 0
        self.moments = np.zeros((6, K))

    def add(self, s: np.ndarray, n: np.ndarray) -> None:
        """Add windows, (B, K) each: what each group's tokens sum to, and how many they are."""
        self.n_windows += len(s)
        for moment, term in zip(self.moments, (s, n, s * s, s * n, n * n, n > 0)):
            moment += term.sum(axis=0)

    def results(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, mean and standard error of each group, (K,) each; nan for a mean without tokens, and for an
        error from fewer than two windows.

        The mean is a ratio of two sums over windows, S / N; its error is that of sum(s - mean n) / N (Cochran
        1977, "Sampling Techniques", chapter 6). With equally many tokens in all windows that is
        sd / sqrt(windows).
        """
        s, n, ss, sn, nn, n_with = self.moments
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = s / n
            squares = np.maximum(0, ss - 2 * mean * sn + mean**2 * nn)
            se = np.sqrt(squares * self.n_windows / (self.n_windows - 1)) / n
        return n, mean, np.where(n_with > 1, se, np.nan)


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


class Groups:
    """The groups of tokens that losses are averaged over, as columns: all, bytes, positions, ..."""

    def __init__(self, T: int, counts: np.ndarray, token_bytes: np.ndarray):
        self.T, self.token_bytes, self.starts = T, token_bytes, position_bins(T)
        self.names, self.band_of = rank_bands(counts)
        self.unigram_nats = math.log((counts + 1).sum()) - np.log(counts + 1)  # add-one, as train_gpt2.py's
        ends = np.append(self.starts[1:], T)
        self.keys = [("loss", "all"), ("bytes", "all"),
                     *(("position", str(t + 1)) for t in range(T)),
                     *(("positions", f"{start + 1}-{end}") for start, end in zip(self.starts, ends)),
                     *(("band", name) for name in self.names), *(("unigram", name) for name in self.names)]
        self.widths = (ends - self.starts).astype(np.float64)

    def split(self, losses: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`Sums.add`'s arguments of B windows: their losses and targets are (B, T)."""
        B, T = losses.shape
        K = len(self.names)
        cell = np.arange(B)[:, None] * K + self.band_of[targets]  # (B, T)

        def by_band(values):
            return np.bincount(cell.ravel(), values.ravel(), minlength=B * K).reshape(B, K)

        whole, in_band = np.full((B, 1), float(T)), by_band(np.ones((B, T)))
        s = (losses.sum(axis=1, keepdims=True), self.token_bytes[targets].sum(axis=1, keepdims=True), losses,
             np.add.reduceat(losses, self.starts, axis=1), by_band(losses),
             by_band(self.unigram_nats[targets]))
        n = whole, whole, np.ones((B, T)), np.tile(self.widths, (B, 1)), in_band, in_band
        return np.concatenate(s, axis=1), np.concatenate(n, axis=1)

    def rows(self, split: str, sums: Sums) -> list[Row]:
        """What the CSV says of one split."""
        tokens, means, errors = sums.results()
        of = {key: i for i, key in enumerate(self.keys)}
        n, loss = tokens[0], means[0]
        unigram = np.nansum([tokens[i] * means[i] for (kind, _), i in of.items() if kind == "unigram"]) / n
        rows = [Row("loss", split, "all", n, loss, errors[0], unigram, 1.0, 1.0,
                    loss / math.log(2) / means[1])]
        for (kind, key), i in of.items():
            if kind in ("position", "positions"):
                rows.append(Row(kind, split, key, tokens[i], means[i], errors[i]))
            if kind == "band":
                share = tokens[i] / n
                rows.append(Row(kind, split, key, tokens[i], means[i], errors[i], means[of["unigram", key]],
                                share, share * means[i] / loss if tokens[i] else 0.0))
        return rows


def draw_windows(n: int, loader: WindowLoader, seed: int, run_seed: int, n_seen: int
                 ) -> tuple[np.ndarray, np.ndarray]:
    """`n` windows of the whole stream, each once, in file order, and whether a run has had them in a batch.

    (n,) each. The run with seed `run_seed` has had the first `n_seen` of its first epoch's order.
    """
    places = permute(np.arange(n), loader.n_windows, seed, 0)
    windows = permute(places, loader.n_windows, run_seed, 0)
    order = np.argsort(windows)
    return windows[order], places[order] < n_seen


@torch.no_grad()
def window_losses(model: GPT, loader: WindowLoader, windows: np.ndarray, dev: Device):
    """Yield (first, losses, targets) for a batch of `windows` at a time: float64 and int64, (B, T)."""
    rows = max(1, FORWARD_TOKENS // loader.T)
    for first in tqdm(range(0, len(windows), rows), disable=None, unit="batch", leave=False):
        x, y = loader.read_windows(windows[first:first + rows])
        with dev.autocast():
            loss = model(dev.to_device(x), dev.to_device(y), reduction="none")  # (B, T)
        losses = loss.cpu().numpy().astype(np.float64)
        if not np.isfinite(losses).all():
            raise UserError("the model's loss is not finite; try --dtype=float32, or a checkpoint of an "
                            "earlier step with --checkpoint=FILE")
        yield first, losses, y


def find_data_dir(state: dict, source: str | Path, data_dir: str) -> str:
    """`data_dir`, or where it is empty the shards that the checkpoint was trained on, if they are there."""
    trained_on = state.get("config", {}).get("data_dir", "")
    if not data_dir and not (trained_on and Path(trained_on).is_dir()):
        known = f"was trained on data_dir={trained_on}, which is not there" if trained_on else "names no data"
        raise UserError(f"{source} {known}; give --data_dir=FOLDER of its shards, or of others")
    return data_dir or trained_on


def open_stream(data_dir: str, split: str, tok, T: int) -> TokenStream:
    """A split of the shards; UserError where the model was not made for them, or they are too short."""
    stream = TokenStream(data_dir, split)
    if stream.manifest and stream.manifest["tokenizer"]["sha256"] != tok.sha256:
        raise UserError(f"data_dir={data_dir} was tokenized with {stream.manifest['tokenizer']['name']!r}, "
                        f"the model knows {tok.name!r}, which is another vocabulary; give --data_dir=FOLDER "
                        f"of shards made with that, or make them: python fineweb.py --tokenizer={tok.name}")
    if len(stream) < T + 1:
        raise UserError(f"data_dir={data_dir}: got {len(stream):,} {split} tokens, wanted {T + 1:,} or more, "
                        f"one window of the model's context; give --data_dir=FOLDER of a longer text")
    return stream


def gap(rows: list[Row], split: str) -> Row:
    """Val less `split`. The two are of different windows, so that their errors add up in squares."""
    val, other = (next(row for row in rows if row[:2] == ("loss", name)) for name in ("val", split))
    return Row("gap", split, "all", math.nan, val.loss - other.loss, math.hypot(val.se, other.se),
               bits_per_byte=val.bits_per_byte - other.bits_per_byte)


def measure(source: str | Path, data_dir: str, val_tokens: int, device: str, dtype: str, seed: int
            ) -> Report:
    """The report of a model: `source` as load_any takes it, on the shards in `data_dir`.

    An empty data_dir is the one that the checkpoint was trained on, val_tokens 0 as many as its run evaluated
    on; `seed` draws the train windows. Raises UserError, before anything takes long.
    """
    dev = resolve_device(device, dtype)
    state = load_any(source)
    config, tok = state.get("config", {}), checkpoint_tokenizer(state)
    data_dir = find_data_dir(state, source, data_dir)
    model = build_model(state, str(source)).to(dev.device)
    model.loss_chunk = dev.loss_chunk
    T = model.config.block_size
    val, train = (open_stream(data_dir, split, tok, T) for split in ("val", "train"))
    # of a run that began with others' weights, what those had seen is not known
    known = (config and not config.get("init_from") and state.get("data") == train.fingerprint
             and config["block_size"] == T)
    batch_tokens, run_seed = (config["batch_tokens"], config["seed"]) if known else (T, seed)
    val_loader = WindowLoader(val, T, T, seed, tok.n_vocab, shuffle=False)
    train_loader = WindowLoader(train, T, batch_tokens, run_seed, tok.n_vocab)
    val_tokens = val_tokens or config.get("val_tokens", DEFAULT_VAL_TOKENS)
    n_val = min(val_loader.n_windows, max(1, val_tokens // T))
    n_counted = min(train_loader.n_windows, COUNTED // T + 1)
    groups = Groups(T, train_loader.count_targets(n_counted), tok.token_bytes())

    sums = {name: Sums(len(groups.keys)) for name in ("val", "train", "train seen", "train unseen")}
    for _, losses, targets in window_losses(model, val_loader, np.arange(n_val), dev):
        sums["val"].add(*groups.split(losses, targets))
    n_seen = state["step"] * train_loader.windows_per_step if known else 0
    windows, seen = draw_windows(min(n_val, train_loader.n_windows), train_loader, seed, run_seed, n_seen)
    for first, losses, targets in window_losses(model, train_loader, windows, dev):
        s, n = groups.split(losses, targets)
        sums["train"].add(s, n)
        if known:
            chosen = seen[first:first + len(s)]
            sums["train seen"].add(s[chosen], n[chosen])
            sums["train unseen"].add(s[~chosen], n[~chosen])
    # a run of an epoch or more has seen all, one that has not begun none: then one part is the whole
    parted = 0 < sums["train seen"].n_windows < len(windows)
    splits = list(sums) if parted else ["val", "train"]
    rows = [row for split in splits for row in groups.rows(split, sums[split])]
    rows += [gap(rows, split) for split in splits[1:]]
    return Report(rows, state["step"], state["step"] / train_loader.steps_per_epoch if known else math.nan, T,
                  data_dir, len(val), len(train), n_counted * T,
                  dict(zip(groups.names, np.bincount(groups.band_of).tolist())),
                  f"{str(dev.dtype).removeprefix('torch.')} on {dev.name}")


def train_around(steps: np.ndarray, losses: np.ndarray, step: float) -> tuple[float, float]:
    """Mean loss of the steps within 5% of `step`, and its standard error; nan where there are too few.

    A share, because a loss falls ever more slowly. After the last step of a run there are only those before.
    Losses of nan and inf, of steps that the guard skipped, are left out.
    """
    near = losses[(np.abs(steps - step) <= max(1, step / 20)) & np.isfinite(losses)]
    return (float(near.mean()) if len(near) else math.nan,
            float(near.std(ddof=1)) / math.sqrt(len(near)) if len(near) > 1 else math.nan)


def along_training(streams: dict[str, dict[int, float]]) -> list[Row]:
    """Rows of kind log, for each step with a val loss: that, the train loss around it, and the difference.

    A val loss of nan or inf has no rows. The error of the difference is that of the train loss; a log does
    not know that of val.
    """
    rows = []
    steps, losses = np.array(list(streams.get("train", {}).items())).reshape(-1, 2).T
    for step, val in sorted(streams.get("val", {}).items()):
        train, se = train_around(steps, losses, step)
        if math.isfinite(val) and not math.isnan(train):
            rows += [Row("log", "val", str(step), math.nan, val, math.nan),
                     Row("log", "train", str(step), math.nan, train, se),
                     Row("log", "gap", str(step), math.nan, val - train, se)]
    return rows
