"""How hosts join, a process each, before devices are used; how one that is gone, or has failed, ends all."""

import atexit
import contextlib
import dataclasses
import os
import platform
import signal
import sys

from onechip.errors import SafeStream, UserError, first_line, in_notebook, require
from onechip.hosts import compare_hosts, host_count, meet
from onechip.keeper import DEAD_AFTER, JAX_SILENCE
from onechip.machine import git_commit, has_tpu
from onechip.roll import HostLine, start_keeper

RESUMES = "the run ends; the same command on all hosts resumes from its last checkpoint"


def find_hosts(run):
    """(coordinator, number of hosts, this one's index, its devices or None): as a Run, Slurm or a TPU slice says."""
    if run.hosts:
        where = run.coordinator.rpartition(":")
        if run.hosts > 1:
            remedy = "give host 0's address and a free port, such as 10.0.0.2:8476"
            require(where[0] and where[2].isdigit() and int(where[2]) < 65536, "coordinator", run.coordinator, remedy)
        require(run.host < run.hosts, "host", run.host, f"hosts are counted from 0: use 0 to {run.hosts - 1}")
        return run.coordinator, run.hosts, run.host, None
    require(not run.coordinator, "hosts", run.hosts, "with a coordinator, say how many processes there are")
    if in_notebook() or not (has_tpu() or "SLURM_STEP_NODELIST" in os.environ):
        return "", 1, 0, None
    from jax._src.clusters import ClusterEnv

    seconds = int(60 * run.host_minutes)
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, seconds)
    except (OSError, ImportError, KeyError, ValueError):  # a TPU without a metadata server
        found = None, 1, 0, None
    except RuntimeError as error:  # nobody knows host 0's name
        raise UserError(f"host 0 did not come within {run.host_minutes:g} minutes: {first_line(error)}") from None
    return ("", 1, 0, None) if None in found[:3] else found


def join_hosts(run):
    """Joins the hosts that a Run, or the environment, speaks of; does nothing for one. Call it before devices are used.

    UserError, one line: a host that does not come, by its index; what cannot be. From then on other hosts than 0 print
    warnings and errors only, and all end when one is gone. Leaving waits for all.
    """
    coordinator, count, index, devices = find_hosts(run)
    if count == 1 or host_count() > 1:
        return
    import jax
    from jax._src import xla_bridge

    remedy = "devices are in use already: start it as a script, with at least one flag"
    require(not in_notebook() and not xla_bridge.backends_are_initialized(), "hosts", count, remedy)
    if index:
        speak_as(index)
    seconds = 60 * run.host_minutes
    keeper = start_keeper(coordinator, count, seconds) if index == 0 else None
    line = HostLine(coordinator, count, index, seconds, keeper)
    line.answer()
    line.watch(end_process)
    sys.excepthook = reporting(line, sys.excepthook)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax starts its service in host 0's process; the one in use is the keeper's, and this one, on a port of its own
    # which no host uses, stays empty.
    unused = {"coordinator_bind_address": "127.0.0.1:0"} if index == 0 else {}
    jax.distributed.initialize(coordinator, count, index, devices, heartbeat_timeout_seconds=JAX_SILENCE, **unused)
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # jax 0.10 has put one there that ignores it
    atexit.register(leave, line)


OWN = ("host", "coordinator", "host_minutes", "out", "hub_repo", "take_over")  # may differ from host to host


def check_hosts(run, config):
    """UserError, the same on all hosts, if they were started with different settings or code, or have nothing to do."""
    if host_count() == 1:
        return
    import jax

    fields = {name: value for name, value in dataclasses.asdict(run).items() if name not in OWN}
    versions = {"commit": git_commit(), "jax": jax.__version__, "python": platform.python_version()}
    compare_hosts({**fields, **dataclasses.asdict(config), **versions})
    remedy = f"{host_count()} hosts need a sequence each at least: use fewer hosts, or a larger batch"
    require(config.total_batch_size >= host_count(), "total_batch_size", config.total_batch_size, remedy)


class HostStream:
    """A text stream whose lines begin with the host's index."""

    def __init__(self, stream, index):
        self._stream, self._prefix, self._fresh = stream, f"host {index}: ", True

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        """Writes text; returns its length, as any stream does."""
        for line in text.splitlines(keepends=True):
            self._stream.write(self._prefix * (self._fresh and line != "\n") + line)
            self._fresh = line.endswith("\n")
        return len(text)


def speak_as(index):
    """Has this process print nothing but warnings and errors, with its index before each line."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)  # C++ prints there as well
        os.close(nothing)
    sys.stderr = HostStream(sys.stderr, index)


# ----------------------------------------------------------------------------------------------------------------------
# Ending


def end_process(why):
    """Says why, and ends this process at once: its main thread may wait for a host that is gone, for ever."""
    stream = SafeStream(sys.stderr)
    stream.write(f"\nerror: {why}: {RESUMES}\n")
    exit_at_once()


def exit_at_once():
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(1)


def reporting(line, hook):
    """An excepthook that reports this process's error by `hook`, and tells the other hosts.

    An error of jax may be the end of another host, seen from here: then its line is printed, and not a traceback.
    """

    def report(kind, error, traceback):
        of_jax = kind.__module__.startswith("jax") or "gloo" in str(error).lower()
        if not issubclass(kind, UserError | KeyboardInterrupt) and line.lost.wait(DEAD_AFTER + 5 if of_jax else 5):
            end_process(line.why)
        hook(kind, error, traceback)
        line.leave(f"failed {first_line(error)}")
        exit_at_once()

    return report


def leave(line):
    """Leaves the other hosts when all have come as far."""
    import jax

    meet("end")
    jax.distributed.shutdown()
    line.leave()
