"""
Pre-LN against Post-LN: trains both at each learning rate, with and without warm-up, with each seed.

    make experiment-norm                                                # the data too; 36 runs on CPU
    python results/norm_study/run.py --seeds=1 --flags=--max_steps=400 --log_dir=log_norm_short   # a look
    python results/norm_study/run.py --train_config=config/gpu_24gb.py --max_lrs=6e-4,3e-3 --seeds=1 \
        --flags="--max_steps=2000 --grad_norm_interval=20 --hellaswag_interval=0" --parallel_runs=1 \
        --log_dir=log_norm_124m

Each run is train_gpt2.py in a process of its own, and has a folder in log_dir: log.txt, output.txt (what it
said) and study.json: its flags, its config file and, at the end, its outcome. Run again, the study goes on:
finished runs are not made again, nor are runs of other settings taken for them. A run that gives up because
its steps or its val loss are not finite is a result; any other failure ends the study, with what the run
said. The weights of a finished run are removed. Last come runs of one step of models of other depths, for the
gradients at initialisation. Then study.py, beside this file, makes streams.txt, table.txt, runs.csv and
figure.png in log_dir; copied into this folder they are what RESULTS.md shows.
"""

import collections
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import study

from configurator import Between, PathName, UserError, configure
from documents import available_cores
from files import locked, write_atomically
from plot_log import parse_log

train_config: PathName = "config/norm_cpu.py"  # the config file of train_gpt2.py that all runs share
max_lrs = "5e-4,2e-3,8e-3"  # learning rates; min_lr is a tenth of each
warmups = "0,200"  # steps of warm-up
seeds = "1,2,3"  # of weights and order of the data
depths = "3,6,24"  # n_layer of more models, for the gradient at initialisation alone; empty = none
flags = ""  # more flags of train_gpt2.py, for all runs: "--max_steps=5000 --batch_size=16"
parallel_runs: Between(0, 1024) = 0  # at a time; 0 = one per core; 1 on a GPU
log_dir: PathName = "log_norm_study"  # one folder per run, and the results
report_only = False  # start nothing: the results of the runs that are finished so far

ROOT = Path(__file__).resolve().parents[2]
# Ends a run when the study does, however that ended: the pipe to its standard input is closed then.
GUARD = """
import os, runpy, sys, threading
def end_with_the_study():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=end_with_the_study, daemon=True).start()
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
GAVE_UP = re.compile(r"^error: (\d+ steps in a row were skipped.*|val loss is (not finite|nan|inf).*)$", re.M)


def numbers(key, text, kind):
    """The values of a setting that is a list: "1e-3,4e-3" -> [0.001, 0.004]."""
    try:
        return [kind(word) for word in text.split(",") if word]
    except ValueError as error:
        raise UserError(f"{key}={text}: {error}; type --{key}=NUMBER[,NUMBER...]") from error


def planned_runs():
    """{name: its flags}; all runs of a seed before those of the next: an early look sees everything."""
    runs = {}
    for seed in numbers("seeds", seeds, int):
        for warmup in numbers("warmups", warmups, int):
            for lr in numbers("max_lrs", max_lrs, float):
                for norm in ("pre", "post"):
                    runs[f"{norm}_lr{lr:g}_w{warmup}_s{seed}"] = [
                        f"--norm_position={norm}", f"--max_lr={lr:g}", f"--min_lr={lr / 10:g}",
                        f"--warmup_steps={warmup}", f"--seed={seed}", *shlex.split(flags)]
    for seed in numbers("seeds", seeds, int):
        for depth in numbers("depths", depths, int):
            for norm in ("pre", "post"):
                runs[f"{norm}_depth{depth}_s{seed}"] = [
                    f"--norm_position={norm}", f"--seed={seed}", *shlex.split(flags), f"--n_layer={depth}",
                    "--max_steps=1", "--warmup_steps=0", "--val_interval=0", "--val_tokens=1",
                    "--grad_norm_interval=1"]
    if not runs:
        raise UserError("got no runs, wanted some; give --max_lrs, --warmups and --seeds a value or more")
    return runs


def start(name, its_flags, threads):
    """The process of a run, which goes on if it was stopped; None if it is finished. Raises UserError where
    the folder holds something else."""
    folder = Path(log_dir, name)
    record_path = folder / "study.json"
    command = [str(ROOT / "train_gpt2.py"), train_config, "--resume", f"--log_dir={folder}", *its_flags]
    wanted = {"flags": its_flags, "config": config_text}
    record = json.loads(record_path.read_text(encoding="utf-8")) if record_path.exists() else wanted
    differing = [key for key in wanted if record[key] != wanted[key]]
    if differing or ((folder / "log.txt").exists() and not record_path.exists()):
        raise UserError(f"{folder} holds a run with other {' and '.join(differing) or 'beginnings'}; remove "
                        f"it, or choose --log_dir=ANOTHER")
    if "outcome" in record:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(record_path, json.dumps(wanted).encode())
    with open(folder / "output.txt", "ab") as output:
        return subprocess.Popen([sys.executable, "-c", GUARD, *command], stdin=subprocess.PIPE, stdout=output,
                                stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def finish(name, its_flags, returncode):
    """Note how a run ended -> a line about it. Raises UserError if it is neither done nor diverged."""
    folder = Path(log_dir, name)
    said = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
    gave_up = GAVE_UP.findall(said[said.rfind("\ndevice: "):])  # since the last start
    if returncode == 0 and said.rpartition("\ndevice: ")[2].count("\ndone: step"):
        outcome = "finished"
    elif returncode == 1 and gave_up:
        outcome = "gave up"
    else:
        raise UserError(f"{name} ended with {returncode} and these words:\n{said[-2000:]}\nall of it is in "
                        f"{folder / 'output.txt'}; run this again to go on")
    for path in folder.glob("ckpt_*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    record = {"flags": its_flags, "config": config_text, "outcome": outcome}
    write_atomically(folder / "study.json", json.dumps(record).encode())
    streams = parse_log(folder / "log.txt")
    losses = list(streams.get("train", {}).values())
    return f"{name}: {outcome} after {len(losses)} steps, last train loss {study.last_loss(losses):.4f}"


def is_finished(name):
    path = Path(log_dir, name, "study.json")
    return path.exists() and "outcome" in json.loads(path.read_text(encoding="utf-8"))


def make_all(runs):
    """Make the runs that are not finished, parallel_runs at a time."""
    slots = parallel_runs or available_cores()
    waiting, running, done, began = collections.deque(runs.items()), {}, 0, time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < slots:
                name, its_flags = waiting.popleft()
                process = start(name, its_flags, max(1, available_cores() // slots))
                if process:
                    running[name] = process
                else:
                    done += 1
            time.sleep(0.1)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                line = finish(name, runs[name], running.pop(name).returncode)
                done += 1
                print(f"{done} of {len(runs)} | {time.monotonic() - began:.0f} s | {line}", flush=True)
    finally:
        for process in running.values():
            process.kill()


def main():
    runs = planned_runs()
    if not report_only:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        with locked(log_dir, "study"):
            make_all(runs)
    finished = list(filter(is_finished, runs))
    if not finished:
        raise UserError(f"log_dir={log_dir}: no finished run there; leave out --report_only")
    write_atomically(Path(log_dir, "streams.txt"), study.collect(Path(log_dir), finished).encode())
    study.report(Path(log_dir))


if __name__ == "__main__":
    configure(globals())
    config_path = next((path for path in (Path(train_config), ROOT / train_config) if path.is_file()), None)
    if config_path is None:
        raise UserError(f"train_config={train_config}: no such file; type --train_config=config/norm_cpu.py")
    config_text = config_path.read_text(encoding="utf-8")
    main()
