"""What the notebooks share and do not teach, a subject a file. Import it before jax: it keeps an idle libtpu quiet."""

from onechip.machine import quiet_jax

quiet_jax()
