"""
Check, before a long run, what makes training on several processes fail or crawl; every finding with its cure.

    torchrun --standalone --nproc_per_node=8 doctor.py  # the GPUs of one machine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 doctor.py
    python doctor.py --data_dir=python_corpus           # one process: device, limits, folders

Start it as train_gpt2.py will be started: same launcher, same nodes, same folders. It compares the ranks'
machines and versions, checks sums of integers that an all-reduce must give exactly, measures its bandwidth,
looks for the same log_dir and the same data from every rank, and compares the clocks. One screen, under half
a minute. Exit code 0: all well (notes are advice); 1: something is wrong; 2: a flag is.

A rank that does not come, or hangs, is named after --timeout seconds. Before that, torchrun itself waits for
nodes that are missing, 10 minutes unless told otherwise: --rdzv_conf=join_timeout=60. Reads data_dir; writes
and removes one small file beside log_dir.
"""

import contextlib
import json
import os
import platform
import secrets
import shutil
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from configurator import Between, PathName, UserError, configure, env_number
from device import resolve_device
from files import write_atomically
from shards import TokenStream

data_dir: PathName = "edu_fineweb10B"  # the same shards for every rank; not there on any rank = not checked
log_dir: PathName = "log"  # its parent folder must be the same for every rank
device = "auto"  # auto|cpu|cuda|mps
timeout: Between(1, 86_400) = 60.0  # seconds that each check waits for a missing rank

MESSAGE_MB = (1, 16, 64, 256)  # float32 gradients of GPT-2 124M are 498 MB, which DDP sends in pieces of 25
REPEATS = 5  # all-reduces per message size
MEASURE_SECONDS = 1.0  # a larger message that would take longer is left out
GRADIENT_BYTES = 4 * 124_439_808  # of GPT-2 124M
SLOW_GB_S = {"cpu": 0.2, "one host": 5.0, "hosts": 1.0}  # PCIe 3.0 x8 gives 6, 10 Gbit/s 1.2
MAX_CLOCK_SECONDS = 1.0  # more, and the times in logs and file systems of two nodes contradict each other
LAST_WORDS = 5.0  # seconds that a rank which has nothing left to do waits for what the others say
MIN_OPEN_FILES = 1024  # each split's loader holds 128 shards open, torch and its workers as many
MIN_SHM = 2**30  # NCCL passes messages within a host through /dev/shm; Docker gives 64 MB
MIN_FREE_DISK = 10 * 2**30  # a checkpoint of GPT-2 124M is 1.5 GB, and four are there while one is written
NETWORK = ("check the firewall, and let NCCL_SOCKET_IFNAME (GPUs) or GLOO_SOCKET_IFNAME (CPUs) name the "
           "interface that joins the nodes, one of `ip -br addr`")
GPU_LINKS = ("try NCCL_P2P_DISABLE=1 on one host, NCCL_IB_DISABLE=1 between hosts, and read what "
             "NCCL_DEBUG=INFO says")
CURES = {"cpu": NETWORK, "mps": NETWORK, "cuda": f"{GPU_LINKS}; {NETWORK}"}


class Unwell(Exception):
    """What makes further checks pointless; the message is a finding like the others."""


class Peers:
    """All ranks, through torch's key-value store: it works where the network between devices does not."""

    def __init__(self):
        self.rank, self.size = env_number("RANK", 0), env_number("WORLD_SIZE", 1)
        if self.size == 1:
            self.store = dist.HashStore()
            return
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        torchrun_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            self.store = dist.TCPStore(address, port, self.size, self.rank == 0 and not torchrun_serves,
                                       timedelta(seconds=timeout), wait_for_workers=False)
        except RuntimeError as error:
            raise Unwell(f"rank {self.rank} on {socket.gethostname()} did not reach rank 0 at "
                         f"{address}:{port} within {timeout:g} s ({first_line(error)}); start rank 0, check "
                         f"MASTER_ADDR, MASTER_PORT and the firewall") from error
        self.store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), self.store)

    def gather(self, what: str, value) -> list:
        """The values of all ranks, by rank; Unwell names those who have not come after `timeout` seconds."""
        try:
            self.store.set(f"{what}/{self.rank}", json.dumps(value))
            keys = [f"{what}/{r}" for r in range(self.size)]
            if not wait_for(self.store, keys, timeout) and (absent := self.absent(self.store, what)):
                if not self.speaks(self.store, what, min(set(range(self.size)) - set(absent))):
                    raise Unwell("")
                self.store.set(f"said {what}", "")  # it will be, before any rank ends
                raise Unwell(f"{name_ranks(absent)} of {self.size} did not come to `{what}` within "
                             f"{timeout:g} s; read the output of their nodes, and {NETWORK}")
            return [json.loads(value) for value in self.store.multi_get(keys)]
        except RuntimeError as error:  # rank 0 or torchrun, which serves the store, has ended
            raise Unwell(f"rank {self.rank} has lost rank 0 ({first_line(error)}); read what rank 0 says"
                         ) from error

    def absent(self, store, what: str) -> list[int]:
        """Ranks that have not set a key; one by one, so for messages only."""
        return [r for r in range(self.size) if not store.check([f"{what}/{r}"])]

    def speaks(self, store, what: str, expected: int) -> bool:
        """Whether this rank is the one that says what all know: the expected one, or if that does not (its
        clock may strike much later than this one's, or not at all), the first of the others."""
        if self.rank != expected and wait_for(store, [f"said {what}"], LAST_WORDS):
            return False
        return store.add(f"speaks {what}", 1) == 1

    @contextlib.contextmanager
    def watch(self, what: str, device_type: str):
        """Around collectives: an exception becomes Unwell, and `timeout` seconds without an end exit 1."""
        store, came_out = self.store, False

        def give_up():
            nonlocal came_out
            try:
                absent, inside = self.absent(store, f"begin {what}"), self.absent(store, f"end {what}")
                came_out = self.rank not in inside  # in this very moment
                if not came_out and self.speaks(store, what, min(set(inside) - set(absent))):
                    who = (f"{name_ranks(absent)} never began it" if absent else
                           f"{name_ranks(inside)} began it and did not come out")
                    print(f"WRONG: {what} hangs: after {timeout:g} s {who}; {CURES[device_type]}", flush=True)
                    store.set(f"said {what}", "")
            finally:  # also when whoever serves the store has gone
                if not came_out:
                    os._exit(1)

        timer = threading.Timer(timeout, give_up)
        timer.daemon = True
        try:
            store = self.store.clone()  # the store's own connection may be the one that hangs
            self.store.set(f"begin {what}/{self.rank}", "")
            timer.start()
            yield
            self.store.set(f"end {what}/{self.rank}", "")
        except RuntimeError as error:
            with contextlib.suppress(RuntimeError):
                if self.store.check([f"said {what}"]):  # the others gave up, and so the connection was lost
                    raise Unwell("") from error
            raise Unwell(f"{what} failed on rank {self.rank}, {socket.gethostname()}: {first_line(error)}; "
                         f"{CURES[device_type]}") from error
        finally:
            timer.cancel()

    def leave(self) -> None:
        """Let all ranks speak before one ends: torchrun stops the others once it sees an exit code of 1.

        None waits longer than LAST_WORDS for one that hangs. Rank 0, which may be serving the store, goes
        last, so that no other rank is cut off.
        """
        with contextlib.suppress(RuntimeError):
            self.store.set(f"said/{self.rank}", "")
            wait_for(self.store, [f"said/{r}" for r in range(self.size)], LAST_WORDS)
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                absent = self.absent(self.store, "said")
                wait_for(self.store, [f"left/{r}" for r in range(self.size) if r not in absent], LAST_WORDS)


def wait_for(store, keys: list[str], seconds: float) -> bool:
    """Whether all keys are set, which is waited for no longer than so many seconds."""
    deadline = time.monotonic() + seconds
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def name_ranks(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"; [3] -> "rank 3"."""
    spans = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"


# ---- what each rank is -----------------------------------------------------------


def describe_rank(dev) -> dict:
    """What this process has and what its libraries are; plain values that travel as JSON."""
    if dev.type == "cuda":
        free, total = torch.cuda.mem_get_info(dev.device)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        free, nccl = total, "-"  # what the system counts as free memory of a host is mostly its file cache
    try:
        import resource  # not on Windows
        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:
        open_files = MIN_OPEN_FILES
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"host": socket.gethostname(), "device": str(dev.device), "name": dev.name, "memory": total,
            "free_memory": free, "torch": str(torch.__version__), "nccl": nccl,
            "cuda": torch.version.cuda or torch.version.hip or "-", "python": platform.python_version(),
            "threads": torch.get_num_threads(), "cores": cores, "open_files": open_files,
            "shm": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else MIN_SHM}


def print_table(facts: list[dict]) -> None:
    """One line per kind of rank on a host, so that 64 ranks on 8 hosts are 8 lines."""
    rows = {}
    for rank, f in enumerate(facts):
        kind = (f["host"], f["name"], f"{f['memory'] / 2**30:.0f} GiB", f["torch"], f["cuda"], f["nccl"])
        rows.setdefault(kind, []).append(rank)
    table = [("rank", "host", "device", "memory", "torch", "CUDA", "NCCL")]
    for (host, name, *rest), ranks in rows.items():
        devices = sorted({facts[rank]["device"] for rank in ranks})
        span = devices[0] if len(devices) == 1 else f"{devices[0]}-{devices[-1].partition(':')[2]}"
        table.append((name_ranks(ranks).split(" ", 1)[1], host, f"{name} ({span})", *rest))
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def compare_ranks(facts: list[dict]) -> tuple[list[str], list[str]]:
    """(what is wrong, what is worth a note) in the ranks' descriptions."""
    wrong, notes = [], []
    by_host = {}
    for rank, f in enumerate(facts):
        by_host.setdefault(f["host"], []).append(rank)
    for key in ("torch", "cuda", "nccl", "python", "name"):
        values = {}
        for rank, f in enumerate(facts):
            values.setdefault(f[key], []).append(rank)
        if len(values) > 1:
            which = "; ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in values.items())
            if key == "name":
                notes.append(f"devices differ: {which}; every step waits for the slowest")
            else:
                wrong.append(f"{key} differs: {which}; install one requirements.txt into one Python on all")
    for host, ranks in by_host.items():
        some = facts[ranks[0]]
        on_cuda = some["device"].startswith("cuda")
        devices = [facts[rank]["device"] for rank in ranks]
        if on_cuda and len(set(devices)) < len(devices):
            wrong.append(f"{host}: {name_ranks(ranks)} share a GPU ({', '.join(devices)}); start at most one "
                         f"process per GPU, and leave --device=auto")
        for rank in ranks:
            used = facts[rank]["memory"] - facts[rank]["free_memory"]
            if used > max(2**30, 0.1 * facts[rank]["memory"]):  # a CUDA context alone takes half a GiB
                notes.append(f"{host}: {used / 2**30:.1f} GiB of {facts[rank]['device']} are in use already; "
                             f"see nvidia-smi")
        threads = sum(facts[rank]["threads"] for rank in ranks)
        share = max(1, some["cores"] // len(ranks))
        if threads > some["cores"] and len(ranks) > 1:
            notes.append(f"{host}: {threads} threads on {some['cores']} cores; set OMP_NUM_THREADS={share}")
        elif not on_cuda and threads <= some["cores"] // 2:
            notes.append(f"{host}: {threads} threads on {some['cores']} cores, and torchrun sets "
                         f"OMP_NUM_THREADS=1 by itself; set OMP_NUM_THREADS={share}")
        if 0 <= some["open_files"] < MIN_OPEN_FILES:
            notes.append(f"{host}: ulimit -n is {some['open_files']}; type ulimit -n 65536 before you start")
        if on_cuda and len(ranks) > 1 and some["shm"] < MIN_SHM:
            notes.append(f"{host}: /dev/shm has {some['shm'] / 2**20:.0f} MiB, too little for NCCL; give "
                         f"Docker --shm-size=8g or --ipc=host")
    return wrong, notes


# ---- the network -----------------------------------------------------------------


def check_all_reduce(peers: Peers, dev) -> list[str]:
    """Sums of integers that are exact in the dtype whatever the order; returns what is wrong, seen from here.

    Rank r gives (i + r) mod m at place i, with m so small that no partial sum needs more bits than the dtype
    has: another rank's share left out, taken twice or at another place changes a sum.
    """
    wrong = []
    where = dev.device if dev.type == "cuda" else "cpu"
    dtypes = [torch.float32] + ([torch.bfloat16] if dev.type == "cuda" else [])
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        exact_below = round(2 / torch.finfo(dtype).eps)  # 2**24, and 256
        m = max(2, min(1009, exact_below // peers.size))
        period = sum((torch.arange(m) + r) % m for r in range(peers.size))
        for n in (1, 1009, 2**18, 2**22):
            place = torch.arange(n, device=where)
            got = ((place + peers.rank) % m).to(dtype)
            dist.all_reduce(got)
            bad = (got != period.to(where, dtype)[place % m]).nonzero()
            if len(bad) and not any(name in finding for finding in wrong):  # the first is enough
                i = bad[0].item()
                wrong.append(f"all-reduce of {n:,} x {name} on rank {peers.rank}, {socket.gethostname()}: "
                             f"{len(bad):,} sums are wrong, at {i:,} got {got[i].item():g}, wanted "
                             f"{period[i % m].item():g}; {CURES[dev.type]}")
    return wrong


def measure_bandwidth(peers: Peers, dev) -> dict[int, float]:
    """{megabytes: GB/s of bus bandwidth}: 2 (n-1)/n bytes / seconds, as nccl-tests define it.

    It is what each link carries, so that it can be held against the hardware's figure whatever n is.
    """
    where, bandwidth = dev.device if dev.type == "cuda" else "cpu", {}
    for megabytes in MESSAGE_MB:
        message = torch.zeros(megabytes * 250_000, device=where)
        dist.all_reduce(message)  # the first one makes the connections
        dev.synchronize()
        t0 = time.perf_counter()
        for _ in range(REPEATS):
            dist.all_reduce(message)
        dev.synchronize()
        seconds = max(peers.gather(f"{megabytes} MB", (time.perf_counter() - t0) / REPEATS))
        bandwidth[megabytes] = 2 * (peers.size - 1) / peers.size * megabytes * 1e6 / seconds / 1e9
        if 4 * REPEATS * seconds > MEASURE_SECONDS:
            break
    return bandwidth


def measure_clocks(peers: Peers, dev) -> tuple[list[float], float]:
    """(seconds that each rank's clock is ahead of rank 0's, how wrong these may be).

    After one all_gather every rank reads its clock and sends it by a second. Rank r's reading thus happened
    after rank 0 entered the first and before it left the second; the best of 20 rounds is the narrowest.
    """
    where = dev.device if dev.type == "cuda" else "cpu"
    best_offsets, best_width = [], float("inf")
    for _ in range(20):
        stamps = [torch.zeros(1, dtype=torch.float64, device=where) for _ in range(peers.size)]
        entered = time.time()
        dist.all_gather(stamps, torch.zeros_like(stamps[0]))
        dev.synchronize()
        dist.all_gather(stamps, torch.full_like(stamps[0], time.time()))
        read = [stamp.item() for stamp in stamps]
        left = time.time()
        if left - entered < best_width:
            best_width = left - entered
            best_offsets = [stamp - (entered + left) / 2 for stamp in read]
    offsets, width = peers.gather("clocks", (best_offsets, best_width))[0]
    return [0.0, *offsets[1:]], width / 2


# ---- the files -------------------------------------------------------------------


def check_files(peers: Peers) -> tuple[str, list[str], list[str]]:
    """(a line on log_dir, wrong, notes): what rank 0 writes beside log_dir must be what every rank reads."""
    folder = Path(log_dir).absolute().parent
    path, token, failure = folder / f".doctor_{os.getpid()}", secrets.token_hex(16), ""
    if peers.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, token.encode())
        except (UserError, OSError) as error:
            failure = f"{error}; give a --log_dir that can be written to"
    name, token, failure, folder_0 = peers.gather("token", (path.name, token, failure, str(folder)))[0]
    if failure:
        return "not checked", [failure], []
    path, seen = folder / name, False
    give_up = time.monotonic() + 5  # NFS shows a new file to other hosts when its cache of the folder is old
    while not seen and time.monotonic() < give_up:
        with contextlib.suppress(OSError):  # a folder that this rank may not enter shows it no file
            seen = path.read_text(encoding="utf-8") == token
        if not seen:
            time.sleep(0.1)
    try:
        views = peers.gather("file seen", (seen, str(folder), socket.gethostname()))
    finally:
        if peers.rank == 0:
            path.unlink(missing_ok=True)
    wrong = [f"rank {rank} on {host} does not see in {folder_r} what rank 0 wrote in {folder_0}; give all "
             f"ranks one --log_dir, absolute, on a shared file system"
             for rank, (seen, folder_r, host) in enumerate(views) if not seen]
    if wrong:
        return "not the same for all ranks", wrong, []
    free, notes = shutil.disk_usage(folder).free, []
    if free < MIN_FREE_DISK:
        notes.append(f"{folder_0} has {free / 1e9:.1f} GB free, a checkpoint of GPT-2 124M is 1.5 GB; make "
                     f"room, or lower --keep_checkpoints")
    return f"{folder_0} is one folder for every rank, {free / 1e9:,.0f} GB free", wrong, notes


def check_data(peers: Peers) -> tuple[str, list[str]]:
    """(a line on data_dir, wrong): every rank must find the same shards and manifest, or none any."""
    found, folder = "", Path(data_dir).absolute()
    if folder.is_dir():
        try:
            streams = {split: TokenStream(folder, split) for split in ("train", "val")}
            found = ", ".join(f"{split} {len(stream):,} tokens, fingerprint {stream.fingerprint}"
                              for split, stream in streams.items())
        except (UserError, OSError) as error:
            found = f"error: {error}"
    kinds = {}
    for rank, view in enumerate(peers.gather("data", (found, str(folder)))):
        kinds.setdefault(tuple(view), []).append(rank)
    seen = {found for found, _ in kinds}
    if len(seen) > 1:
        which = "; ".join(f"{name_ranks(ranks)}: {found or 'nothing'} in {folder}"
                          for (found, folder), ranks in kinds.items())
        wrong = (f"data_dir={data_dir} is not the same for all ranks: {which}; give one --data_dir, or copy "
                 f"the folder to every node")
        return "not the same for all ranks", [wrong]
    if found.startswith("error: "):
        return "damaged", [found.removeprefix("error: ")]
    return f"{data_dir}: {found}" if found else f"{data_dir} is not there, not checked", []


# ---- the visit -------------------------------------------------------------------


def visit(peers: Peers, wrong: list[str]) -> None:
    """Make all checks and add to `wrong`; rank 0 prints what it finds at once, as the next check may hang."""
    def say(what, line):
        if peers.rank == 0:
            print(f"{what:11s} {line}", flush=True)

    def found(its_wrong, its_notes=()):
        wrong.extend(its_wrong)
        if peers.rank == 0:
            for kind, findings in (("note", its_notes), ("WRONG", its_wrong)):
                print("".join(f"{kind}: {finding}\n" for finding in findings), end="", flush=True)

    dev = resolve_device(device, "float32", local_rank=env_number("LOCAL_RANK", 0))
    facts = peers.gather("start", describe_rank(dev))
    n_hosts = len({f["host"] for f in facts})
    backend = "nccl" if dev.type == "cuda" else "gloo"
    if peers.rank == 0:
        print_table(facts)
        print()
    say("processes", f"{peers.size} on {n_hosts} host(s), {backend}")
    found(*compare_ranks(facts))
    if peers.size > 1:
        with peers.watch("connecting", dev.type):
            dist.init_process_group(backend, store=dist.PrefixStore("group", peers.store), rank=peers.rank,
                                    world_size=peers.size, timeout=timedelta(seconds=2 * timeout))
        with peers.watch("the all-reduce check", dev.type):
            mine = check_all_reduce(peers, dev)
        sums = [finding for theirs in peers.gather("sums", mine) for finding in theirs]
        say("all-reduce", "wrong" if sums else "sums of integers are exact")
        found(sums)

        with peers.watch("the bandwidth check", dev.type):
            bandwidth = measure_bandwidth(peers, dev)
        best = max(bandwidth.values())
        seconds = 2 * (peers.size - 1) / peers.size * GRADIENT_BYTES / (best * 1e9)
        rates = ", ".join(f"{rate:.3g} GB/s ({megabytes} MB)" for megabytes, rate in bandwidth.items())
        say("bandwidth", f"{rates}: the gradients of GPT-2 124M take {seconds:.2g} s")
        slow = SLOW_GB_S["cpu" if dev.type != "cuda" else "one host" if n_hosts == 1 else "hosts"]
        if best < slow:
            found([], [f"{best:.3g} GB/s is slow, wanted {slow:g} or more; {CURES[dev.type]}"])

        with peers.watch("the clock check", dev.type):
            offsets, error = measure_clocks(peers, dev)
        farthest = max(offsets, key=abs)
        say("clocks", f"at most {abs(farthest):.6f} s from rank 0's, known to {error:.6f} s")
        for rank, offset in enumerate(offsets):
            if abs(offset) - error > MAX_CLOCK_SECONDS:
                side = "ahead of" if offset > 0 else "behind"
                found([(f"the clock of rank {rank} on {facts[rank]['host']} is {abs(offset):.2f} s {side} "
                        f"rank 0's; start chrony or ntpd there")])
    line, *findings = check_files(peers)
    say("log_dir", line)
    found(*findings)
    line, wrong_data = check_data(peers)
    say("data_dir", line)
    found(wrong_data)


def main() -> None:
    rank, wrong, peers = env_number("RANK", 0), [], None
    try:
        peers = Peers()
        visit(peers, wrong)
    except (Unwell, RuntimeError, OSError) as error:  # no other rank may know of it
        known = isinstance(error, Unwell)
        wrong.append(str(error) if known else f"rank {rank} on {socket.gethostname()}: {first_line(error)}")
        if wrong[-1]:
            print(f"WRONG: {wrong[-1]}")
    if rank == 0:
        print(f"\n{len(wrong)} thing(s) wrong" if wrong else "\nall well")
    sys.stdout.flush()
    if peers:
        peers.leave()
    os._exit(1 if wrong else 0)  # gloo's threads now and then abort a process that ends the long way


if __name__ == "__main__":
    configure(globals())
    main()
