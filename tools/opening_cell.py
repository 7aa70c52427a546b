# @title Opening cell, the same in every notebook
# On Colab: fetches the sibling files, installs what the image lacks, looks for the TPU. Elsewhere: finds the siblings.
REPOSITORY = "REPOSITORY_URL"
REF = "main"  # @param {type:"string"}
# @markdown REF is the version of the sibling files: a branch, a tag or a full commit hash.
# @markdown In a copy of yours that must stay as it is, name the commit that `config.json` of its runs tells.


def open_notebook(repository, ref):
    """Makes the sibling files importable, without touching any package that is already installed."""
    import importlib.metadata
    import os
    import subprocess
    import sys
    from importlib.util import find_spec
    from pathlib import Path

    repository, ref = os.environ.get("ONECHIP_REPO", repository), os.environ.get("ONECHIP_REF", ref)
    on_colab = find_spec("google") is not None and find_spec("google.colab") is not None
    clone = Path(f"onechip-{ref}".replace("/", "-")).resolve()  # named after the ref: another ref, another folder
    folders = [f for f in (Path.cwd(), Path.cwd().parent, clone) if (f / "01_tokenizer.py").exists()]
    if not folders and not on_colab:
        raise RuntimeError(f"no 01_tokenizer.py here or one folder up: open this notebook in a clone of {repository}")
    if not folders:
        clone.mkdir(exist_ok=True)
        # fetch, not clone --branch: that takes no commit hash
        for step in (["init"], ["fetch", "--depth", "1", repository, ref], ["checkout", "FETCH_HEAD"]):
            command, asking = ["git", "-C", clone, step[0], "-q", *step[1:]], {"GIT_TERMINAL_PROMPT": "0"}
            git = subprocess.run(command, capture_output=True, text=True, env=os.environ | asking)
            if git.returncode:
                raise RuntimeError(f"cannot fetch {ref!r} of {repository}: {git.stderr.strip().partition(chr(10))[0]}")
    sys.path.insert(0, str((folders or [clone])[0]))
    if on_colab:
        for names in (("tiktoken",), ("tensorboard", "xprof", "wandb", "sweeps")):  # first what 01 cannot do without
            if missing := [name for name in names if find_spec(name) is None]:
                # Each installed version is a constraint, so that pip adds packages and replaces none.
                installed = "\n".join(f"{d.name}==={d.version}" for d in importlib.metadata.distributions())
                pip = [sys.executable, "-m", "pip", "install", "-q", "-c", "/dev/stdin", *missing]
                if subprocess.run(pip, input=installed, text=True).returncode:
                    print(f"Going on without {', '.join(missing)}: pip could not install them beside what is here.")
        import common  # noqa: F401  (before jax: it keeps a libtpu that has no TPU quiet)

        # isort: split
        import jax

        if jax.default_backend() != "tpu":
            print("=" * 80, f"NO TPU: JAX found only {jax.default_backend().upper()}.", sep="\n")
            print("Choose Runtime > Change runtime type > v6e-1 TPU, then Run all again. Going on without one.")
            print("=" * 80)


if "__file__" not in globals():  # a kernel only: scripts and imports find their siblings by themselves
    open_notebook(REPOSITORY, REF)
