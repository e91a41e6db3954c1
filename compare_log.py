"""
Is my curve right? Hold a run's log against a reference: inside or outside its band at fixed steps.

    python compare_log.py --run=log_demo --ref=reference/demo_cpu.log    # or: make compare RUN=log_demo
    python compare_log.py --make=log_a,log_b,log_c --ref=reference/mine.log   # from runs of several seeds

A run may still be training: the steps that it has are judged. Exit code 0: inside; 1: outside; 2: they cannot
be compared. Reads the run's log.txt and runs.jsonl. Takes a second.

A reference is itself a log, `step stream value`, which plot_log.py draws: the mean over the runs of val,
val_bpb and val_minus_unigram, and _low and _high of the last two, which are what is judged. Beside it, under
the same name with .json, stands what it was made from: settings, seeds, data, versions. Bits per byte, and
nats per token above a unigram model on the same tokens (negative: better than it), carry over best to a
corpus that is almost the same, such as another Python's library in the demo. A run whose settings make
another curve is refused; device, dtype, compile, processes and the seed do not.
"""

import json
import math
import statistics
import sys
from pathlib import Path

from configurator import PathName, UserError, configure
from files import read_json, write_atomically
from plot_log import find_log, last_start, parse_log

run: PathName = "log_demo"  # the run to compare: its folder, or its log
ref: PathName = "reference/demo_cpu.log"  # the reference to hold it against, or to write
make: PathName = ""  # folders of runs that differ by the seed alone, separated by commas: write ref from them

# The streams that are judged, each with the one whose mean its least band is a share of: val_minus_unigram
# itself crosses zero.
JUDGED = {"val_bpb": "val_bpb", "val_minus_unigram": "val"}
FLOOR = 0.01  # that share: other hardware and dtypes move a right run too
CURVE = ("tokenizer n_layer n_head n_embd block_size vocab_size dropout norm_position batch_tokens max_steps "
         "warmup_steps max_lr min_lr schedule decay_fraction optimizer weight_decay beta1 beta2 grad_clip "
         "max_z_score val_tokens"
         ).split()  # the settings that make another curve


def read_run(name: str) -> tuple[dict[str, dict[int, float]], dict]:
    """({stream: {step: value}} with val_minus_unigram, the last record of runs.jsonl or {}) of a run."""
    path = find_log(name)
    streams = parse_log(path)
    if 0 in streams.get("unigram", {}):
        streams["val_minus_unigram"] = {step: value - streams["unigram"][0]
                                        for step, value in streams.get("val", {}).items()}
    return streams, last_start(path)


def differing_settings(a: dict, b: dict) -> list[str]:
    """The settings that make another curve, among those that both records know."""
    return [f"{key}={a[key]} and {b[key]}" for key in CURVE if key in a and key in b and a[key] != b[key]]


def bands(values: dict[int, list[float]], floors: dict[int, float]) -> dict[int, tuple]:
    """{step: (mean, low, high)} within which another seed's values are expected.

    values: {step: one value per seed}; floors: {step: the least half-width}. A new value differs from the
    mean of n by sd sqrt(1 + 1/n), its own spread and the mean's; a band is three of these to either side.
    Three seeds tell little about the sd at one step, and alone would leave a right run outside at one step in
    ten (Student's t, 2 degrees of freedom): so it counts as no less than the median over the steps.
    """
    sd = {step: statistics.stdev(at_step) for step, at_step in values.items()}
    least, found = statistics.median(sd.values()), {}
    for step, at_step in values.items():
        mean, n = statistics.fmean(at_step), len(at_step)
        half = max(3 * max(sd[step], least) * math.sqrt(1 + 1 / n), floors[step])
        found[step] = (mean, mean - half, mean + half)
    return found


def make_reference(names: list[str], path: Path) -> None:
    """Write the reference of runs with several seeds: `path`, and its facts in .json beside it."""
    facts_path = path.with_suffix(".json")
    for file in (path, facts_path):
        if file.exists():
            raise UserError(f"{file} is there already; remove it, or give another --ref=NAME.log")
    if len(names) < 2 or path.suffix == ".json":
        raise UserError(f"got make={','.join(names)} and ref={path}, wanted runs of two seeds or more and a "
                        f".log; give --make=log_a,log_b,log_c --ref=NAME.log")
    runs = [read_run(name) for name in names]
    for name, (streams, record) in zip(names, runs):
        missing = [stream for stream in ("val", *JUDGED) if stream not in streams]
        if missing or not record:
            raise UserError(f"{name} has no {', '.join(missing) or 'runs.jsonl'}; give folders that "
                            f"train_gpt2.py has written")
        bad = [f"{stream} at step {step}" for stream in ("val", *JUDGED)
               for step, value in streams[stream].items() if not math.isfinite(value)]
        if bad:
            raise UserError(f"{name} has nan or inf for {', '.join(bad)}; make the reference of other runs")
        differing = differing_settings(runs[0][1]["config"], record["config"])
        if runs[0][1]["data"] != record["data"]:
            differing.append(f"data {runs[0][1]['data']} and {record['data']}")
        if differing:
            raise UserError(f"{names[0]} and {name} differ in more than the seed: {'; '.join(differing)}; "
                            f"give runs of the same settings on the same data")
    seeds = [record["config"]["seed"] for _, record in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"got seeds {seeds} in {', '.join(names)}, wanted all different; train with --seed=N")
    steps = sorted(set.intersection(*(set(streams["val"]) for streams, _ in runs)))
    lines = [f"0 unigram {runs[0][0]['unigram'][0]:.8g}"]
    values = {stream: {step: [streams[stream][step] for streams, _ in runs] for step in steps}
              for stream in ("val", *JUDGED)}
    judged = {stream: bands(values[stream], {step: FLOOR * statistics.fmean(values[scale][step])
                                             for step in steps}) for stream, scale in JUDGED.items()}
    for step in steps:
        lines.append(f"{step} val {statistics.fmean(values['val'][step]):.8g}")
        for stream in JUDGED:
            mean, low, high = judged[stream][step]
            lines += [f"{step} {stream} {mean:.8g}", f"{step} {stream}_low {low:.8g}",
                      f"{step} {stream}_high {high:.8g}"]
    config = runs[0][1]["config"]
    facts = {"format": 1, "data": runs[0][1]["data"], "seeds": seeds,
             "settings": {key: config[key] for key in CURVE if key in config},
             "band": f"mean of {len(runs)} seeds +- max(3 sd sqrt(1 + 1/{len(runs)}), {FLOOR:.1%} of loss)",
             "made_from": [{key: record.get(key) for key in ("git", "torch", "device", "world_size")}
                           for _, record in runs]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(facts_path, f"{json.dumps(facts, indent=1)}\n".encode())
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    print(f"{path}: {len(steps)} steps, {steps[0]} to {steps[-1]}, {facts['band']}")


def compare(name: str, path: Path) -> bool:
    """Print a run's values beside the reference's bands; whether all of them are inside."""
    if not path.is_file() or not path.with_suffix(".json").is_file():
        raise UserError(f"ref={path}: wanted a reference and its .json; give --ref=reference/NAME.log, or "
                        f"make one with --make=log_a,log_b,log_c")
    (streams, record), reference = read_run(name), parse_log(path)
    facts = read_json(path.with_suffix(".json"), {"data": str, "settings": {}, "band": str})
    differing = differing_settings(facts["settings"], record.get("config", {}))
    if differing:
        raise UserError(f"{path} and {name} have different settings: {'; '.join(differing)}; compare with a "
                        f"reference of these settings (--make makes one)")
    steps = sorted(reference["val_bpb"])
    rows = [(step, stream, streams[stream][step], reference[f"{stream}_low"][step],
             reference[f"{stream}_high"][step])
            for step in steps for stream in JUDGED if step in streams.get(stream, {})]
    if not rows:
        raise UserError(f"{name} has no val_bpb at any step of {path}: {', '.join(map(str, steps))}; compare "
                        f"again later, or train with a --val_interval that meets these")
    print(f"reference: {path}, {facts['band']}")
    if not record:
        print(f"settings:  {name} has no runs.jsonl, so nothing is known of its settings and data")
    elif record["data"] != facts["data"]:
        print(f"data:      {record['data']}, the reference's is {facts['data']}: another corpus, whose own "
              f"difficulty shows here too")
    print(f"\n{'step':>6s}  {'stream':17s}  {'run':>8s}  {'low':>8s} to {'high':>8s}")
    outside = []
    for step, stream, value, low, high in rows:
        inside = low <= value <= high  # False for nan
        outside += [] if inside else [f"{stream} at step {step}"]
        print(f"{step:6d}  {stream:17s}  {value:8.4f}  {low:8.4f} to {high:8.4f}  "
              f"{'inside' if inside else 'OUTSIDE'}")
    last, verdict = rows[-1][0], "outside" if outside else "inside"
    print(f"\n{'' if last == steps[-1] else 'so far '}{verdict}: {len(rows) - len(outside)} of {len(rows)} "
          f"values up to step {last} of {steps[-1]} are in the band"
          + (f"; the first that is not is {outside[0]}" if outside else ""))
    return not outside


if __name__ == "__main__":
    configure(globals())
    if make:
        make_reference(make.split(","), Path(ref))
    elif not compare(run, Path(ref)):
        sys.exit(1)
