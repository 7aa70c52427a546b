"""onechip/settings.py: fields and their rules, the command line, presets and the name of a run."""

import dataclasses
import math
import re
import sys

import jax
import pytest
from fakes import pretend_notebook

from onechip.errors import UserError
from onechip.settings import Run, change_default, check_fields, choose, name_run, parse_settings, setting, settle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dials:
    """What can be turned."""

    depth: int = setting(3, "how deep")
    rate: float = setting(0.5, "how fast, in % of all", above=0)
    title: str = setting("", "what it is called")
    loud: bool = setting(False, "whether it is heard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switches:
    """What can be switched."""

    engine: str = setting("steam", "what drives it", choices=("steam", "diesel"))


@pytest.fixture
def command_line(monkeypatch):
    """A function that sets sys.argv."""
    return lambda *words: monkeypatch.setattr(sys, "argv", ["script.py", *words])


# ----------------------------------------------------------------------------------------------------------------------
# Fields and rules


def refuse(kind, value, **rule):
    """What check_fields says of a field x of this type, value and rule; "" if it says nothing."""
    cls = dataclasses.make_dataclass("Made", [("x", kind, setting(value, "", **rule))])
    try:
        check_fields(cls())
    except UserError as error:
        assert str(error).count("\n") == 0 and len(str(error)) < 300
        return str(error)
    return ""


@pytest.mark.parametrize(
    "kind, good, bad, message",
    [
        (int, [0, -7, 2**63 - 1], [1.0, True, "1", None, math.nan], "must be a finite int"),
        (float, [0.5, -3, 1e308, 10**300], [math.nan, math.inf, -math.inf, False, "1"], "must be a finite float"),
        (bool, [True, False], [1, 0, "true", None], "must be true or false"),
        (str, ["", "naïve"], [1, None, b"x"], "must be a str"),
    ],
)  # fmt: skip
def test_a_field_has_the_type_it_says(kind, good, bad, message):
    """An int may stand for a float; a bool is not taken for a number, nor a number for a bool; numbers are finite."""
    assert [refuse(kind, value) for value in good] == [""] * len(good)
    assert [refuse(kind, value) for value in bad] == [f"x={value!r}: {message}" for value in bad]


def test_a_number_beyond_64_bits_is_refused_in_one_line():
    """Unless the field has a bound of its own; Python does not even write the longest ones."""
    for value in (2**63, -(2**63), 10**30):
        assert refuse(int, value) == f"x={value}: must fit into 64 bits: at most 9223372036854775807"
    assert refuse(int, 10**9000).endswith("must fit into 64 bits: at most 9223372036854775807")
    assert refuse(float, 10**400).endswith("...: must be a finite float")
    assert refuse(int, 2**70, at_most=5) == f"x={2**70}: must be at most 5"


@pytest.mark.parametrize(
    "kind, rule, good, bad, remedy",
    [
        (int, dict(at_least=1), [1, 9], [0, -1], "must be a positive integer"),
        (int, dict(at_least=0), [0, 1], [-1], "must not be negative"),
        (float, dict(at_least=0), [0, 0.0], [-0.1, -5], "must not be negative"),
        (int, dict(at_least=3), [3], [2], "must be at least 3"),
        (float, dict(at_least=1), [1.0], [0.5], "must be at least 1"),
        (float, dict(above=0), [1e-300, 7], [0.0, -1.0], "must be greater than 0"),
        (float, dict(below=2), [1.99], [2.0, 2], "must be less than 2"),
        (int, dict(at_most=4), [4, -4], [5], "must be at most 4"),
        (float, dict(at_least=0, below=1), [0.0, 0.9], [1.0, -0.5], "must lie in [0, 1)"),
        (float, dict(at_least=0, at_most=1), [0, 1], [1.5, -0.1], "must lie in [0, 1]"),
        (float, dict(above=0, at_most=1), [1.0], [0.0], "must lie in (0, 1]"),
        (float, dict(above=0, below=1), [0.5], [0.0, 1.0], "must lie in (0, 1)"),
        (float, dict(at_most=60, at_least=0, why="it must fit"), [60], [61.0], "must lie in [0, 60]: it must fit"),
        (str, dict(choices=("bfloat16", "float32")), ["float32"], ["float16", ""], "use bfloat16 or float32"),
        (str, dict(choices=["a", "b", "c"]), ["c"], ["d"], "use one of a, b, c"),
        (bool, dict(), [True, False], [], ""),
    ],
)  # fmt: skip
def test_a_rule_is_kept_to_its_very_edge(kind, rule, good, bad, remedy):
    """What is allowed passes, what is not is refused with field, value and remedy."""
    assert [refuse(kind, value, **rule) for value in good] == [""] * len(good)
    assert [refuse(kind, value, **rule) for value in bad] == [f"x={value!r}: {remedy}" for value in bad]


def test_the_first_wrong_field_is_named_and_a_plain_field_is_checked_for_its_type():
    """Fields are checked in their order, the inherited ones first; a field without setting() has no rule."""

    @dataclasses.dataclass
    class Base:
        a: int = setting(1, "", at_least=1)

        def __post_init__(self):
            check_fields(self)

    @dataclasses.dataclass
    class Derived(Base):
        b: float = 0.5

    Derived()
    for fields, name in ((dict(a=0, b="x"), "a=0"), (dict(b="x"), "b='x'")):
        with pytest.raises(UserError, match=f"^{name}: "):
            Derived(**fields)


def test_a_derived_class_may_change_a_default_alone():
    """The help, the rule and whether it is fixed stay: repeated by hand, one of them would be forgotten."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Base:
        x: float = setting(15.0, "a bound", fixed=True, at_least=0, at_most=60)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Derived(Base):
        x: float = change_default(Base, "x", 0.0)

    (base,), (derived,) = dataclasses.fields(Base), dataclasses.fields(Derived)
    assert (Base().x, Derived().x) == (15.0, 0.0) and base.metadata == derived.metadata
    with pytest.raises(UserError, match=r"^x=61.0: must lie in \[0, 60\]"):
        check_fields(Derived(x=61.0))


def test_a_run_refuses_what_cannot_be():
    """Numbers that are negative or none, before anything is looked up or downloaded."""
    for field, value in (("num_shards", -3), ("weights_minutes", math.nan), ("state_minutes", -5), ("name", 3)):
        with pytest.raises(UserError, match=f"^{field}="):
            Run(**{field: value})


def test_a_runs_name_stays_below_out():
    """Subfolders are fine; whatever leaves --out, or names it, is refused in one line."""
    for name in ("", "a", "exp/1", "my run", "v1..2", ".hidden", "..."):
        assert Run(name=name).name == name
    for name in ("..", "../x", "a/../../x", "a/..", "/tmp/x", "/", ".", "./a", "a/", "a//b", "a/./b"):
        with pytest.raises(UserError, match=r"^name=.*: must name a folder below --out, such as exp/1: [^\n]*$"):
            Run(name=name)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def test_settings_from_a_command_line_have_their_fields_types(command_line):
    """Only what was given comes back, one dict per class, converted to the field's type; both spellings of a value."""
    command_line("--depth", "7", "--rate=1e-3", "--loud", "true", "--engine", "diesel")
    dials, switches = parse_settings(Dials, Switches)
    assert dials == {"depth": 7, "rate": 1e-3, "loud": True} and switches == {"engine": "diesel"}
    assert type(dials["depth"]) is int and type(dials["rate"]) is float and dials["loud"] is True
    command_line()
    assert parse_settings(Dials, Switches) == [{}, {}]


@pytest.mark.parametrize("word, value", [("true", True), ("1", True), ("Yes", True), ("FALSE", False), ("0", False)])
def test_a_bool_setting_is_read_as_a_word(command_line, word, value):
    """bool("false") is True: words are needed, and False must come out as False."""
    command_line("--loud", word)
    assert parse_settings(Dials)[0] == {"loud": value}


@pytest.mark.parametrize(
    "words, named",
    [
        (["--depht", "4"], ["--depht", "--depth"]),
        (["--engin=4"], ["--engin", "--engine"]),
        (["--dep", "4"], ["--dep"]),  # no abbreviations: a later field could make them mean something else
        (["--depth", "four"], ["--depth", "int", "'four'"]),
        (["--depth", "4.5"], ["--depth", "int", "'4.5'"]),
        (["--depth", "1e400"], ["--depth", "int", "'1e400'"]),
        (["--depth", "1" * 5000], ["--depth", "int"]),
        (["--rate", "fast"], ["--rate", "float", "'fast'"]),
        (["--loud", "perhaps"], ["--loud", "bool", "'perhaps'"]),
        (["--depth"], ["--depth"]),
        (["stray"], ["stray"]),
        (["stray" * 999], ["stray"]),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_that_helps(command_line, words, named):
    """A wrong name, type or missing value is a UserError of one line with what was given, and the nearest name."""
    command_line(*words)
    with pytest.raises(UserError) as caught:
        parse_settings(Dials, Switches)
    message = str(caught.value)
    assert "\n" not in message and "--help" in message and "_parse" not in message and len(message) < 400
    for name in named:
        assert name in message


def test_overrides_come_before_the_command_line(command_line):
    """In a script the command line has the last word over the OVERRIDES text, whose quotes must be closed."""
    command_line("--depth", "5")
    assert parse_settings(Dials, overrides="--depth 4 --title 'x y'")[0] == {"depth": 5, "title": "x y"}
    with pytest.raises(UserError, match="No closing quotation"):
        parse_settings(Dials, overrides="--title 'x y")


def test_in_a_notebook_only_the_overrides_count(command_line, monkeypatch):
    """A kernel's own command line (-f connection.json) is not the user's."""
    pretend_notebook(monkeypatch)
    command_line("-f", "/tmp/kernel.json", "--depth", "5")
    assert parse_settings(Dials, overrides="--title x")[0] == {"title": "x"}
    with pytest.raises(UserError, match="--depth"):
        parse_settings(Dials, overrides="--dept 4")


def test_reading_settings_leaves_the_excepthook_alone(command_line, monkeypatch):
    """What reports errors in one line is set by prepare(), where it can be seen."""
    hook = lambda *args: None
    monkeypatch.setattr(sys, "excepthook", hook)
    command_line("--depth", "5")
    parse_settings(Dials)
    assert sys.excepthook is hook


def show_help(capsys, *classes):
    """What --help prints, on one line."""
    with pytest.raises(SystemExit) as ended:
        parse_settings(*classes)
    assert not ended.value.code
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_every_setting_with_default_and_range(command_line, capsys):
    """--help lists name, meaning, default and range of each field, % signs included, and ends with success."""
    command_line("--help")
    shown = show_help(capsys, Dials, Switches)
    for cls in (Dials, Switches):
        assert cls.__doc__.strip() in shown
        for field in dataclasses.fields(cls):
            assert f"--{field.name}" in shown
    lines = [
        "how deep (default: 3)",
        "how fast, in % of all (default: 0.5; greater than 0)",
        "what it is called (default: '')",
        "whether it is heard (default: false)",
        "what drives it (default: 'steam'; steam or diesel)",
    ]
    assert [line for line in lines if line not in shown] == []


def test_help_of_a_run_names_each_range(command_line, capsys):
    """Every field of Run has a meaning, and its default and range next to it."""
    command_line("--help")
    shown = show_help(capsys, Run)
    assert all(field.metadata["help"] and field.metadata["help"] in shown for field in dataclasses.fields(Run))
    assert "minutes between uploads of the weights (default: 15.0; not negative)" in shown


@pytest.mark.parametrize(
    "rule, shown",
    [
        (dict(at_least=1), "a positive integer"),
        (dict(at_least=0, below=9), "in [0, 9)"),
        (dict(at_most=9), "at most 9"),
        (dict(choices=(1, 2, 3)), "one of 1, 2, 3"),
    ],
)
def test_help_shows_a_range_in_words(command_line, capsys, rule, shown):
    """The words of --help are those of the refusal."""
    command_line("--help")
    made = dataclasses.make_dataclass("Made", [("x", int, setting(1, "what", **rule))])
    assert f"what (default: 1; {shown})" in show_help(capsys, made)


# ----------------------------------------------------------------------------------------------------------------------
# Presets and names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """A config with what a run's size follows from."""

    num_iterations: int = setting(20000, "steps", at_least=1)
    total_batch_size: int = setting(64, "sequences a step", at_least=1)
    seq_len: int = setting(2048, "tokens a sequence", at_least=1)
    width: int = setting(8, "how wide")

    def __post_init__(self):
        check_fields(self)


PRESETS = {"chip": {}, "gpu": {"width": 4}, "laptop": {"width": 2, "num_iterations": 300, "seq_len": 256}}


@pytest.fixture
def chosen(monkeypatch, capsys, command_line):
    """choose() as on a command line without words; a function that returns (run, config, what it printed)."""
    command_line()

    def call(overrides="", platform="cpu"):
        device = type("Device", (), {"platform": platform, "device_kind": f"some {platform}"})()
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        run, config = choose(Small, PRESETS, overrides)
        return run, config, capsys.readouterr().out

    return call


@pytest.mark.parametrize(
    "platform, preset, data", [("tpu", "chip", "fineweb"), ("gpu", "gpu", "fineweb"), ("cpu", "laptop", "offline")]
)
def test_the_device_chooses_the_preset_and_the_preset_the_data(chosen, platform, preset, data):
    """A TPU gets the config's defaults and FineWeb-Edu, a CPU the laptop's run of the offline corpus, and prints it."""
    run, config, said = chosen(platform=platform)
    assert (run.preset, run.data) == (preset, data) and config == Small(**PRESETS[preset])
    assert preset in said and data in said and f"the device is a {platform}" in said and f"some {platform}" in said
    if platform != "cpu":  # 50M tokens a shard, and no fewer shards than the run has tokens for
        tokens = config.num_iterations * config.total_batch_size * config.seq_len
        assert run.num_shards * 50e6 >= tokens > (run.num_shards - 1) * 50e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing(Small):
    """One that can pack."""

    packing: str = setting("stream", "how rows are made", choices=("stream", "best-fit"))


def test_packing_takes_more_shards(chosen):
    """Up to two fifths of the tokens are dropped."""
    stream = chosen(platform="tpu")[0].num_shards
    run, config = settle(Run(preset="chip"), Packing, PRESETS, {"packing": "best-fit"})
    tokens = config.num_iterations * config.total_batch_size * config.seq_len
    assert run.num_shards * 30e6 >= tokens > (run.num_shards - 1) * 30e6 and run.num_shards > stream


def test_a_topology_means_the_chip_preset(chosen):
    """--preflight v6e:1x1 on a laptop asks about the chip's run; --preflight here about this device's."""
    run, _, said = chosen("--preflight v6e:1x1")
    assert run.preset == "chip" and "as --preflight names a TPU" in said
    assert chosen("--preflight here")[0].preset == "laptop"


@pytest.mark.parametrize("words, field", [("--preset desktop", "preset='desktop'"), ("--seq_len 0", "seq_len=0")])
def test_a_value_that_cannot_be_is_refused_in_one_line(chosen, words, field):
    """A preset or a config that cannot be is refused with its field before anything is printed or done."""
    with pytest.raises(UserError, match=field) as caught:
        chosen(words)
    assert "\n" not in str(caught.value)


def test_what_the_user_sets_goes_over_the_preset(chosen):
    """Preset, data and any field can be overridden one by one, the rest of the preset stays."""
    run, config, said = chosen("--preset laptop --data fineweb --seq_len 16 --num_shards 7", platform="tpu")
    assert (run.preset, run.data, run.num_shards) == ("laptop", "fineweb", 7)
    assert config == Small(**{**PRESETS["laptop"], "seq_len": 16})


def test_a_preset_that_the_user_set_is_reported_as_set(chosen):
    """The line that says why names the user and not the device."""
    _, _, said = chosen("--preset laptop", platform="tpu")
    assert "laptop, as set" in said and "the device is" not in said


def test_a_run_is_named_after_its_settings(chosen):
    """The same settings find the same folder, so a second start resumes; any other gets another; a name is a name."""
    name = lambda words: chosen(words)[0].name
    assert name("") == name("--width 2") == name("--out elsewhere"), "a width of 2 is the laptop preset's"
    names = [name(words) for words in ("", "--width 3", "--data fineweb", "--num_iterations 301", "--num_shards 2")]
    assert len(set(names)) == 5 and all(re.fullmatch(r"[\w-]+", text) for text in names)
    assert name("--name mine --width 3") == "mine"


def test_a_name_stays_what_it_is():
    """A run that was started by an earlier version is found again."""
    run, config = settle(Run(preset="laptop", data="/some/texts"), Small, PRESETS, {})
    assert name_run(run, config) == "laptop-texts-005eb0"
