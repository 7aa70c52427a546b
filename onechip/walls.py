"""The walls around a sandboxed program, raised by its own process: namespaces, Landlock, no capabilities, seccomp.

Python's standard library only, and Linux only. Constants are from the kernel's headers, facts from namespaces(7),
mount(2), pivot_root(2), landlock(7), capabilities(7) and seccomp(2).
"""

import ctypes
import os
import platform
import resource
import signal
import socket
import sys

NOBODY = 65534
CALLS = {  # numbers of calls that the C library may not have
    "x86_64": {"pivot_root": 155, "capset": 126},
    "aarch64": {"pivot_root": 41, "capset": 91},
}
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on both
NAMESPACES = 0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000  # user mnt net pid ipc uts
READ_ONLY, NO_SUID, NO_DEVICES, NO_PROGRAMS, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
KEPT_FLAGS = {1: 1, 2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}  # statvfs's to mount's: these are locked
READ_FILE, READ_FOLDER = 1 << 2, 1 << 3
FLAT = (1 << 1) | READ_FILE | READ_FOLDER | (1 << 5) | (1 << 8) | (1 << 14)  # write, remove, make and truncate files
ALL_RIGHTS = {
    1: 0x1FFF,
    2: 0x3FFF,
    3: 0x7FFF,
    4: 0x7FFF,
    5: 0xFFFF,
}  # of files, by Landlock's version; later ones: as 5
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
INSTALLED = ("site-packages", "dist-packages")  # what is installed beside the standard library


class Refused(Exception):
    """A wall that cannot be raised, or that does not hold."""


def call_kernel(name, *arguments):
    """A function of the C library, or a system call by its number; raises OSError as Python's own would."""
    library = ctypes.CDLL(None, use_errno=True)
    if isinstance(name, int):
        arguments, name = (ctypes.c_long(name), *arguments), "syscall"
    done = getattr(library, name)(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done


def die_with_parent():
    """The kernel kills this process when the one that made it ends."""
    call_kernel("prctl", 1, int(signal.SIGKILL), 0, 0, 0)


def enter_namespaces():
    """No network, no user but nobody, mounts of its own from here on; no other process from the next fork on."""
    user, group = os.geteuid(), os.getegid()
    call_kernel("unshare", NAMESPACES)
    for name, text in (("setgroups", "deny"), ("gid_map", f"{NOBODY} {group} 1"), ("uid_map", f"{NOBODY} {user} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount(source, target, kind, flags, data=None):
    """mount(2), with strings."""
    call_kernel("mount", source.encode(), target.encode(), kind and kind.encode(), flags, data and data.encode())


def exposed_folders():
    """Where Python's standard library and the system's shared libraries are: all that can be read."""
    return [path for path in dict.fromkeys([*sys.path, *LIBRARIES]) if os.path.isdir(path)]


def change_root(folder, size):
    """Makes a root of nothing but the exposed folders, read-only, and /tmp, size bytes in memory, and goes there."""
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", folder, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    for path in sorted(exposed_folders()):  # a folder before those in it
        show_folder(path, folder + path)
    os.makedirs(f"{folder}/tmp", exist_ok=True)
    mount("tmpfs", f"{folder}/tmp", "tmpfs", NO_SUID | NO_DEVICES | NO_PROGRAMS, f"size={size},nr_inodes=1000,mode=700")
    mount("none", folder, None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES)
    os.chdir(folder)
    call_kernel(CALLS[platform.machine()]["pivot_root"], b".", b".")
    call_kernel("umount2", b".", 2)  # the old root, which lay over the new one
    os.chdir("/tmp")


def show_folder(path, target):
    """Shows a folder, read-only, without the packages that others have installed in it."""
    os.makedirs(target, exist_ok=True)
    mount(path, target, None, BIND | RECURSIVE)
    kept = sum(flag for bit, flag in KEPT_FLAGS.items() if os.statvfs(target).f_flag & bit)
    mount("none", target, None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES | kept)
    for name in INSTALLED:
        if os.path.isdir(f"{target}/{name}"):
            mount("tmpfs", f"{target}/{name}", "tmpfs", READ_ONLY, "size=4k")


def restrict_files(folder, flat):
    """Landlock: reads the exposed folders, writes in one; no TCP, no signal and no socket to the outside, if it can.

    flat: no folders, links or pipes can be made either.
    """
    version = call_kernel(LANDLOCK_CREATE, None, 0, 1)
    rights = ALL_RIGHTS[min(version, 5)]
    ruleset = (ctypes.c_uint64 * 3)(rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 * (1 + (version >= 4) + (version >= 6))
    rules = call_kernel(LANDLOCK_CREATE, ruleset, size, 0)
    allow_below(rules, folder, rights & (FLAT if flat else FLAT | 0x3FFE))
    for path in exposed_folders():
        allow_below(rules, path, READ_FOLDER)
        for entry in os.scandir(path):
            if entry.name not in INSTALLED:
                allow_below(rules, entry.path, READ_FILE | READ_FOLDER if entry.is_dir() else READ_FILE)
    give_up_new_rights()
    call_kernel(LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def allow_below(rules, path, rights):
    """Adds one of Landlock's rules: struct landlock_path_beneath_attr, packed, 12 bytes. What has gone is left out."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:  # a link to nothing
        return
    try:
        rule = rights.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
        call_kernel(LANDLOCK_ADD, rules, 1, rule, 0)
    finally:
        os.close(descriptor)


def give_up_new_rights():
    """No program that it might start could have more rights than itself; Landlock and seccomp ask for this."""
    call_kernel("prctl", 38, 1, 0, 0, 0)


def drop_capabilities():
    """Gives up whatever being root, here or in the namespace, allows."""
    for number in range(64):
        try:
            call_kernel("prctl", 24, number, 0, 0, 0)  # PR_CAPBSET_DROP
        except OSError:
            break  # not root, or no such capability
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    call_kernel(CALLS[platform.machine()]["capset"], header, nothing)


def limit_resources(request):
    """All but memory, which the setting up still needs. Seconds and bytes."""
    limits = {"CPU": request["cpu"], "FSIZE": request["file_size"], "NOFILE": request["descriptors"]}
    limits |= {"CORE": 0, "NPROC": 1, "MEMLOCK": 0, "MSGQUEUE": 0, "STACK": 8 << 20}
    for name, value in limits.items():
        set_limit(name, value, value + (name == "CPU"))  # the first ends what does not catch it, the second the rest


def set_limit(name, soft, hard):
    """A limit of the system's, or what the caller's own limits leave of it."""
    number = getattr(resource, f"RLIMIT_{name}")
    allowed = resource.getrlimit(number)[1]
    hard = hard if allowed == resource.RLIM_INFINITY else min(hard, allowed)
    resource.setrlimit(number, (min(soft, hard), hard))


def install_filter(program):
    """The seccomp filter, bytes, on this process."""
    buffer = ctypes.create_string_buffer(program, len(program))
    give_up_new_rights()
    call_kernel(
        "prctl", 22, 2, (ctypes.c_uint64 * 2)(len(program) // 8, ctypes.addressof(buffer)), 0, 0
    )  # struct sock_fprog


def check_walls(canary):
    """Tries what must not work: a network, another process, a signal, a file outside. Raises Refused if it does."""
    attempts = {
        "the network can be reached": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close(),
        "files can be read": lambda: os.close(os.open(canary, os.O_RDONLY)),
        "signals can be sent": lambda: os.kill(os.getppid() or 1, 0),
        "processes can be started": lambda: os.fork() or os._exit(0),
    }
    for what, attempt in attempts.items():
        try:
            attempt()
        except OSError:
            continue
        raise Refused(what)


def raise_walls(request):
    """All the walls that the request names, one behind the other, the filter last, since it forbids to raise others."""
    walls = request["walls"]
    steps = [("resource limits", lambda: limit_resources(request))]
    if "namespaces" in walls:
        steps.append(("a root of its own", lambda: change_root(request["folder"], request["disk"])))
    else:
        steps.append(("its folder", lambda: os.chdir(request["folder"])))
    if "landlock" in walls:
        steps.append(("landlock", lambda: restrict_files(os.getcwd(), "namespaces" not in walls)))
    steps.append(("no capabilities", drop_capabilities))
    steps.append(("seccomp", lambda: install_filter(bytes.fromhex(request["filter"]))))
    for name, step in steps:
        try:
            step()
        except OSError as error:
            raise Refused(f"{name}: {error.strerror}") from None
