"""onechip/hubclient.py where no hub is needed; its requests are tested with those of onechip/hub.py, in test_hub.py."""

import subprocess
import sys

from conftest import ROOT

WITHOUT_ITS_LOOP = """
from huggingface_hub.utils import _http
del _http._http_backoff_base
from onechip.hubclient import connect, load_hub
assert load_hub().HfApi and connect("hf_abc").token == "hf_abc"
assert not hasattr(_http, "_http_backoff_base")
"""


def test_a_client_whose_private_loop_has_another_name_still_works():
    """The retry policy is set through a private name of the client: one that lacks it has its own policy."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_ITS_LOOP], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
