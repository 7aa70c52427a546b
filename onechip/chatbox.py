"""A chat in a notebook: in the output of a cell, or on the web page, which Colab shows through its own proxy.

The box in the cell is input() and what is printed. Colab, Jupyter and others show input() as a field below the cell's
output, and printed text as it comes, each in its own way and without a frame or script of anybody else; a box of our
own would need a channel to the kernel, and theirs have nothing in common.
"""

import sys
from urllib.parse import urlsplit

from onechip.conversation import Conversation
from onechip.errors import first_line, say
from onechip.server import serve_in_thread
from onechip.terminal import ask_until_done
from onechip.webguard import USUAL_LIMITS, Door


def chat_in_cell(talker, settings):
    """Chats below the running cell until /quit or the stop button.

    The stop button stops an answer first; settings: the TalkSettings to begin with. Where a notebook is run by a
    program there is nobody to ask, and the cell ends with a line that says so.
    """

    def write(text):
        print(text, end="", flush=True)

    write(f"{talker.name}: ask something; /help lists commands, /quit or the stop button leaves\n")
    try:
        ask_until_done(Conversation(talker, settings, write), "You: ")
    except Exception as error:
        if type(error).__name__ != "StdinNotImplementedError":
            raise
        say("nobody can type here; run this cell in a notebook that is open in a browser")


def colab_address(port):
    """The address, such as https://8000-....colab.dev/, by which Colab's proxy shows a port; None outside Colab."""
    if "google.colab" not in sys.modules:
        return None
    from google.colab import output

    try:
        return output.eval_js(f"google.colab.kernel.proxyPort({int(port)})", timeout_sec=10)
    except Exception as error:
        say(f"Colab gave no address for port {port}: {first_line(error)}")
        return None


def serve_in_notebook(talker, port=8000, limits=USUAL_LIMITS):
    """Serves a Talker from a thread of the kernel and says where the page is; returns a Served, to be stopped.

    On Colab the page is reached by the address of its proxy, which only this notebook's owner can open; it is let in by
    exactly that name. UserError if the server cannot be started.
    """
    address = colab_address(port)
    if address:
        parts = urlsplit(address)
        door = Door(port=port, hosts=(parts.hostname,), origins=(f"{parts.scheme}://{parts.netloc}",))
    else:
        door = Door(port=port)
    served = serve_in_thread(talker, door, limits)
    say(f"chat with {talker.name}: {address or served.address}")
    return served
