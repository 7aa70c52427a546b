"""From a trained model to a Talker: the engine with its tools and options, and the ways to talk to it from a shell."""

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor

import jax

from onechip.calculator import calculate
from onechip.conversations import chat_tokens
from onechip.engine import Engine
from onechip.enginetalk import engine_talker
from onechip.enginethread import EngineThread
from onechip.errors import require, say
from onechip.export import find_model_files
from onechip.hosts import host_count
from onechip.mesh import build_mesh
from onechip.sandbox import describe_protection, find_walls, run_python
from onechip.server import check_packages, serve, serve_in_thread
from onechip.speculate import CopyDraft, ModelDraft
from onechip.talker import TalkSettings
from onechip.terminal import talk_in_terminal
from onechip.tools import ToolRunner
from onechip.webguard import Door, check_door, read_api_key


def run_in_sandbox(text):
    """What a program printed, then how it ended if not by itself: the last line of its error, or what stopped it."""
    answer = calculate(text)
    if answer is not None:
        return answer
    outcome = run_python(text)
    error = outcome.error.strip().splitlines()[-1:]
    stopped = [f"stopped: {outcome.stopped}"] if outcome.stopped else []
    return "\n".join([*filter(None, [outcome.stdout.rstrip("\n")]), *error, *stopped])


TOOLS = {"none": None, "calculator": calculate, "python": run_in_sandbox}


def check_talk(options):
    """UserError, one line, for options of `talk` and TalkDesk that cannot work, before anything is opened."""
    if options.talk or options.serve:
        require(host_count() == 1, "hosts", host_count(), "a model is talked to by one process: start a single one")
    if options.serve:
        check_packages()
        check_door(door_of(options))
    if options.tools == "python":
        require(find_walls()[0] is not None, "tools", options.tools, describe_protection())
    if options.draft not in ("", "copy"):
        find_model_files(options.draft)


class TalkDesk:
    """A model that can be talked to until close(): `talker`, a Talker, and `about`, a line on what it runs with.

    name: what the API calls it; opened: (config, params, tokenizer, model), as open_model gives it; parts(config) ->
    the engine's Parts. options: an object with `tools`, a name in TOOLS; `places`, texts at a time; `int8`, whether
    weights are kept in 8 bits; `draft`, "copy", or what `open_draft` opens as a smaller model of the same tokenizer, or
    "". UserError, one line, for a draft of another tokenizer.
    """

    def __init__(self, name, opened, parts, options, open_draft):
        config, params, tokenizer, model = opened
        tokens, decode = chat_tokens(tokenizer), functools.partial(tokenizer.decode, skip_special_tokens=False)
        draft, devices = make_draft(options.draft, tokenizer, parts, open_draft), jax.local_devices()
        rows = -(-options.places // len(devices)) * len(devices)
        more = {"rows": rows, "int8": options.int8, "draft": draft, "mesh": build_mesh(devices)}
        self.engine = Engine(config, params, model, parts(config), **more)
        self._writer, self._pool = EngineThread(self.engine), ThreadPoolExecutor(rows, "tool")
        run, pool = TOOLS[options.tools], self._pool if options.tools == "python" else None
        tool = run and ToolRunner(tokens, decode, run, pool)
        self.talker = engine_talker(name, self._writer, self.engine, tokens, decode, tool)
        shown = {"none": "no tools", "calculator": "a calculator"}.get(options.tools) or describe_protection()
        self.about = f"{rows} answers at once, texts of {self.engine.length:,} tokens, {shown}"

    def close(self):
        """Ends all answers, and the threads; more than once is no error."""
        self._writer.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def make_draft(name, tokenizer, parts, open_draft):
    """The engine's draft of a name as TalkDesk's options have it; None for ""."""
    if name in ("", "copy"):
        return CopyDraft() if name else None
    config, params, own, model = open_draft(name)
    same = own.to_str() == tokenizer.to_str()
    require(same, "draft", name, "has another tokenizer: take a model that was trained with the same one")
    return ModelDraft(config, params, model, parts(config))


def door_of(options):
    """The Door of a server: options.address, port, key_file, and names and origins with blanks between them."""
    key = read_api_key(options.key_file or None)
    return Door(options.address, options.port, key, tuple(options.names.split()), tuple(options.origins.split()))


def talk(desk, options):
    """Talks in the terminal if options.talk, serves if options.serve, at once if both; closes the TalkDesk at the end.

    options has temperature and top_k besides, and what `door_of` reads.
    """
    with contextlib.closing(desk):
        if not options.talk:
            return serve(desk.talker, door_of(options))
        served = serve_in_thread(desk.talker, door_of(options)) if options.serve else None
        if served:
            say(f"the page is at {served.address}")
        try:
            talk_in_terminal(desk.talker, TalkSettings(options.temperature, options.top_k))
        finally:
            if served:
                served.stop()
