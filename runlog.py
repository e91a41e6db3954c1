"""
The record of a run: what it measured and how it was started, in its log_dir, and on the screen.

    record = RunLog("log", ranks.launcher)              # looks at the folder; writes nothing yet
    record.claim()                                      # no second run in this folder meanwhile
    record.open(start_step, config, facts)              # cuts the log back to the checkpoint
    record.log(step, train=3.21, lr=6e-4)

log.txt     one `step stream value` per line: train, val, hella, lr, norm, tok_s, ...
runs.jsonl  one JSON object per start: first step, settings, data, versions, and what started it
tensorboard/, wandb_id.txt: where --tensorboard or --wandb is on

After a resume the log has each step once: `open` removes the lines that are about to be written again.
"""

import atexit
import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import list_checkpoints, step_of
from configurator import UserError
from files import locked, not_written, read_jsonl, read_text, write_atomically

START = {"config": {"init_from?": str}, "launchers?": [str], "arguments": [str]}  # what is read of runs.jsonl
RESTART_PATIENCE = 120  # seconds; a file server keeps the lock of a machine that died for a while


class RunLog:
    """The run in `log_dir`, if there is one, and the log of this one. `launcher` is Ranks.launcher;
    writes=False (all ranks but 0) only looks.

    exists: whether a run is there; a start that failed before its first step does not count
    restarted: whether torchrun has started this process again: the latest start came from the same torchrun
        with the same arguments. The same command typed again is not a restart: its torchrun is another
        process.
    init_from: the weights that the run began with, or ""
    error: the UserError of a line that could not be written, or None
    """

    def __init__(self, log_dir: str | Path, launcher: str, writes: bool = True, tensorboard: bool = False,
                 wandb: bool = False):
        for package, wanted in (("tensorboard", tensorboard), ("wandb", wandb)):
            if wanted and importlib.util.find_spec(package) is None:
                raise UserError(f"--{package} needs a package that is not installed: pip install {package}")
        self.folder, self.writes, self.tensorboard, self.wandb = Path(log_dir), writes, tensorboard, wandb
        self.path = self.folder / "log.txt"
        starts = read_jsonl(self.folder / "runs.jsonl", START)
        latest = starts[-1] if starts else {"config": {}, "arguments": []}
        self.init_from = latest["config"].get("init_from", "")
        self.restarted = launcher in latest.get("launchers", []) and latest["arguments"] == sys.argv[1:]
        self.exists = bool(list_checkpoints(log_dir)) or (
            self.path.is_file() and b" train " in self.path.read_bytes())
        self.occupied = (f"log_dir={log_dir} already holds a run; continue it with --resume, or choose "
                         f"--log_dir=ANOTHER")

        self.error = None
        self._lock, self._locked = contextlib.ExitStack(), False
        self._file = self._board = self._wandb_run = None

    def claim(self) -> None:
        """Make the folder and lock it until this process ends. UserError if another run is at work there."""
        if not self.writes or self._locked:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(locked(self.folder, "run", RESTART_PATIENCE if self.restarted else 0))
        atexit.register(self._lock.close)
        self._locked = True
        if not self.exists and list_checkpoints(self.folder):  # a run that has come and gone since we looked
            raise UserError(self.occupied)

    def open(self, start_step: int, config: dict, facts: dict) -> None:
        """Claim the folder, remove what came after the checkpoint of `start_step`, and begin to log.

        `facts` goes into runs.jsonl beside the settings: data, versions, launchers.
        """
        if not self.writes:
            return
        self.claim()
        for path in list_checkpoints(self.folder):
            if step_of(path) > start_step:  # newer than the newest valid one: corrupt
                path.rename(path.with_suffix(f".corrupt_{time.time_ns()}"))
        lines = read_text(self.path).splitlines(keepends=True) if self.path.exists() else []
        if lines and start_step == 0:
            old_log = self.folder / f"log_before_{time.time_ns()}.txt"
            print(f"no checkpoint in {self.folder}, starting at step 0; its log is now {old_log}", flush=True)
            self.path.rename(old_log)
            lines = []
        kept = [line for line in lines if line.endswith("\n")  # a kill can leave an incomplete last line
                and not (line.split(" ")[0].isdigit() and int(line.split(" ")[0]) >= start_step)]
        write_atomically(self.path, "".join(kept).encode())

        start = {"start_step": start_step, "config": config, **facts, "arguments": sys.argv[1:]}
        starts = self.folder / "runs.jsonl"
        before = starts.read_bytes() if starts.exists() else b""
        complete = before[:before.rfind(b"\n") + 1]  # a full disk can leave an incomplete last line
        write_atomically(starts, complete, f"{json.dumps(start)}\n".encode())
        self._file = open(self.path, "a", buffering=1, encoding="utf-8")
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self._board = SummaryWriter(self.folder / "tensorboard", purge_step=start_step)
        if self.wandb:
            self._wandb_run = open_wandb(self.folder, {**config, **facts})

    def log(self, step: int, **streams: float) -> None:
        """Write the values of a step; before `open`, do nothing."""
        if self._file is None:
            return
        try:  # in one write
            self._file.write("".join(
                f"{step} {name} {value if isinstance(value, int) else format(value, '.8g')}\n"
                for name, value in streams.items()))
        except OSError as error:
            self.error = not_written(self.path, error)
            self.error.__cause__ = error  # an error of the disk may be gone at a restart
        if self._board:
            for name, value in streams.items():
                self._board.add_scalar(name, value, step)
        if self._wandb_run:
            self._wandb_run.log({"step": step, **streams})

    def close(self) -> None:
        """Release the folder, and finish what is sent to TensorBoard and Weights & Biases."""
        self._lock.close()
        if self._board:
            self._board.close()
        if self._wandb_run:
            self._wandb_run.finish()


def open_wandb(folder: Path, config: dict):
    """The run at Weights & Biases: a new one, or the one whose id an earlier start left in `folder`."""
    import wandb
    hook = sys.excepthook
    id_path = folder / "wandb_id.txt"
    if not id_path.exists():
        write_atomically(id_path, f"{folder.name}-{time.time_ns():x}".encode())
    try:
        run = wandb.init(project="gpt2", dir=folder, id=id_path.read_text(encoding="utf-8"), resume="allow",
                         config=config)
    except Exception as error:  # of the network, the account or the package
        raise UserError(f"wandb: {error}; type `wandb login`, set WANDB_MODE=offline, or leave out --wandb"
                        ) from error
    sys.excepthook = hook  # wandb's own prints a traceback before it calls this one
    run.define_metric("*", step_metric="step")  # wandb's own step counter cannot go back
    return run


class Screen:
    """What rank 0 prints: in a terminal a progress bar with lines above it, else a line per step."""

    def __init__(self, master: bool):
        self.master, self.bar = master, None

    def say(self, text: str) -> None:
        try:
            if self.bar is not None:
                self.bar.write(text)
            elif self.master:
                print(text, flush=True)
        except OSError:  # who reads it is gone: Ctrl-C ends `| tee` too. The run goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def open_bar(self, start_step: int, max_steps: int) -> None:
        """Show progress as a bar, if this is a terminal."""
        if self.master and sys.stdout.isatty():
            self.bar = tqdm(total=max_steps, initial=start_step, file=sys.stdout, dynamic_ncols=True,
                            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}")

    def show_step(self, step: int, loss: float, lr: float, norm: float, seconds: float, tok_s: float,
                  mfu: float | None, left: float) -> None:
        """Print a step, or update the bar; `left` is the seconds until the end."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"{format_duration(left)} left, loss {loss:.4f}, lr {lr:.2e}, "
                                     f"norm {norm:.2f}, {tok_s:,.0f} tok/s", refresh=False)
            self.bar.update()
            return
        self.say(f"step {step} | loss: {loss:.6f} | lr: {lr:.2e} | norm: {norm:.4f} | "
                 f"dt: {1000 * seconds:.2f}ms | tok/sec: {tok_s:.2f} | "
                 f"mfu: {'n/a' if mfu is None else f'{mfu:.1%}'} | eta: {format_duration(left)}")

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def format_duration(seconds: float) -> str:
    """3,723 -> 1:02:03"""
    return f"{round(seconds) // 3600}:{round(seconds) // 60 % 60:02d}:{round(seconds) % 60:02d}"


def source_hashes() -> dict[str, str]:
    """{file: hash} of the scripts."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in sorted(Path(__file__).parent.glob("*.py"))}


def provenance(device: str, world_size: int) -> dict:
    """What made a run: the commit of this code, with -dirty if it was changed, torch, device, processes."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    return {"git": revision, "torch": str(torch.__version__), "device": device, "world_size": world_size}
