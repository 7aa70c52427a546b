"""Several hosts, a process each, write one checkpoint: complete or not at all, and each of them knows which.

They share a folder. Host 0 makes a draft; each host writes its files and leaves a note with their sizes and SHA-256;
host 0 collects the notes in one manifest and renames the draft. In between they meet, also where one of them has
failed, so that none waits for ever.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from typing import NamedTuple

from onechip.errors import UserError, first_line
from onechip.files import read_json, write_json

NOTE = "part-manifest-{:05d}.json"  # what a host has written, until the manifest of all is


class Hosts(NamedTuple):
    """The hosts that write a checkpoint together: which one this is, counted from 0, and how many there are.

    meet(name, said) returns when every host has called it: what each has said, a list by index. It is called in the
    thread that writes, while training goes on: it must use no device, and no counter of the training thread. Names come
    again. What it raises ends the writing.
    """

    index: int = 0
    count: int = 1
    meet: Callable = lambda name, said: [said]


ALONE = Hosts()
_turns = itertools.count()  # of this process's meetings, which come in the same order on every host


def meeting(index, count, set_key, read_key):
    """A `meet` by a store of keys, such as jax's: set_key(key, text) once each, read_key(key) waits until it is set."""

    def meet(name, said):
        place = f"onechip/saving/{next(_turns)}"
        set_key(f"{place}/{index}", json.dumps([name, said]))
        heard = [json.loads(read_key(f"{place}/{i}")) for i in range(count)]
        if any(met != name for met, _ in heard):
            raise RuntimeError(f"hosts save different things: {sorted({met for met, _ in heard})}")
        return [text for _, text in heard]

    return meet


class NotWritten(OSError):
    """A checkpoint that another host could not write its part of: to this one it is a disk that failed."""


class OwnFiles(dict):
    """The files of a checkpoint that this host writes. hosts: all that write it."""

    def __init__(self, files, hosts):
        super().__init__(files)
        self.hosts = hosts


class Attempt:
    """What one host does of a checkpoint: after an error, its own or another's, no more, but it still meets the others.

    first: an error that has come already.
    """

    def __init__(self, path, hosts, first=None):
        self._path, self._hosts, self.error = path, hosts, first

    def do(self, step, *args):
        """Takes a step, unless one has failed."""
        if self.error is None:
            try:
                step(*args)
            except BaseException as error:
                self.error = error

    def meet(self, stage):
        """Meets the others, and hears whether one of them has failed."""
        said = "" if self.error is None else first_line(self.error)
        for i, why in enumerate(self._hosts.meet(f"{self._path.name} {stage}", said)):
            if why and self.error is None:
                self.error = NotWritten(f"{self._path.name} is not written: host {i}: {why}")


def is_written(path):
    """Whether a checkpoint is there already; UserError, one line, if something else is in its place."""
    if path.is_symlink() or path.is_file():
        raise UserError(f"{path}: is not a checkpoint of this run, and in the way of one: move it elsewhere")
    return path.exists()


def write_together(path, draft, files, write, publish):
    """Writes OwnFiles as a checkpoint folder `path`, completely or not at all, on every host; `draft` is renamed.

    write(files) -> their manifest, in the draft; publish(manifest) finishes and renames the draft. Where a host
    fails, each one raises: that one its own error, the others NotWritten. A checkpoint that exists stays as it is.
    """
    hosts, first = files.hosts, files.hosts.index == 0
    mine = Attempt(path, hosts)
    try:
        if first:
            mine.do(_begin, path, draft)
        mine.meet("begun")
        mine.do(_write_own, path, draft, files, write)
        mine.meet("written")
        if first:
            mine.do(_publish_all, path, draft, hosts.count, publish)
        mine.meet("made")
    finally:
        if first:
            shutil.rmtree(draft, ignore_errors=True)
    if mine.error is not None:
        raise mine.error


def sit_out(path, hosts, error):
    """Meets the others at a checkpoint of which this host cannot write its part: they hear of its error."""
    for stage in ("begun", "written", "made"):
        Attempt(path, hosts, error).meet(stage)


def _begin(path, draft):
    if is_written(path):
        return
    shutil.rmtree(draft, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)  # not the folders above: those of a disk that is away must not be made anew
    draft.mkdir()


def _write_own(path, draft, files, write):
    # By listing it: a network's file system may remember for a minute that a name was not there.
    there = os.listdir(path.parent)
    if draft.name in there:
        write_json(draft / NOTE.format(files.hosts.index + 1), write(files))
    elif path.name not in there:
        raise NotWritten(
            f"{path.parent}: nothing of host 0 is here: all hosts need one folder on a disk that they share"
        )


def _publish_all(path, draft, count, publish):
    if is_written(path):
        return
    notes = [draft / NOTE.format(i + 1) for i in range(count)]
    manifest = {name: entry for note in notes for name, entry in read_json(note).items()}
    for note in notes:
        note.unlink()
    try:
        publish(manifest)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)  # renamed, but perhaps not on disk: to the others it must be gone
        raise
