"""A chat in a notebook: by typing into a running cell of a real kernel, and on a page behind Colab's proxy."""

import socket
import sys
import types
import urllib.error
import urllib.request

import pytest
from conftest import ROOT, SUPPORT
from execute import run_cells
from jupyter_client.manager import start_new_kernel
from scripted import ScriptedModel

from onechip import chatbox
from onechip.errors import UserError

SETUP = f"""
import sys
sys.path[:0] = {[str(ROOT), str(SUPPORT)]!r}
from onechip.chatbox import chat_in_cell
from onechip.talker import TalkSettings
from scripted import ScriptedModel, endless, last_text, say_back
script = lambda prompt: endless(prompt) if "long" in last_text(prompt) else say_back(prompt)
talker = ScriptedModel(script, pause=0.02, context=10**6).talker()
"""
CHAT = "chat_in_cell(talker, TalkSettings()); print('left')"


class Cell:
    """A notebook that is open in a browser: what its running cell prints, and a field where somebody types."""

    def __init__(self, manager, client):
        self._manager, self._client = manager, client
        self.printed, self.messages = "", 0

    def run(self, source):
        self._client.execute(source, allow_stdin=True)

    def wait_for_field(self):
        """Waits for the field and returns what is in front of it."""
        return self._client.get_stdin_msg(timeout=60)["content"]["prompt"]

    def type(self, text):
        """Waits for the field, types into it, and returns what is in front of it."""
        prompt = self.wait_for_field()
        self._client.input(text)
        return prompt

    def interrupt(self):
        self._manager.interrupt_kernel()

    def wait_for(self, text):
        """Waits until the cell has printed a text; returns what it printed until then, in how many messages."""
        self.messages = 0
        while text not in self.printed:
            message = self._client.get_iopub_msg(timeout=60)
            assert message["msg_type"] != "error", message["content"]
            if message["msg_type"] == "stream":
                self.printed += message["content"]["text"]
                self.messages += 1
        before, _, self.printed = self.printed.partition(text)
        return before


@pytest.fixture(scope="module")
def cell():
    """A real kernel with a scripted model, and a front end that can type."""
    manager, client = start_new_kernel(startup_timeout=60)
    cell = Cell(manager, client)
    cell.run(SETUP)
    client.get_shell_msg(timeout=60)
    yield cell
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_a_chat_below_a_cell(cell):
    """Questions are typed below the cell, answers are printed piece by piece, tools too; /quit ends the cell."""
    cell.run(CHAT)
    assert cell.type("what is 6*7") == "You: "
    cell.wait_for("It is 42.\n")
    assert cell.messages > 3, "as it is written, not at the end"
    cell.type("one two three")
    cell.wait_for("You said: one two three\n")
    cell.type("/quit")
    cell.wait_for("left\n")


@pytest.mark.slow
def test_the_stop_button_stops_an_answer_first(cell):
    """While an answer is written it ends that one and the chat continues; while the field waits it ends the cell."""
    cell.run(CHAT)
    cell.type("a long story")
    cell.wait_for("word3 ")
    cell.interrupt()
    cell.wait_for("(stopped)\n")
    cell.type("hello")
    cell.wait_for("You said: hello\n")
    cell.wait_for_field()
    cell.interrupt()
    cell.wait_for("left\n")


@pytest.mark.slow
def test_nobody_is_there_to_type(tmp_path):
    """Where a notebook is run by a program, the cell says so in a line and the next one runs."""
    printed = run_cells([SETUP, CHAT], tmp_path)
    assert printed.splitlines()[-2:] == [
        "nobody can type here; run this cell in a notebook that is open in a browser",
        "left",
    ]


def status(address, **headers):
    request = urllib.request.Request(address, headers=headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def colab(monkeypatch, eval_js):
    """Makes this process look like Colab's kernel, whose browser computes with `eval_js`."""
    module = types.ModuleType("google.colab")
    module.output = types.SimpleNamespace(eval_js=eval_js)
    monkeypatch.setitem(sys.modules, "google.colab", module)
    monkeypatch.setitem(sys.modules, "google", types.SimpleNamespace(colab=module))


def test_a_page_behind_colab_s_proxy(monkeypatch, capsys):
    """The proxy's address is printed and is the one more name that the server has, with the page that is there."""
    asked = []

    def eval_js(script, timeout_sec):
        asked.append(script)
        return f"https://{port}-m-s-1a2b.us-west4-0.prod.colab.dev/"

    port = free_port()
    colab(monkeypatch, eval_js)
    served = chatbox.serve_in_notebook(ScriptedModel().talker(), port)
    try:
        name = f"{port}-m-s-1a2b.us-west4-0.prod.colab.dev"
        assert asked == [f"google.colab.kernel.proxyPort({port})"]
        assert capsys.readouterr().out == f"chat with scripted: https://{name}/\n"
        models = f"{served.address}/v1/models"
        own, foreign = f"https://{name}", "https://8000-m-s-other.us-west4-0.prod.colab.dev"
        assert status(models, Host=name, Origin=own) == status(models, Origin=own) == status(models) == 200
        assert status(models, Host=name, Origin=foreign) == status(models, Origin=foreign) == 403
        assert status(models, Host=foreign.removeprefix("https://")) == 403
    finally:
        served.stop()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_without_a_proxy_the_page_is_on_this_machine(monkeypatch, capsys):
    """Outside Colab, and where the browser does not answer, the address is loopback's; a bad port is one line."""
    served = chatbox.serve_in_notebook(ScriptedModel().talker(), 0)
    served.stop()
    assert capsys.readouterr().out == f"chat with scripted: http://127.0.0.1:{served.port}\n"

    def late(script, timeout_sec):
        raise TimeoutError("the browser did not answer")

    colab(monkeypatch, late)
    served = chatbox.serve_in_notebook(ScriptedModel().talker(), 0)
    served.stop()
    assert "Colab gave no address for port 0: the browser did not answer\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="^port="):
        chatbox.serve_in_notebook(ScriptedModel().talker(), 70000)
