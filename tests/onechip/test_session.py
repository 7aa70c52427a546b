"""onechip/session.py: nothing of a run is lost, whenever and however it ends, and a resumed one is the same.

The step is made up: it adds each batch to a state of three arrays. No model is involved.
"""

import dataclasses
import functools
import itertools
import json
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpus import assert_same_end, is_one_line, list_checkpoints, newest, read_arrays, read_record, read_rows
from hub import Fault, connected_hub

from onechip import session, writer
from onechip.checkpoints import arrays_in, find_damage, write_checkpoint
from onechip.errors import UserError
from onechip.hub import HubPlace
from onechip.mirror import Mirror
from onechip.session import Session
from onechip.settings import setting
from onechip.statefile import HostBuffer

pytestmark = pytest.mark.usefixtures("interruptible")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a Session reads of a config."""

    num_iterations: int = setting(20, "steps")
    total_batch_size: int = setting(6, "sequences a step")
    seq_len: int = setting(4, "tokens a sequence")
    width: int = setting(3, "how wide", fixed=True)
    eval_every: int = setting(8, "steps between evaluations")
    sample_every: int = setting(0, "steps between samples")
    save_every: int = setting(0, "steps between checkpoints")
    save_minutes: float = setting(0.0, "minutes between checkpoints")
    keep: int = setting(99, "newest checkpoints that stay")


ORIGIN = {"data": {"name": "numbers"}, "commit": "abc"}
STATE = {"params": {"w": jnp.zeros(3)}, "opt": [jnp.ones((2, 3))], "step": jnp.int32(0)}
WHERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
LIKE = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=WHERE), STATE)


@functools.partial(jax.jit, donate_argnums=0)
def add_batch(state, batch):
    """A train step whose state depends on every batch so far, in order."""
    w, step = 0.5 * state["params"]["w"] + batch, state["step"] + 1
    metrics = {"loss": 1 + jnp.sum(jnp.abs(w)), "grad_norm": jnp.max(jnp.abs(batch)), "lr": 0.1 / step}
    return {"params": {"w": w}, "opt": [state["opt"][0] + w], "step": step}, metrics


def count_up(position):
    """Batches of three numbers that say where in the data they are."""
    for i in itertools.count(position["next"] if position else 0):
        yield np.full(3, i % 7 + 1, np.float32), {"next": i + 1, "left": np.arange(i % 3)}


def score_of(state):
    return {"val_loss": float(jnp.sum(state["params"]["w"])), "val_bpb": float(state["opt"][0][0, 0])}


def drive(
    folder, train_step=add_batch, *, batches=count_up, score=score_of, origin=ORIGIN, facts=None, files=None, **options
):
    """A notebook's loop; returns the Session. Fields of Config may be among the options, which are Session's."""
    fields = {field.name for field in dataclasses.fields(Config)} & set(options)
    config = Config(**{name: options.pop(name) for name in fields})
    with Session(folder, config, origin, **options) as run:
        state = run.restore(LIKE) or jax.tree.map(jnp.copy, STATE)
        run.begin(state, batches, jax.device_put, facts=facts, files=files)
        with run.saving():
            while run.continues():
                if run.due("save"):
                    run.save()
                if run.due("eval"):
                    run.save()
                    run.record(score(run.state))
                run.advance(train_step)
            run.save()
        if run.is_complete:
            run.record(score(run.state))
    return run


def acting_at(step, act):
    """The train step that calls `act` in step `step`, counted from 1, when the old state is donated already."""

    def train_step(state, batch):
        number = int(state["step"]) + 1
        result = add_batch(state, batch)
        if number == step:
            act()
        return result

    return train_step


def crash():
    raise ConnectionError("the runtime is gone")


def threads():
    """Threads of ours that are still there."""
    return [thread.name for thread in threading.enumerate() if thread.name in ("loader", "checkpoint")]


class NoProfile:
    """No trace: it takes longer than these runs."""

    def __init__(self, folder, steps):
        pass

    before = staticmethod(lambda step: jax.profiler.StepTraceAnnotation("train", step_num=step))
    after = staticmethod(lambda step, result: None)
    close = staticmethod(lambda: None)


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """No trace, no picture: only the rows that each picture would be drawn from."""
    pictures = []
    monkeypatch.setattr(session, "ProfileWindow", NoProfile)
    monkeypatch.setattr(session, "plot_losses", lambda rows, *args: pictures.append([dict(row) for row in rows]))
    return pictures


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run in one go."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "ProfileWindow", NoProfile)
        patch.setattr(session, "plot_losses", lambda *args: None)
        drive(folder)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_a_run_leaves_every_row_and_what_it_was_started_from(straight):
    """A row a step and one an evaluation, the last state in a checkpoint, config.json with settings and origin."""
    rows = read_rows(straight)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))
    assert [row["step"] for row in rows if "val_bpb" in row] == [8, 16, 20]
    assert list_checkpoints(straight) == ["step_00000008", "step_00000016", "step_00000020"]
    about = json.loads((straight / "config.json").read_text())
    assert about == {"config": dataclasses.asdict(Config()), **ORIGIN}
    assert json.loads((newest(straight) / "config.json").read_text()) == about["config"]
    assert (newest(straight) / "metrics.jsonl").read_text().count("\n") == 22, "the last score comes after it"
    record = read_record(straight)
    assert record["step"] == 20 and record["stream"] == {"next": 20} and record["made_from"] == ORIGIN


def test_facts_and_files_travel_with_a_run(tmp_path):
    """In config.json, which each checkpoint holds as onechip.json; a file such as the tokenizer in both folders."""
    drive(tmp_path, num_iterations=1, facts={"gzip_bits_per_byte": 2.5}, files={"tokenizer.json": b"{}"})
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["gzip_bits_per_byte"] == 2.5
    assert json.loads((newest(tmp_path) / "onechip.json").read_text()) == about
    assert (newest(tmp_path) / "tokenizer.json").read_bytes() == b"{}" == (tmp_path / "tokenizer.json").read_bytes()


def test_a_finished_run_does_no_step_and_is_scored_again(tmp_path, drawn):
    """Its files stay as they are, and its curve has the rows of before."""
    drive(tmp_path)
    kept = lambda: {path: path.read_bytes() for path in [tmp_path / "metrics.jsonl", *tmp_path.glob("c*/*/*")]}
    before, logged = kept(), []
    run = drive(tmp_path, acting_at(21, crash), on_log=logged.append)
    assert run.step == 20 and [row["step"] for row in logged] == [20] and "val_bpb" in logged[0]
    assert kept() == before and len(before) > 20 and len(drawn[-1]) == 23


def test_the_best_checkpoint_is_that_of_the_best_score(tmp_path):
    """A run whose third evaluation is its best keeps that step's checkpoint to the end, and records it."""
    for metric in ("val_bpb", "val_loss"):
        scores = itertools.chain([3.0, 2.0, 1.0], itertools.repeat(4.0))
        score = lambda state, scores=scores, metric=metric: {"val_loss": 0.5, metric: next(scores)}
        drive(tmp_path / metric, score=score, eval_every=2, keep=1, metric=metric)
        assert list_checkpoints(tmp_path / metric) == ["step_00000006", "step_00000020"]
        record = read_record(tmp_path / metric)
        assert (record["best_step"], record["best_score"]) == (6, 1.0)


def test_notes_travel_in_the_checkpoints(tmp_path):
    """A resumed run keeps those of before, unless it has notes of its own."""
    for step, notes, kept in ((3, {"wandb": "3f9a"}, "3f9a"), (5, None, "3f9a"), (7, {"wandb": "b"}, "b")):
        drive(tmp_path, num_iterations=step, notes=notes)
        assert read_record(tmp_path)["notes"] == {"wandb": kept}


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted and resumed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_what_was_reached(straight, tmp_path, number, capsys):
    """Colab's stop button and the machine's own end alike: the step in hand is finished and saved, and resumed."""
    before = signal.getsignal(number)
    assert drive(tmp_path, acting_at(5, lambda: signal.raise_signal(number))).step == 5
    assert newest(tmp_path).name == "step_00000005" and signal.getsignal(number) is before
    assert "interrupted after step 5; the same command resumes from there" in capsys.readouterr().out
    logged = []
    drive(tmp_path, on_log=logged.append)
    assert f"resuming: {tmp_path} continues after step 5 of 20" in capsys.readouterr().out
    assert logged[0]["step"] == 6, "steps that are done are not done again"
    assert_same_end(tmp_path, straight)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_within_a_step_never_saves_half_of_it(straight, tmp_path, signals):
    """A second one strikes where the old state is donated and the new one not yet kept: nothing of that is saved."""

    def strike():
        for _ in range(signals):
            signal.raise_signal(signal.SIGINT)

    if signals == 1:
        drive(tmp_path, acting_at(7, strike), save_every=5)
    else:
        with pytest.raises(KeyboardInterrupt):
            drive(tmp_path, acting_at(7, strike), save_every=5)
    assert newest(tmp_path).name == ("step_00000007" if signals == 1 else "step_00000005") and threads() == []
    drive(tmp_path, save_every=5)
    assert_same_end(tmp_path, straight)


def test_an_interrupt_that_is_no_signal_is_not_saved_within_a_step(tmp_path):
    """A KeyboardInterrupt that some library raises in the middle of a step."""

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive(tmp_path, acting_at(7, stop), save_every=5)
    assert newest(tmp_path).name == "step_00000005"


def test_an_interrupt_before_the_first_step_leaves_nothing_behind(tmp_path):
    """Ctrl-C while the first batch is still being made: no checkpoint of a run that has not begun, no thread."""

    def slow(position):
        for _ in range(2):
            time.sleep(0.3)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        yield from count_up(position)

    def interrupted(position):
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        drive(tmp_path / "signals", batches=slow)
    assert drive(tmp_path / "raised", batches=interrupted).step == 0
    for name in ("signals", "raised"):
        assert newest(tmp_path / name) is None and threads() == []


@pytest.mark.parametrize("row", [4, 12])
def test_a_listener_that_interrupts_loses_no_row(straight, tmp_path, row):
    """KeyboardInterrupt raised by on_log, as a notebook's own code may, keeps every row; resumed, the run is the same.

    Rows are written ten at a time: those after the one whose listener raised must not be dropped.
    """

    def listen(logged):
        if logged["step"] == row:
            raise KeyboardInterrupt

    cut = drive(tmp_path, on_log=listen)
    assert row <= cut.step < 20
    assert [r["step"] for r in read_rows(tmp_path) if "loss" in r] == list(range(1, cut.step + 1))
    drive(tmp_path)
    assert_same_end(tmp_path, straight)


def test_a_run_that_crashed_resumes_from_its_last_checkpoint(straight, tmp_path):
    """An error in step 15 leaves the checkpoint of step 13; later rows are written again, once and the same."""
    with pytest.raises(ConnectionError):
        drive(tmp_path, acting_at(15, crash), save_every=13)
    assert newest(tmp_path).name == "step_00000013" and threads() == []
    drive(tmp_path, save_every=13)
    assert_same_end(tmp_path, straight)


def test_the_curve_of_a_resumed_run_shows_all_of_it(tmp_path, drawn):
    """loss.png is drawn from every row since the first step, not from this process's own."""
    options = {"num_iterations": 6, "eval_every": 0}
    drive(tmp_path, acting_at(3, lambda: signal.raise_signal(signal.SIGINT)), **options)
    assert drawn == []
    drive(tmp_path, **options)
    assert [[row["step"] for row in rows] for rows in drawn] == [[1, 2, 3, 4, 5, 6, 6]]


def test_a_restored_state_is_placed_as_the_new_one_would_be(straight):
    """On the devices and with the sharding that the template names, each array bit for bit."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    like = {**LIKE, "params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=split)}}
    with Session(straight, Config(), ORIGIN) as run:
        state = run.restore(like)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, like)
    assert np.asarray(state["params"]["w"]).tobytes() == read_arrays(newest(straight))["params.w"][2]


@pytest.mark.parametrize(
    "origin, said",
    [
        ({"model": "a", "optimizer": "sgd"}, "^optimizer='sgd': .* was trained with 'adamw'; .* another name$"),
        ({"model": "b", "optimizer": "adamw"}, "^model='b': .* was trained with 'a'; .* another name$"),
        (
            {"data": {"name": "letters"}},
            "^data={'name': 'letters'}: .* was trained with {'name': 'numbers'}; .*--other_",
        ),
        ({"data": "letters"}, "^data='letters': .* was trained with {'name': 'numbers'}; .*--other_data true$"),
        ({"tokenizer_sha256": "2"}, "^tokenizer_sha256='2': .* was trained with '1'"),
    ],
)
def test_what_a_run_keeps_is_named_before_its_settings(tmp_path, origin, said):
    """Another model has other settings as well: the line is about what makes it another run."""
    before = ORIGIN | {"model": "a", "optimizer": "adamw", "tokenizer_sha256": "1"}
    drive(tmp_path, num_iterations=2, origin=before)
    with pytest.raises(UserError, match=said) as raised:
        drive(tmp_path, width=4, origin=before | origin)
    assert is_one_line(raised.value)


def test_what_an_older_checkpoint_does_not_name_is_no_change(tmp_path, capsys):
    """Model and optimizer have had names since 2026-11-21; scores and notes had other names before."""
    drive(tmp_path, num_iterations=2, notes={"wandb": "3f9a"})
    path = newest(tmp_path)
    record = read_record(tmp_path)
    record |= {"best_val_bpb": 0.125, "best_step": 1, "remember": record.pop("notes")}
    del record["best_score"]
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"}
    shutil.rmtree(path)
    write_checkpoint(path, files | {"state.json": json.dumps(record).encode()})
    drive(tmp_path, num_iterations=3, origin=ORIGIN | {"model": "a", "optimizer": "adamw"}, metric="val_bpb")
    record = read_record(tmp_path)
    assert (record["best_step"], record["best_score"], record["notes"]) == (1, 0.125, {"wandb": "3f9a"})
    assert capsys.readouterr().out.count("changed: ") == 1, "the number of steps"
    assert record["made_from"]["model"] == "a"


def test_another_fixed_setting_is_refused_and_nothing_is_touched(tmp_path):
    drive(tmp_path, num_iterations=5)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"^width=4: .* was trained with 3") as raised:
        drive(tmp_path, width=4)
    assert is_one_line(raised.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept


# ----------------------------------------------------------------------------------------------------------------------
# When it saves


class NotingMirror:
    """A mirror that notes the checkpoints it is offered."""

    def __init__(self):
        self.steps, self.restored, self.finished = [], [], 0

    def restore(self, folder):
        self.restored.append(folder)

    def held(self):
        return set()

    def offer(self, path):
        self.steps.append(int(path.name[5:]))

    def finish(self):
        self.finished += 1


def test_it_saves_by_steps_and_by_minutes_whichever_comes_first(tmp_path, monkeypatch):
    """save_every and save_minutes, each evaluation and the end; no step twice, and each goes to the mirror."""
    now = [0.0]  # s
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def twenty_seconds(state, batch):
        now[0] += 20
        return add_batch(state, batch)

    for name, options, steps in (
        ("steps", {"save_every": 6, "eval_every": 9}, [6, 9, 12, 18, 20]),
        ("both", {"save_every": 7, "eval_every": 0, "save_minutes": 1.5}, [5, 7, 12, 14, 19, 20]),
        ("minutes", {"eval_every": 10, "save_minutes": 2.0}, [7, 10, 17, 20]),
        ("the end", {"eval_every": 0}, [20]),
    ):
        mirror = NotingMirror()
        drive(tmp_path / name, twenty_seconds, mirror=mirror, **options)
        assert mirror.steps == steps and mirror.finished == 1, name
        assert mirror.restored == [tmp_path / name / "checkpoints"]


@pytest.mark.parametrize("what", ["save", "eval", "sample"])
def test_nothing_is_due_at_the_start_or_the_end(tmp_path, what):
    """Every 5 steps of 20, but not before the first step, nor after the last: what ends a run is done by itself."""
    seen = []
    with Session(tmp_path, Config(save_every=5, eval_every=5, sample_every=5), ORIGIN) as run:
        run.begin(jax.tree.map(jnp.copy, STATE), count_up, jax.device_put)
        while run.continues():
            seen += [run.step] * run.due(what)
            run.advance(add_batch)
        seen += [run.step] * run.due(what)
    assert seen == [5, 10, 15]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_loss_is_written_separately(tmp_path, name, value):
    """One line with the step and the last good checkpoint; the bad state as nonfinite_*, which nothing resumes from.

    A finite loss with a gradient that is not leaves parameters of NaN: step 11's would be saved as good.
    """
    healed = []

    def train_step(state, batch):
        number = int(state["step"]) + 1
        state, metrics = add_batch(state, batch)
        return state, metrics | ({name: value} if number >= 11 and not healed else {})

    for _ in range(2):  # the second start meets the same, and must not stumble over what the first left
        with pytest.raises(UserError, match=f"the {name} of step 11 is {value}") as raised:
            drive(tmp_path, train_step, save_every=4)
        assert is_one_line(raised.value) and "learning_rate" in str(raised.value)
        assert str(raised.value).endswith("; the last good checkpoint is step_00000008")
        assert newest(tmp_path).name == "step_00000008" and threads() == []
        [apart] = (tmp_path / "checkpoints").glob("nonfinite_*")
        assert find_damage(apart) is None
        assert [row["step"] for row in read_rows(tmp_path) if "loss" in row] == list(range(1, 11))
    healed.append(True)
    assert drive(tmp_path, train_step, save_every=4).step == 20 and apart.exists()
    assert [row["step"] for row in read_rows(tmp_path) if "loss" in row] == list(range(1, 21))


def test_non_finite_parameters_are_never_saved_as_good(tmp_path):
    """A step too long leaves infinite parameters after a finite loss and gradient: the save finds them."""

    def train_step(state, batch):
        state, metrics = add_batch(state, batch)
        return {**state, "params": {"w": state["params"]["w"].at[1].set(jnp.inf)}}, metrics

    with pytest.raises(UserError, match="step 1 left parameters that are not finite: lower learning_rate") as raised:
        drive(tmp_path, train_step, save_every=1)
    assert str(raised.value).endswith("; there is no checkpoint yet") and is_one_line(raised.value)
    assert list_checkpoints(tmp_path) == ["nonfinite_00000001"]


# ----------------------------------------------------------------------------------------------------------------------
# The thread that writes


def test_training_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """A disk that takes its time: steps continue during the save, and the session ends when the last one is written."""
    reached, waited = threading.Event(), []

    def write(path, files, take):
        taken = {id(array): take(array) for array in arrays_in(files)}
        waited.append(reached.wait(30))
        time.sleep(0.1)
        write_checkpoint(path, files, lambda array: taken[id(array)])

    monkeypatch.setattr(writer, "write_checkpoint", write)
    drive(tmp_path, acting_at(13, reached.set), eval_every=0, save_every=10)
    assert waited == [True, True] and list_checkpoints(tmp_path) == ["step_00000010", "step_00000020"]


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    """No second checkpoint leaves the device while the one before is still being written: 2 GiB once, not twice."""
    writing, filled = threading.Event(), []

    def write(path, files, take):
        writing.set()
        time.sleep(0.1)
        write_checkpoint(path, files, take)
        time.sleep(0.1)
        writing.clear()

    class Noting(HostBuffer):
        def __init__(self):
            filled.append(writing.is_set())
            super().__init__()

    monkeypatch.setattr(writer, "write_checkpoint", write)
    monkeypatch.setattr(writer, "HostBuffer", Noting)
    drive(tmp_path, eval_every=0, save_every=1, num_iterations=4)
    assert filled == [False] * 4


def test_a_signal_while_the_last_checkpoint_is_written_does_not_end_the_process(tmp_path, monkeypatch):
    """Handlers were put back before the writer was waited for: a SIGTERM then killed the write."""
    closing, got_through = threading.Event(), []

    def batches(position):
        try:
            yield from count_up(position)
        finally:
            closing.set()  # the loader is closed first

    def write(*args):
        closing.wait(30)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        time.sleep(0.1)
        write_checkpoint(*args)

    monkeypatch.setattr(writer, "write_checkpoint", write)
    before = signal.signal(signal.SIGTERM, lambda *args: got_through.append(args))
    try:
        drive(tmp_path, batches=batches, eval_every=0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert closing.is_set() and newest(tmp_path).name == "step_00000020" and got_through == []


# ----------------------------------------------------------------------------------------------------------------------
# The device is never waited for


class Watched:
    """A scalar on the device that notes, with the steps dispatched by then, when the host asks for its value."""

    dispatched, reads = 0, []

    def __init__(self, step, value):
        self.step, self.value = step, value

    def read(self, *args, **kwargs):
        Watched.reads.append((self.step, Watched.dispatched))
        return np.asarray(self.value)

    __array__ = read
    __float__ = lambda self: float(self.read())
    __int__ = __index__ = lambda self: int(self.read())
    __bool__ = lambda self: bool(self.read())
    block_until_ready = item = read


def test_the_host_waits_for_no_step_but_to_log(tmp_path):
    """45 steps: values are fetched in groups of ten or more, and only once the step after them is dispatched.

    Saving, evaluating and the end of the run may wait; nothing else may, not even for the step counter.
    """
    Watched.dispatched, Watched.reads = 0, []

    def train_step(state, batch):
        Watched.dispatched += 1
        done = Watched.dispatched
        metrics = {name: Watched(done, 1.0) for name in ("loss", "grad_norm", "lr")}
        return {**state, "step": Watched(done, done)}, metrics

    drive(tmp_path, train_step, score=lambda state: {"val_loss": 1.0, "val_bpb": 2.0}, num_iterations=45, eval_every=0)
    during = [(step, dispatched) for step, dispatched in Watched.reads if dispatched < 45]
    assert {step for step, _ in during} == set(range(1, max(step for step, _ in during) + 1))
    assert all(step < dispatched for step, dispatched in during), "waited for the step just dispatched"
    moments = {dispatched for _, dispatched in during}
    assert 1 <= len(moments) <= 4 and {step for step, _ in Watched.reads} == set(range(1, 46))


# ----------------------------------------------------------------------------------------------------------------------
# The Hub

REPO, TOKEN = "someone/onechip-x", "hf_loopback"


@pytest.fixture
def hub(monkeypatch):
    with connected_hub(monkeypatch) as hub:
        yield hub


def test_a_new_machine_resumes_from_the_hub(hub, straight, tmp_path, monkeypatch, capsys):
    """An empty folder and the same run: the last whole state was up before the session ended; it comes back."""
    real = HubPlace._commit
    monkeypatch.setattr(HubPlace, "_commit", lambda *args: (threading.Event().wait(0.3), real(*args)))
    stopped = acting_at(13, lambda: signal.raise_signal(signal.SIGTERM))
    drive(tmp_path / "a", stopped, mirror=Mirror(HubPlace(TOKEN, REPO)))
    up = {path.split("/")[1] for path in hub.files(REPO) if path.startswith("checkpoints/")}
    assert up == {"step_00000013"}
    drive(tmp_path / "b", mirror=Mirror(HubPlace(TOKEN, REPO)))
    assert f"step_00000013 came from {REPO}" in capsys.readouterr().out
    assert_same_end(tmp_path / "b", straight)
    last = {f"checkpoints/step_00000020/{path.name}" for path in newest(tmp_path / "b").iterdir()}
    assert last == {path for path in hub.files(REPO) if path.startswith("checkpoints/")}
    assert not [name for name in list_checkpoints(tmp_path / "b") if not name.startswith("step_")]


def test_a_hub_that_always_fails_stops_nothing_and_is_reported(hub, tmp_path, capsys):
    """Training reaches its end, every checkpoint is here, and the last line says what is not up, and why."""
    hub.faults = [Fault("POST", "/commit/", status=500, times=10**6)]
    run = drive(tmp_path, save_every=10, mirror=Mirror(HubPlace(TOKEN, REPO)))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("upload: ")]
    assert run.step == 20 and newest(tmp_path).name == "step_00000020"
    assert said and all(is_one_line(line) for line in said) and "step_00000020" in said[-1] and "500" in said[-1]
    assert len(hub.repos["model", REPO].commits) == 1 and TOKEN not in "".join(said), "an empty repository"
