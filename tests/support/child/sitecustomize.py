"""Python imports this at start wherever this folder is on PYTHONPATH: processes that tests start stay offline too."""

import offline  # noqa: F401
