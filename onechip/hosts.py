"""Several hosts, a process each, that train one model together: what one of them is, and what they agree on.

All run the same program on their own devices, and every program on the devices is of all of them. So what one host
alone can see, an interrupt, a clock, a disk, must not decide alone: `agree` has host 0 say it. Files, charts and the
lines that are printed are host 0's. Hosts talk through jax's own key-value store, which needs no device.
"""

import contextlib
import itertools
import json
import sys

from onechip.errors import UserError
from onechip.together import ALONE, Hosts, meeting

FORGOTTEN = 1000  # agreements after which host 0 deletes one: no host is as far behind
_turns = itertools.count()


def _joined():
    """jax's record of this process among the others; None where jax is not in use yet."""
    return sys.modules["jax"]._src.distributed.global_state if "jax" in sys.modules else None


def host_count():
    """How many hosts train together."""
    return _joined().num_processes or 1 if _joined() else 1


def host_index():
    """Which of the hosts this one is."""
    return _joined().process_id or 0 if _joined() else 0


def is_first():
    """Whether this is the host that prints, logs and writes."""
    return host_index() == 0


# ----------------------------------------------------------------------------------------------------------------------
# Agreeing


def read_key(key):
    """The text of a key of the store, as soon as a host has set it. Signals are handled in between."""
    while True:
        try:
            return _joined().client.blocking_key_value_get(key, 1000)
        except RuntimeError as error:  # JaxRuntimeError, XlaRuntimeError in jax 0.7
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def set_key(key, text):
    """Sets a key of the store, once."""
    _joined().client.key_value_set(key, text)


def list_keys(folder):
    """[(key, text)] of the keys set below a folder of the store."""
    return _joined().client.key_value_dir_get(folder)


def agree(value):
    """Host 0's value, which JSON can hold, on all hosts. Call it in the same order on all: 0.3 ms on one machine."""
    if host_count() == 1:
        return value
    turn, text = next(_turns), json.dumps(value)
    if not is_first():
        return json.loads(read_key(f"onechip/turn/{turn}"))
    set_key(f"onechip/turn/{turn}", text)
    if turn >= FORGOTTEN:
        _joined().client.key_value_delete(f"onechip/turn/{turn - FORGOTTEN}")
    return json.loads(text)


def collect(value):
    """What each host has given, values that JSON can hold: a list by index on host 0, None on the others."""
    place = f"onechip/all/{next(_turns)}"
    set_key(f"{place}/{host_index()}", json.dumps(value))
    return [json.loads(read_key(f"{place}/{i}")) for i in range(host_count())] if is_first() else None


def meet(name):
    """Waits until all hosts are here; they come to all their meetings in the same order."""
    if host_count() > 1:
        collect(name)
        agree(name)


@contextlib.contextmanager
def first_alone():
    """A with block whose body host 0 runs before the others, and they after it. Yields whether this is host 0."""
    if not is_first():
        agree(None)
    yield is_first()
    if is_first():
        agree(None)


def compare_hosts(facts, remedy="start all hosts alike"):
    """UserError, one line, the same on all hosts, if they differ in a dict of JSON values: field, both values, host."""
    if host_count() == 1:
        return
    found = collect(facts)
    if said := agree(name_difference(found, remedy) if found else ""):
        raise UserError(said)


def name_difference(found, remedy):
    """The first field in which a host differs from host 0, as a line; empty if none does. found: a dict by host."""
    for name in dict.fromkeys(itertools.chain(*found)):
        for index, facts in enumerate(found):
            if facts.get(name) != found[0].get(name):
                there, here = facts.get(name), found[0].get(name)
                return f"{name}={here!r} on host 0, but {there!r} on host {index}: {remedy}"
    return ""


def savers():
    """The Hosts that write checkpoints: these. They meet in the threads that write, by keys of their own."""
    if host_count() == 1:
        return ALONE
    return Hosts(host_index(), host_count(), meeting(host_index(), host_count(), set_key, read_key))


# ----------------------------------------------------------------------------------------------------------------------
# Arrays


def spread(tree, sharding):
    """A pytree of NumPy arrays, the same on all hosts, on the devices: each host keeps its own part."""
    import jax

    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, a.__getitem__), tree)


def gathered(tree):
    """A pytree of arrays that each host can read: those that are split over hosts are put together."""
    if host_count() == 1:
        return tree
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def whole(array):
        if array.is_fully_addressable or array.is_fully_replicated:
            return array
        return jax.jit(lambda a: a, out_shardings=NamedSharding(array.sharding.mesh, PartitionSpec()))(array)

    return jax.tree.map(whole, tree)


def on_this_host(tree):
    """A pytree of arrays that are whole on all devices of all hosts, as arrays of this host's devices; no copies."""
    if host_count() == 1:
        return tree
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from onechip.mesh import build_mesh

    here = NamedSharding(build_mesh(jax.local_devices()), PartitionSpec())
    parts = lambda array: {shard.device: shard.data for shard in array.addressable_shards}
    own = lambda array: [parts(array)[device] for device in here.mesh.devices.flat]
    return jax.tree.map(lambda a: jax.make_array_from_single_device_arrays(a.shape, here, own(a)), tree)
