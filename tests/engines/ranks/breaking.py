"""Ranks that break: a server without a model for what a team promises of its processes, and hooks for real ranks.

Hooks are for `prepare=tests.engines.ranks.breaking:NAME`; each breaks rank 1 alone, in the first block it enters.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import subprocess
import sys
import time


def no_mask_where_it_is_all_ones(rank):
    """Give the model what `generate` of transformers 5.23 gives it for a text without padding: no mask."""
    import torch

    def drop(_model, args, kwargs):
        mask = kwargs.get("attention_mask")
        return args, {**kwargs, "attention_mask": None if bool(torch.all(mask == 1)) else mask}

    rank.model.register_forward_pre_hook(drop, with_kwargs=True)


def exact_frequencies(rank):
    """Rotary frequencies in float32, as transformers keeps them, also where DeepSpeed has rounded them."""
    for module in rank.model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.inv_freq = type(module)(config=rank.model.config).inv_freq


def bloom_as_deepspeed_has_it(rank):
    """The same, without the hooks of ours that make BLOOM work so."""
    for block in rank.model.transformer.h:
        block.self_attention._forward_pre_hooks.clear()
    no_mask_where_it_is_all_ones(rank)


class Light:
    """Answers requests as serving.Server does, without importing torch: such a rank starts in no time."""

    def __init__(self, rank, _store, pulse):
        self.rank, self.pulse = rank, pulse

    def answer(self, request, *arguments):
        """Do what the method ``request`` does, on the rank named first in ``arguments``; others mostly wait."""
        self.pulse("model.layers.0")
        culprit, *rest = arguments
        if request == "echo":
            return self.rank, rest
        if self.rank != culprit:
            return self.rank if request in ("slow", "get_on", "compute") else self.wait_for_it()
        return getattr(self, request)(*rest)

    def wait_for_it(self):
        """As a rank in a collective: it waits, in what counts as waiting."""
        from harness.engines.ranks import groups

        code = compile("def all_reduce():\n    time.sleep(3600)", groups.__file__, "exec")
        space = {"time": time}
        exec(code, space)
        space["all_reduce"]()

    def slow(self, seconds):
        """Work for some seconds between two pulses."""
        time.sleep(seconds)
        return self.rank

    def compute(self, seconds):
        """Compute for some seconds without a pulse."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return self.rank

    def get_on(self, times, seconds):
        """Work for so many times some seconds, each time with a pulse."""
        for _ in range(times):
            time.sleep(seconds)
            self.pulse("model.layers.1")
        return self.rank

    def sleep(self):
        """Hang in Python."""
        while True:
            time.sleep(0.05)

    def hang_in_c(self):
        """Hang in a C call that holds the GIL."""
        ctypes.PyDLL(None).pause()

    def stop(self):
        """Stop as by Ctrl-Z."""
        os.kill(os.getpid(), signal.SIGSTOP)

    def fail(self, message):
        """Raise."""
        raise ArithmeticError(message)

    def lose_connection(self):
        """Raise what others of a dead rank complain of."""
        raise ConnectionError("Connection closed by peer [127.0.0.1]:1")

    def kill(self):
        """Die as the kernel ends a process when memory runs out."""
        os.kill(os.getpid(), signal.SIGKILL)

    def exit_at_once(self, code):
        """End without a word of its own."""
        print("last words")  # into the rank's log
        os._exit(code)

    def exit(self, code):
        """Call sys.exit."""
        sys.exit(code)

    def eat_memory(self):
        """Ask for more than it may have."""
        limit_memory()
        bytearray(2**40)

    def answer_with_a_lock(self):
        """Answer with what cannot be sent."""
        import threading

        return threading.Lock()

    def stop_halfway(self):
        """Stop in the middle of sending an answer."""
        if os.fork() == 0:
            time.sleep(0.5)
            os.kill(os.getppid(), signal.SIGSTOP)
            os._exit(0)
        return bytes(2**28)

    def leave_a_child(self, file):
        """Start a process of its own, write its id down, and die."""
        child = subprocess.Popen(["sleep", "600"])
        with open(file, "w", encoding="utf-8") as written:
            written.write(str(child.pid))
        self.kill()


class Renewing(Light):
    """One that starts anew when it is asked to, from what was prepared once."""

    prepared = 0
    lives = 0

    @classmethod
    def prepare(cls):
        """Called once, whatever number of lives there are."""
        cls.prepared += 1

    def answer(self, request, *arguments):
        """As Light, or what it can tell of itself."""
        if request != "tell":
            return super().answer(request, *arguments)
        type(self).lives += 1
        found = mmap.mmap(-1, 2**27)  # fits into no gap, and is never touched
        address = ctypes.addressof(ctypes.c_char.from_buffer(found))
        return {"pid": os.getpid(), "prepared": self.prepared, "lives": self.lives, "address": address}

    def close(self):
        """Say so in the log, where the next life is the one that is asked."""
        print("closed", flush=True)


class Silent(Light):
    """A rank that never gets ready: it hangs where a library would be imported."""

    def __init__(self, rank, store, pulse):
        super().__init__(rank, store, pulse)
        if rank == 1:
            self.sleep()


class Broken(Light):
    """A rank that cannot be made."""

    def __init__(self, rank, store, pulse):
        super().__init__(rank, store, pulse)
        if rank == 1:
            raise ImportError("there is no such library")


def limit_memory():
    """Allow this process hardly more memory than it has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + 2**28
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# --- hooks of real ranks ---------------------------------------------------------------------------


def _in_a_block(engine, what):
    """Let rank 1 do something in a forward: when its second block is entered for the third time."""
    from harness.engines import hooks

    if engine.place.rank != 1:
        return
    entered = []

    def hook(*_):
        entered.append(1)
        if len(entered) == 3:
            what()

    blocks = hooks.block_names(engine.model)
    engine.model.get_submodule(blocks[-1]).register_forward_pre_hook(hook)


def raising(engine):
    """An exception in a forward."""

    def break_it():
        raise ArithmeticError("rank 1 alone is broken")

    _in_a_block(engine, break_it)


def killing(engine):
    """SIGKILL in a forward."""
    _in_a_block(engine, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hanging(engine):
    """A hang in a forward."""
    _in_a_block(engine, lambda: time.sleep(3600))


def stopping(engine):
    """SIGSTOP in a forward."""
    _in_a_block(engine, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def out_of_memory(engine):
    """An allocation of torch that the system refuses."""

    def break_it():
        import torch

        limit_memory()
        torch.empty(2**40, dtype=torch.uint8)

    _in_a_block(engine, break_it)


def hanging_while_loading(engine):
    """A hang before the rank is ready to run."""
    if engine.place.rank == 1:
        time.sleep(3600)


def dying_while_loading(engine):
    """An exception before the rank is ready to run."""
    if engine.place.rank == 1:
        raise OSError("a shard of the weights is damaged")
