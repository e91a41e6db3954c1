"""
The processes of a run, started by torchrun, or a single one: who they are, and what they do together. RANK
and friends are read here; fineweb.py, which forms no group, and configurator.py read some too.

    ranks = Ranks()                            # from the environment, checked
    ranks.connect(dev.device)                  # NCCL on CUDA, gloo elsewhere
    loss_sum, n = ranks.sum(loss_sum, n)       # over all processes
    result = ranks.on_all(read, path)          # if it fails on one process, all of them raise its error
    ranks.shutdown()

A single process needs no group: everything here works without one.
"""

import contextlib
import os
import platform
import signal
import socket
import sys
import time
from collections import Counter

import torch
import torch.distributed as dist

from configurator import TemporaryError, UserError, as_user_error, env_number

NOTE_SECONDS, LIMIT_SECONDS = 30, 300  # of waiting for the others: until a line is printed, until the end


class Ranks:
    """This process's place among `world_size`. Raises UserError if the environment makes no sense."""

    def __init__(self):
        self.rank, self.world_size = env_number("RANK", 0), env_number("WORLD_SIZE", 1)
        self.local_rank, self.nodes = env_number("LOCAL_RANK", 0), env_number("GROUP_WORLD_SIZE", 1)
        self.many = self.world_size > 1
        self.master = self.rank == 0  # the process that prints and writes
        self.by_torchrun, self.parent = "TORCHELASTIC_RUN_ID" in os.environ, os.getppid()
        # identifies the torchrun: the same after a restart, another when the command is typed again
        self.launcher = f"{platform.node()} {self.parent}" if self.by_torchrun else ""
        self._device = torch.device("cpu")
        fix = "start with torchrun, or type `unset WORLD_SIZE RANK` for a single process"
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if self.many and not os.environ.get(name):
                raise UserError(f"WORLD_SIZE={self.world_size} but {name} is not set: {fix}")
        port = env_number("MASTER_PORT", 29500) if self.many else 29500
        if not self.rank < self.world_size or not 0 < port < 2**16:
            raise UserError(f"RANK={self.rank}, WORLD_SIZE={self.world_size}, MASTER_PORT={port}: no "
                            f"such process or port; {fix}")

    def orphaned(self) -> bool:
        """Whether torchrun has died and left this process behind."""
        return self.by_torchrun and os.getppid() != self.parent

    def connect(self, device: torch.device, limit: float = 0) -> None:
        """Join the others. Raises TemporaryError, with the names of those that have not come, after `limit`
        seconds (default: LIMIT_SECONDS)."""
        if not self.many:
            return
        shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, not rank 0's
        if self.nodes > 1 and shared_store and env_number("TORCHELASTIC_MAX_RESTARTS", 0) > 0:
            raise UserError("--max-restarts on several nodes: torchrun's shared store keeps the addresses of "
                            "dead processes; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all nodes")
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        me, keys = f"rank {self.rank} on {platform.node()}", [f"rank {r}" for r in range(self.world_size)]
        store, start, limit = None, time.monotonic(), limit or LIMIT_SECONDS
        note = min(NOTE_SECONDS, limit)
        try:
            while store is None or not store.check(keys):  # a loop in Python, so that signals are handled
                if store is None and (self.master or _listens(host, port)):
                    store = dist.TCPStore(host, port, self.world_size, self.master and not shared_store,
                                          wait_for_workers=False)
                    if self.nodes == 1:  # after a restart torchrun's store still has the old addresses
                        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
                    store.set(keys[self.rank], "")
                time.sleep(0.02)
                waited = time.monotonic() - start
                if waited < note:
                    continue
                missing = [r for r, key in enumerate(keys) if not store.check([key])] if store else [0]
                whom = f"{name_ranks(missing)} at {host}:{port}"
                if missing and waited > limit:
                    raise TemporaryError(f"{me} waited {waited:.0f} s for {whom}; start all "
                                         f"{self.world_size} processes, and check MASTER_ADDR, MASTER_PORT "
                                         f"and the firewall")
                print(f"{me} is waiting for {whom}", file=sys.stderr, flush=True)
                note = limit
            on_gpu = device.type == "cuda"
            self._device = device if on_gpu else torch.device("cpu")
            dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=self.rank,
                                    world_size=self.world_size, device_id=device if on_gpu else None)
        except RuntimeError as error:  # torch's DistError is one
            raise TemporaryError(f"{me} could not join the others at {host}:{port} ({first_line(error)}); "
                                 f"read what rank 0 says") from error

    def sum(self, *values) -> list:
        """Python numbers -> their sums over all processes."""
        if not self.many:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        return sums.tolist()

    def any(self, flag) -> bool:
        """Whether `flag` is true on one process or more."""
        return self.sum(bool(flag))[0] > 0

    def gather(self, value) -> list:
        """A plain value of each process, by rank, on all of them."""
        everyone = [value] * self.world_size
        if self.many:
            dist.all_gather_object(everyone, value)
        return everyone

    def on_all(self, action, *arguments):
        """action(*arguments) on all processes; if it raises UserError or OSError on one, all raise that."""
        result = error = None
        try:
            result = action(*arguments)
        except (UserError, OSError) as caught:
            error = as_user_error(caught)
        if self.sum(error is not None)[0]:
            errors = self.gather(error)
            rank, first = next((rank, error) for rank, error in enumerate(errors) if error)
            self.shutdown()
            raise error or type(first)(f"rank {rank}: {first}")
        return result

    def differing(self, value) -> str:
        """"ranks 1, 3", whose value is not the most common one, or "" if all are equal; on all processes."""
        everyone = self.gather(value)
        usual = Counter(everyone).most_common(1)[0][0]
        odd = [rank for rank, theirs in enumerate(everyone) if theirs != usual]
        return name_ranks(odd) if odd else ""

    def fail(self, reason) -> None:
        """Raise UserError; called by all processes, for a reason that all of them see."""
        self.shutdown()
        raise UserError(reason)

    def require_equal(self, what: str, facts: dict) -> None:
        """Raise UserError on all processes, naming keys and ranks, unless all have the same {key: value}."""
        everyone, differences = self.gather(facts), []
        for key in dict.fromkeys(key for one in everyone for key in one):
            values = [one.get(key) for one in everyone]
            if any(value != values[0] for value in values):
                differences.append(f"{key} is {by_value(values)}")
        if differences:
            self.fail(f"processes differ in {what}: {'; '.join(differences)}; give all the same")

    def shutdown(self) -> None:
        """Leave the group once every process is done with it: gloo aborts one whose peers have left."""
        if self.many:
            dist.barrier()
            dist.destroy_process_group()

    def exit(self, code: int = 0) -> None:
        """End at once: gloo's threads outlive their group, and may abort a process that ends more slowly."""
        if self.many:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if code:
            sys.exit(code)


class StopRequests:
    """SIGTERM and Ctrl-C, noted for the training loop, which finishes its step, saves, and exits with 0.

    Before the loop (step is None) there is nothing to save: SIGTERM exits with 0 and Ctrl-C with 130. In the
    loop a second Ctrl-C exits with 130, except under torchrun, which may send two itself.
    """

    def __init__(self, ranks: Ranks, max_hours: float):
        """max_hours: of this start; 0 = no limit."""
        self.ranks, self.step, self.signals = ranks, None, []
        self.deadline = time.monotonic() + (3600 * max_hours or float("inf"))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        name = signal.Signals(number).name
        again = name in self.signals and not self.ranks.by_torchrun
        if name == "SIGINT" and (self.step is None or again):
            signal.default_int_handler(number, frame)
        if self.ranks.master and not self.signals:
            answer = f"{name}: finishing step {self.step}, then saving"
            if self.step is None:
                answer = f"stopped by {name} before the first step: there is nothing to save"
            with contextlib.suppress(OSError):  # Ctrl-C may have ended what reads it, such as tee
                os.write(2, f"\n{answer}\n".encode())  # print may be what the signal has interrupted
        if self.step is None:
            os._exit(0)
        self.signals.append(name)

    def reason(self, first: bool = False) -> str:
        """Why this process should stop: a signal, torchrun's death or the time; "" to go on. Before the first
        step of a start the time does not count, or a start might make no step at all."""
        if self.signals:
            return self.signals[0]
        if self.ranks.orphaned():
            return "the end of torchrun"
        return "--max_hours" if time.monotonic() >= self.deadline and not first else ""


def name_ranks(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"; [3] -> "rank 3"."""
    starts = sorted(rank for rank in ranks if rank - 1 not in ranks)
    ends = sorted(rank for rank in ranks if rank + 1 not in ranks)
    spans = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends))
    return f"rank{'s' if len(ranks) > 1 else ''} {spans}"


def by_value(values: list) -> str:
    """["a", "b", "a"], of ranks 0 to 2 -> "a on ranks 0, 2, but b on rank 1"."""
    ranks = {}
    for rank, value in enumerate(map(str, values)):
        ranks.setdefault(value, []).append(rank)
    return ", but ".join(f"{value} on {name_ranks(which)}" for value, which in ranks.items())


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _listens(host, port):
    """Whether a server is there. TCPStore itself prints a page of C++ frames where none is."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
        return True
    return False
