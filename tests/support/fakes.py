"""Makes this process look like another: a notebook's kernel, Colab."""

import sys
import types


def pretend_notebook(monkeypatch, get=None):
    """Lets onechip believe that it runs in a kernel; with get(name), in Colab, whose userdata has that function."""
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: object()
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    if get:
        userdata = types.ModuleType("google.colab.userdata")
        userdata.get = get
        colab = types.ModuleType("google.colab")
        colab.userdata = userdata
        google = types.ModuleType("google")
        google.colab = colab
        for module in (google, colab, userdata):
            monkeypatch.setitem(sys.modules, module.__name__, module)
