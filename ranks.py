"""
The processes of a run, started by torchrun or one alone: who they are, and what they do together. RANK and
friends are read here; only doctor.py and fineweb.py, which form no group, read their own.

    ranks = Ranks()                            # from the environment, checked
    ranks.connect(dev.device)                  # nccl on CUDA, gloo elsewhere
    loss_sum, n = ranks.sum(loss_sum, n)       # over all processes
    result = ranks.on_all(read, path)          # where it fails on one process, all of them raise
    ranks.shutdown()

A process that is alone needs no group: everything here then works without one.
"""

import os
import platform
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist

from configurator import TemporaryError, UserError, env_number

NOTE_SECONDS, LIMIT_SECONDS = 30, 300  # of waiting for the others at the start: until a line, until the end


class Ranks:
    """This process's place among `world_size`. Raises UserError where the environment makes no sense."""

    def __init__(self):
        self.rank, self.world_size = env_number("RANK", 0), env_number("WORLD_SIZE", 1)
        self.local_rank, self.nodes = env_number("LOCAL_RANK", 0), env_number("GROUP_WORLD_SIZE", 1)
        self.restarts = env_number("TORCHELASTIC_RESTART_COUNT", 0)
        self.max_restarts = env_number("TORCHELASTIC_MAX_RESTARTS", 0)
        self.by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self.parent = os.getppid()
        self._device = torch.device("cpu")
        if self.world_size == 1 and self.rank == 0:
            return
        cure = "start with torchrun, or type `unset WORLD_SIZE RANK` for a single process"
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(f"WORLD_SIZE={self.world_size} but {name} is not set: {cure}")
        if not self.rank < self.world_size or not 0 < env_number("MASTER_PORT", 0) < 2**16:
            raise UserError(f"RANK={self.rank}, WORLD_SIZE={self.world_size}, MASTER_PORT="
                            f"{os.environ['MASTER_PORT']}: no such process or port; {cure}")

    @property
    def many(self) -> bool:
        return self.world_size > 1

    @property
    def master(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def launcher(self) -> str:
        """The torchrun that started this process: another one when the same command is typed again."""
        return f"{platform.node()} {self.parent}" if self.by_torchrun else ""

    def orphaned(self) -> bool:
        """Whether torchrun has died and left this process behind."""
        return self.by_torchrun and os.getppid() != self.parent

    def connect(self, device: torch.device) -> None:
        """Join the others. Says for whom it waits, and raises UserError when they do not come."""
        if not self.many:
            return
        if device.type == "cuda":
            self._device = device
        agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if self.nodes > 1 and agent_store and self.max_restarts > 0:
            raise UserError("--max-restarts on several nodes: torchrun's shared store keeps the addresses of "
                            "dead processes; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all nodes")
        whom = "rank 0" if self.rank else f"{self.world_size - 1} other process(es)"
        whom += f" at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        note = threading.Timer(NOTE_SECONDS, print, [f"rank {self.rank} is waiting for {whom}"],
                               {"file": sys.stderr, "flush": True})
        note.daemon = True
        note.start()
        def meet():
            limit = timedelta(seconds=LIMIT_SECONDS)
            store = next(dist.rendezvous("env://", timeout=limit))[0]
            if agent_store and self.nodes == 1:  # it outlives a restart, and would still hold old addresses
                store = dist.PrefixStore(f"restart {self.restarts}", store)
            store.set(f"rank {self.rank} is here", "")
            store.wait([f"rank {rank} is here" for rank in range(self.world_size)], limit)
            return store

        try:
            with ThreadPoolExecutor(1) as thread:  # so that signals are handled meanwhile
                store = thread.submit(meet).result()
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=self.rank,
                                    world_size=self.world_size,
                                    device_id=device if device.type == "cuda" else None)
        except RuntimeError as error:  # torch's DistError is one
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TemporaryError(f"rank {self.rank} has not found {whom} ({reason[:200]}); start all "
                                 f"{self.world_size} processes, and check MASTER_ADDR, MASTER_PORT and the "
                                 f"firewall") from error
        finally:
            note.cancel()

    def sum(self, *values) -> list:
        """Python numbers -> their sums over all processes."""
        if not self.many:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, value) -> list:
        """A plain value of each process, by rank, on all of them."""
        everyone = [value] * self.world_size
        if self.many:
            dist.all_gather_object(everyone, value)
        return everyone

    def on_all(self, action, *arguments):
        """action(*arguments) on all processes; where it raises UserError or OSError on one, all raise."""
        result = error = None
        try:
            result = action(*arguments)
        except (UserError, OSError) as caught:
            error = caught
        if self.sum(error is not None)[0]:
            self.shutdown()
            raise error or TemporaryError("another process has failed, and says why")
        return result

    def differing(self, value) -> list[int]:
        """The ranks whose value is not the most common one, on all processes."""
        everyone = self.gather(value)
        usual = Counter(everyone).most_common(1)[0][0]
        return [rank for rank, theirs in enumerate(everyone) if theirs != usual]

    def fail(self, reason) -> None:
        """Raise UserError; called by all processes, for a reason that all of them see."""
        self.shutdown()
        raise UserError(reason)

    def require_equal(self, what: str, facts: dict) -> None:
        """Raise UserError on all processes, naming keys and ranks, unless all have the same {key: value}."""
        everyone = self.gather(facts)
        differing = []
        for key in dict.fromkeys(key for one in everyone for key in one):
            values = [one.get(key) for one in everyone]
            if any(value != values[0] for value in values):
                usual = Counter(map(str, values)).most_common(1)[0][0]
                ranks = [rank for rank, value in enumerate(values) if str(value) != usual]
                differing.append(f"{key} is {usual}, but on rank {', '.join(map(str, ranks[:8]))} "
                                 f"{values[ranks[0]]}")
        if differing:
            self.shutdown()
            raise UserError(f"processes differ in {what}: {'; '.join(differing)}; give all of them the same")

    def shutdown(self) -> None:
        """Leave the group when every process is done with it: gloo aborts one whose peers have left."""
        if self.many:
            dist.barrier()
            dist.destroy_process_group()

    def exit(self) -> None:
        """End at once with code 0: gloo's threads outlive their group, and may abort a slower end."""
        if self.many:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


class StopRequests:
    """SIGTERM and Ctrl-C, noted for the training loop, which finishes its step, saves, and exits with 0.

    Before the loop (step is None) there is nothing to save: SIGTERM exits at once, with 0. So does a second
    Ctrl-C, with 130, except under torchrun, which sends two by itself.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.step, self.signals = ranks, None, []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        name = signal.Signals(number).name
        again = name in self.signals and not self.ranks.many
        if name == "SIGINT" and (self.step is None or again):
            signal.default_int_handler(number, frame)
        if self.ranks.master and not self.signals:
            answer = (f"stopped by {name} before the first step: there is nothing to save" if self.step is None
                      else f"{name}: finishing step {self.step}, then saving")
            os.write(2, f"\n{answer}\n".encode())  # print may be what the signal has interrupted
        if self.step is None:
            os._exit(0)
        self.signals.append(name)

    def reason(self) -> str:
        """Why this process should stop: the signal, or that torchrun has died; "" to go on."""
        return self.signals[0] if self.signals else "the end of torchrun" if self.ranks.orphaned() else ""
