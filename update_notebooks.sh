#!/usr/bin/env bash
# Writes notebooks/*.ipynb from the .py files, which are the source of truth; a second run changes nothing.
# Also carries the repository's address (pyproject.toml), tools/opening_cell.py and the Colab badge into each of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
uv run python tools/update_notebooks.py
