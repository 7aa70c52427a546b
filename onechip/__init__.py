"""What the notebooks share and do not explain, by subject. Import it before jax: it keeps an idle libtpu quiet."""

from onechip.machine import quiet_jax

quiet_jax()
