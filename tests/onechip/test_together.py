"""onechip/together.py: hosts, here threads, that write one checkpoint: all of it or nothing, and all know which."""

import collections
import errno
import json
import threading
from collections import Counter

import numpy as np
import pytest

from onechip import checkpoints, files, together
from onechip.checkpoints import find_damage, newest_checkpoint, unpack_state, write_checkpoint
from onechip.disk import Disk
from onechip.errors import UserError
from onechip.files import FullDisk
from onechip.parts import OwnParts, open_arrays, part_name
from onechip.together import Hosts, NotWritten, OwnFiles, sit_out
from onechip.writer import CheckpointWriter

COUNT = 3
ROWS = np.arange(COUNT * 2 * 5, dtype=np.float32).reshape(COUNT * 2, 5)


def is_one_line(said):
    return "\n" not in str(said) and 0 < len(str(said)) < 400


def own_files(index, hosts, value=0):
    """What one of three processes writes: two rows of each array, and the first one all that is whole."""
    mine = {f"w@{2 * index},0": ROWS[2 * index : 2 * index + 2] + value}
    arrays = {
        part_name(f"{name}.safetensors", index, COUNT): OwnParts(mine, {"w": ROWS.shape}) for name in ("params", "opt")
    }
    whole = {"stream.safetensors": {"tokens": np.arange(4)}, "metrics.jsonl": b"", "config.json": b"{}"}
    return OwnFiles(arrays | (whole | {"state.json": b'{"step": 1, "stream": {}}'} if index == 0 else {}), hosts)


class Together:
    """Three threads that write as three processes do; `met` has the names at which each one met the others."""

    def __init__(self):
        self.barrier, self.met = threading.Barrier(COUNT, timeout=10), [[] for _ in range(COUNT)]
        self.said = collections.defaultdict(lambda: [None] * COUNT)  # by turn

    def hosts(self, index):
        def meet(name, said):
            heard = self.said[len(self.met[index])]
            self.met[index].append(name)
            heard[index] = said
            self.barrier.wait()
            return heard

        return Hosts(index, COUNT, meet)

    def run(self, action):
        """What action(index, hosts) returned or raised in each thread."""
        found = [None] * COUNT

        def work(index):
            try:
                found[index] = action(index, self.hosts(index))
            except Exception as error:
                found[index] = error

        threads = [threading.Thread(target=work, args=(i,)) for i in range(COUNT)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        return found


def write_all(path, value=0):
    """What writing a checkpoint by three processes raises in each of them."""
    group = Together()
    found = group.run(lambda index, hosts: write_checkpoint(path, own_files(index, hosts, value)))
    assert group.met == [[f"{path.name} {stage}" for stage in ("begun", "written", "made")]] * COUNT
    return found


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_three_processes_write_one_checkpoint(tmp_path):
    """It is complete, has one manifest of all files and no note, and its arrays are whole."""
    path = tmp_path / "checkpoints" / "step_00000001"
    assert write_all(path) == [None] * COUNT
    assert left_in(path.parent) == [path.name] and find_damage(path) is None
    arrays = {part_name(f"{name}.safetensors", i, COUNT) for i in range(COUNT) for name in ("params", "opt")}
    plain = {"stream.safetensors", "metrics.jsonl", "config.json", "state.json"}
    assert set(checkpoints.read_manifest(path)) == arrays | plain
    assert set(left_in(path)) == arrays | plain | {"manifest.json"}
    like = {"params": {"w": ROWS}, "opt": {"w": ROWS}, "step": np.int32(1)}
    state, position, _ = unpack_state(path, like)
    assert np.array_equal(state["opt"]["w"], ROWS) and position["tokens"].tolist() == [0, 1, 2, 3]


def test_a_checkpoint_that_exists_stays_as_it_is(tmp_path, monkeypatch):
    """Each process is content with it, and writes nothing."""
    path = tmp_path / "step_00000001"
    write_all(path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    monkeypatch.setattr(checkpoints, "write_hashed", None)
    assert write_all(path, value=100) == [None] * COUNT
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before and left_in(tmp_path) == [path.name]


@pytest.mark.parametrize("failing", range(COUNT))
def test_a_process_that_cannot_write_is_known_to_all(tmp_path, monkeypatch, failing):
    """Its own error is raised in it, NotWritten in the others; nothing half remains; the older one counts."""
    write_all(tmp_path / "step_00000001")
    real = checkpoints.write_hashed

    def full(path, chunks):
        if path.name == part_name("opt.safetensors", failing, COUNT):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, chunks)

    monkeypatch.setattr(checkpoints, "write_hashed", full)
    found = write_all(tmp_path / "step_00000002")
    assert left_in(tmp_path) == ["step_00000001"]
    for index, error in enumerate(found):
        assert type(error) is (FullDisk if index == failing else NotWritten) and is_one_line(error)
        if index != failing:
            assert f"step_00000002 is not written: host {failing}: " in str(error) and "the disk is full" in str(error)
    monkeypatch.undo()
    assert write_all(tmp_path / "step_00000002") == [None] * COUNT, "the next attempt goes through"
    assert newest_checkpoint(tmp_path).name == "step_00000002"


@pytest.mark.parametrize("stage", ["begin", "manifest", "rename", "after the rename"])
def test_a_first_process_that_cannot_finish_is_known_to_all(tmp_path, monkeypatch, stage):
    """Be it at the folder, the manifest, the rename or the sync after it: no process takes it for written."""
    write_all(tmp_path / "step_00000001")

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    def fail_late(source, target):
        files.os.replace(source, target)
        fail()

    owner, name = {
        "begin": (together, "_begin"),
        "manifest": (checkpoints, "fsync_path"),
        "rename": (checkpoints, "rename_to_disk"),
        "after the rename": (checkpoints, "rename_to_disk"),
    }[stage]
    monkeypatch.setattr(owner, name, fail_late if stage == "after the rename" else fail)
    found = write_all(tmp_path / "step_00000002")
    assert type(found[0]) is OSError and [type(error) for error in found[1:]] == [NotWritten] * 2
    assert left_in(tmp_path) == ["step_00000001"]


def test_what_is_in_the_way_is_reported(tmp_path):
    """A file in the place of a checkpoint: the first process says so, and the file stays."""
    (tmp_path / "step_00000001").write_text("mine")
    found = write_all(tmp_path / "step_00000001")
    assert type(found[0]) is UserError and "in the way" in str(found[0])
    assert (tmp_path / "step_00000001").read_text() == "mine" and left_in(tmp_path) == ["step_00000001"]


def test_processes_on_different_disks_are_told(tmp_path):
    """Each host has a folder of its own by the same name: all say in one line what is wrong, and nothing remains."""

    def write(index, hosts):
        (tmp_path / str(index)).mkdir()
        write_checkpoint(tmp_path / str(index) / "step_00000001", own_files(index, hosts))

    found = Together().run(write)
    assert all(type(error) is NotWritten and is_one_line(error) for error in found)
    assert "all hosts need one folder on a disk that they share" in str(found[1])
    assert "host 1: " in str(found[0]) and "all hosts need one folder" in str(found[0])
    assert [left_in(tmp_path / str(index)) for index in range(COUNT)] == [[]] * COUNT


@pytest.mark.parametrize("absent", [0, 2])
def test_a_process_that_sits_out_holds_nobody_up(tmp_path, absent):
    """It meets the others, and there is no checkpoint."""
    path = tmp_path / "step_00000001"

    def act(index, hosts):
        return (
            sit_out(path, hosts, OSError(5, "away"))
            if index == absent
            else write_checkpoint(path, own_files(index, hosts))
        )

    found = Together().run(act)
    assert [type(error) for error in found] == [type(None) if i == absent else NotWritten for i in range(COUNT)]
    assert f"host {absent}: [Errno 5] away" in str(found[1])
    assert left_in(tmp_path) == []


def test_a_barrier_that_fails_ends_the_writing(tmp_path):
    """A process is gone: what the barrier says is raised, and the first process removes the draft."""

    def write(index, hosts):
        if index < 2:
            write_checkpoint(tmp_path / "step_00000001", own_files(index, hosts))
        else:
            hosts.meet("step_00000001 begun", "")
            group.barrier.abort()

    group = Together()
    found = group.run(write)
    assert [type(error) for error in found[:2]] == [threading.BrokenBarrierError] * 2 and left_in(tmp_path) == []


def test_the_writers_of_a_run_agree(tmp_path, capsys):
    """One's disk goes away and comes back: all report a failure and then none; host 0 alone clears and uploads."""
    run, offered = tmp_path / "run", Counter()
    run.mkdir()

    def save(index, hosts):
        disk, after = Disk(run), lambda path: offered.update([(index, path.name)])
        writer, failed = CheckpointWriter(run / "checkpoints", keep=2, after=after, disk=disk), []
        for step in (1, 2, 3, 4):
            disk.path = tmp_path / "gone" if (index, step) == (1, 3) else run
            writer.save(step, own_files(index, hosts, step))
            writer.wait()
            failed.append(writer.failed)
            hosts.meet("next", "")
        return failed

    assert Together().run(save) == [[False, False, True, False]] * COUNT
    assert left_in(run / "checkpoints") == ["step_00000002", "step_00000004"]
    assert offered == {(0, "step_00000001"): 1, (0, "step_00000002"): 1, (0, "step_00000004"): 1}
    newest = open_arrays(newest_checkpoint(run / "checkpoints") / "params.safetensors")
    assert np.array_equal(newest["w"].read(), ROWS + 4)
    said = capsys.readouterr().out
    assert said.count("training goes on in memory") == COUNT and said.count("works again") == COUNT


def test_a_meeting_by_keys_brings_what_each_host_says(monkeypatch):
    """By a store of keys, each its own; hosts that save different things are an error, not a mixture."""
    place, other = "onechip/saving", [["step_1 begun", ""], ["step_1 begun", "full"], ["step_1 begun", ""]]
    store = {f"{place}/{turn}/1": json.dumps(said) for turn, said in enumerate(other)}
    monkeypatch.setattr(together, "_turns", iter(range(9)))
    meet = together.meeting(0, 2, store.__setitem__, store.__getitem__)
    assert meet("step_1 begun", "") == ["", ""] and meet("step_1 begun", "away") == ["away", "full"]
    with pytest.raises(RuntimeError, match="different things.*step_1 begun.*step_2 begun"):
        meet("step_2 begun", "")
    assert sum(key.endswith("/0") for key in store) == 3
