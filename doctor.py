"""
Check, before a long run, what makes training on several processes fail or crawl; every finding has its fix.

    torchrun --standalone --nproc_per_node=8 doctor.py  # the GPUs of one machine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 doctor.py
    python doctor.py --data_dir=python4k                # one process: device, limits, folders

Start it as you will start train_gpt2.py: same launcher, same nodes, same folders. It compares the machines
and versions of all ranks, all-reduces integers whose sums must be exact, measures the bandwidth, and looks
for the same log_dir and the same data from every rank. Takes half a minute; reads data_dir; writes and
removes one small file beside log_dir, whose parent folder it may create. Exit code 0: no problem (notes are
advice), 1: problems, 2: a bad flag.

A rank that never starts, or that hangs, is named after --timeout seconds. For nodes that are missing torchrun
itself waits first, 10 minutes by default: --rdzv_conf=join_timeout=60.
"""

import contextlib
import os
import platform
import re
import secrets
import shutil
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from configurator import Between, PathName, UserError, configure, report_failure
from device import resolve_device
from ranks import Ranks, by_value, first_line, name_ranks
from shards import TokenStream

data_dir: PathName = "edu_fineweb10B"  # must be the same shards on every rank; skipped if no rank has it
log_dir: PathName = "log"  # its parent folder must be the same one on every rank
device = "auto"  # auto|cpu|cuda|mps
timeout: Between(1, 86_400) = 60.0  # seconds to wait for a missing rank

MESSAGE_MB, REPEATS = 25, 5  # DDP sends gradients in buckets of 25 MB
GRADIENT_MB = 498  # of GPT-2 124M
SLOW_GB_S = {"cpu": 0.2, "one host": 5.0, "hosts": 1.0}  # PCIe 3.0 x8 gives 6, 10 Gbit/s gives 1.2
MIN_OPEN_FILES = 1024  # the loaders keep up to 256 shards open; torch and its workers need as many
MIN_SHM = 2**30  # NCCL passes messages within a host through /dev/shm; Docker's default is 64 MB
NETWORK = ("check the firewall, and set NCCL_SOCKET_IFNAME (GPUs) or GLOO_SOCKET_IFNAME (CPUs) to the "
           "interface that joins the nodes, one of `ip -br addr`")
GPU_LINKS = "try NCCL_P2P_DISABLE=1 on one host, NCCL_IB_DISABLE=1 between hosts, and read NCCL_DEBUG=INFO"


def on_every_rank(ranks, what: str, fix: str, action, *arguments) -> list:
    """The results of action(*arguments), by rank. Raises UserError on all ranks if one failed or hangs."""
    result = failure = None
    try:
        result = action(*arguments)
    except (OSError, RuntimeError, UserError) as error:
        failure = f"{platform.node()}: {first_line(error)}"
    try:
        if ranks.many:  # longer than the collectives of `action`, which may have timed out on other ranks
            dist.monitored_barrier(timeout=timedelta(seconds=2 * timeout), wait_all_ranks=True)
        results = ranks.gather((result, failure))
    except RuntimeError as error:
        absent = re.search(r"Ranks ([\d, ]+) failed to pass", str(error))
        who = (name_ranks([int(rank) for rank in absent[1].split(",")]) if absent else
               f"a rank, which rank 0 names ({first_line(error)}),")
        raise UserError(f"{what} hangs: {who} did not come back from it; {fix}") from error
    failures = [f"{what} failed on rank {rank}, {failure}; {fix}"
                for rank, (_, failure) in enumerate(results) if failure]
    if failures:
        raise UserError("\nWRONG: ".join(failures))
    return [result for result, _ in results]


def describe_rank(dev) -> dict:
    """This process's device, limits and versions, as plain values."""
    open_files = MIN_OPEN_FILES
    with contextlib.suppress(ImportError):
        import resource  # not on Windows
        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if dev.type == "cuda" else "-"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"host": platform.node(), "device": str(dev.device), "name": dev.name,
            "memory": f"{(dev.total_memory() or 0) / 2**30:.0f} GiB", "torch": str(torch.__version__),
            "cuda": torch.version.cuda or torch.version.hip or "-", "nccl": nccl,
            "python": platform.python_version(), "threads": torch.get_num_threads(), "cores": cores,
            "open_files": open_files,
            "shm": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else MIN_SHM}


def host_table(facts: list[dict]) -> str:
    """One line per kind of rank on a host, so that 64 ranks on 8 hosts are 8 lines."""
    columns, kinds = ("host", "name", "memory", "torch", "cuda", "nccl"), {}
    for rank, f in enumerate(facts):
        kinds.setdefault(tuple(f[column] for column in columns), []).append(rank)
    rows = [("rank", *columns)]
    rows += [(name_ranks(ranks).split(" ", 1)[1], *kind) for kind, ranks in kinds.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def compare_ranks(facts: list[dict]) -> tuple[list[str], list[str]]:
    """(problems, notes) in the descriptions of all ranks."""
    wrong, notes, hosts = [], [], {}
    for key in ("torch", "cuda", "nccl", "python", "name"):
        if len({f[key] for f in facts}) > 1:
            advice = "every step waits for the slowest" if key == "name" else "install the same on all hosts"
            (notes if key == "name" else wrong).append(
                f"{key} differs: {by_value([f[key] for f in facts])}; {advice}")
    for rank, f in enumerate(facts):
        hosts.setdefault(f["host"], []).append(rank)
    for host, ranks in hosts.items():
        f, devices = facts[ranks[0]], [facts[rank]["device"] for rank in ranks]
        on_cuda, threads = f["device"].startswith("cuda"), sum(facts[rank]["threads"] for rank in ranks)
        if on_cuda and len(set(devices)) < len(devices):
            wrong.append(f"{host}: {name_ranks(ranks)} share a GPU ({', '.join(devices)}); start at most one "
                         f"process per GPU, and leave --device=auto")
        too_few = not on_cuda and threads <= f["cores"] // 2  # torchrun's default is 1
        if too_few or (len(ranks) > 1 and threads > f["cores"]):
            notes.append(f"{host}: {threads} threads on {f['cores']} cores; set OMP_NUM_THREADS="
                         f"{max(1, f['cores'] // len(ranks))}")
        if 0 <= f["open_files"] < MIN_OPEN_FILES:
            notes.append(f"{host}: ulimit -n is {f['open_files']}; type ulimit -n 65536 before you start")
        if on_cuda and len(ranks) > 1 and f["shm"] < MIN_SHM:
            notes.append(f"{host}: /dev/shm has {f['shm'] / 2**20:.0f} MiB, too little for NCCL; give "
                         f"Docker --shm-size=8g or --ipc=host")
    return wrong, notes


def try_all_reduce(ranks, dev, group) -> tuple[str, float]:
    """(what is wrong with its sums, its seconds for MESSAGE_MB).

    Rank r gives (i + r) mod m at position i, with m so small that float32 holds every partial sum exactly,
    whatever the order: a share that is left out, added twice or misplaced changes a sum.
    """
    where, wrong = dev.device if dev.type == "cuda" else "cpu", ""
    m = max(2, min(1009, 2**24 // ranks.world_size))
    period = sum((torch.arange(m) + r) % m for r in range(ranks.world_size)).to(where)
    for n in (1, 1009, MESSAGE_MB * 250_000):
        i = torch.arange(n, device=where)
        got, expected = ((i + ranks.rank) % m).float(), period[i % m].float()
        dist.all_reduce(got, group=group)
        bad = (got != expected).nonzero()
        if len(bad) and not wrong:  # and go on, as the other ranks do
            wrong = (f"all-reduce of {n:,} x float32 on rank {ranks.rank}, {platform.node()}: {len(bad):,} "
                     f"wrong sums, the first {got[bad[0]].item():g} instead of {expected[bad[0]].item():g}")
    dev.synchronize()
    t0 = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(got, group=group)
    dev.synchronize()
    return wrong, (time.perf_counter() - t0) / REPEATS


def check_network(ranks, dev, n_hosts: int) -> tuple[str, list[str], list[str]]:
    """(two lines on all-reduce and bandwidth, problems, notes)."""
    backend, kind, fix = "gloo", "cpu", NETWORK
    if dev.type == "cuda":
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a timeout raises instead of aborting
        backend, kind, fix = "nccl", "one host" if n_hosts == 1 else "hosts", f"{GPU_LINKS}; {NETWORK}"
    # in a group of its own, which is unusable after a timeout
    group = dist.new_group(backend=backend, timeout=timedelta(seconds=timeout))
    results = on_every_rank(ranks, "the all-reduce", fix, try_all_reduce, ranks, dev, group)
    wrong, seconds = [f"{finding}; {fix}" for finding, _ in results if finding], max(t for _, t in results)
    # bus bandwidth as nccl-tests define it: what each link carries, for any number of ranks
    speed = 2 * (ranks.world_size - 1) / ranks.world_size * MESSAGE_MB / 1000 / seconds
    slow = f"{speed:.3g} GB/s is slow, expected {SLOW_GB_S[kind]:g} or more; {fix}"
    lines = (f"all-reduce  {'wrong' if wrong else 'sums of integers are exact'}\n"
             f"bandwidth   {speed:.3g} GB/s: the gradients of GPT-2 124M take "
             f"{seconds * GRADIENT_MB / MESSAGE_MB:.2g} s")
    return lines, wrong, [slow] if speed < SLOW_GB_S[kind] else []


def check_log_dir(ranks) -> tuple[str, list[str]]:
    """(a line, problems): the file that rank 0 makes beside log_dir must be there for every rank."""
    folder = Path(log_dir).absolute().parent
    name, folder_0 = ranks.gather((f".doctor_{secrets.token_hex(16)}", folder))[0]

    def make():
        if ranks.master:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()

    def appears():
        give_up = time.monotonic() + 5  # NFS may take seconds to show a new file to other hosts
        while not (folder / name).exists() and time.monotonic() < give_up:
            time.sleep(0.1)
        return (folder / name).exists(), platform.node(), folder

    fix = "give all ranks one writable --log_dir, absolute, on a shared file system"
    on_every_rank(ranks, "writing beside log_dir", fix, make)
    try:
        views = on_every_rank(ranks, "reading beside log_dir", fix, appears)
    finally:
        if ranks.master:
            (folder / name).unlink()
    wrong = [f"rank {rank} on {host} does not see in {where} what rank 0 wrote to {folder_0}; {fix}"
             for rank, (seen, host, where) in enumerate(views) if not seen]
    return f"log_dir     {'differs' if wrong else f'{folder_0} is one folder for every rank'}", wrong


def describe_data() -> str:
    """Token counts and fingerprints in data_dir; "nothing" if it does not exist."""
    if not Path(data_dir).is_dir():
        return "nothing"
    streams = {split: TokenStream(data_dir, split) for split in ("train", "val")}
    return ", ".join(f"{split} {len(stream):,} tokens, fingerprint {stream.fingerprint}"
                     for split, stream in streams.items())


def examine(ranks, dev, wrong: list[str]) -> None:
    """Run all checks. Problems go to `wrong`, the same on all ranks; rank 0 prints the rest."""
    def say(line, problems=(), notes=()):
        wrong.extend(problems)
        if ranks.master:
            print("\n".join([line, *(f"note: {note}" for note in notes)]), flush=True)

    ranks.connect(torch.device("cpu"), timeout)  # gloo: it works even if the links between GPUs do not
    facts = on_every_rank(ranks, "reading the device", "check its driver", describe_rank, dev)
    n_hosts = len({f["host"] for f in facts})
    say(f"{host_table(facts)}\n\nprocesses   {ranks.world_size} on {n_hosts} host(s)", *compare_ranks(facts))
    if ranks.many:
        say(*check_network(ranks, dev, n_hosts))
    say(*check_log_dir(ranks))
    data = on_every_rank(ranks, f"reading data_dir={data_dir}", "give a valid --data_dir", describe_data)
    differs = f"data_dir={data_dir} differs: {by_value(data)}; give one --data_dir, or copy it to all nodes"
    say(f"data_dir    {data_dir}: {data[0]} on rank 0", [differs] if len(set(data)) > 1 else [])
    ranks.shutdown()


def main() -> None:
    ranks, wrong = Ranks(), []
    dev = resolve_device(device, "float32", local_rank=ranks.local_rank)
    try:
        examine(ranks, dev, wrong)
    except UserError as error:
        wrong.append(str(error))
    except RuntimeError as error:
        wrong.append(f"another process has ended ({first_line(error)}); read what it says")
    if wrong:
        report_failure("\n".join([f"{len(wrong)} problem(s)", *(f"WRONG: {finding}" for finding in wrong)]))
    elif ranks.master:
        print("\nall well", flush=True)
    ranks.exit(1 if wrong else 0)


if __name__ == "__main__":
    configure(globals())
    main()
