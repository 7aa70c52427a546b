"""The system calls that a sandboxed program may make, as a seccomp filter: a list of what is allowed, all else refused.

Numbers from the kernel's asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64); the filter's form: seccomp(2).
There is neither fork nor clone among them, so a program stays one process of one thread; no socket but a pair of its
own; no signal to anybody; nothing that starts a program, changes modes or owners, mounts, traces, or asks for rights.
"""

import struct

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_*, and the column below

# name: (x86_64, aarch64), None where the architecture has no such call
ALWAYS = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "close": (3, 57), "close_range": (436, 436), "lseek": (8, 62), "fstat": (5, 80),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "ftruncate": (77, 46), "fsync": (74, 82),
    "fdatasync": (75, 83), "flock": (73, 32), "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None),
    "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22), "sendto": (44, 206),
    "recvfrom": (45, 207), "shutdown": (48, 210), "getsockname": (51, 204), "getsockopt": (55, 209), "brk": (12, 214),
    "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "madvise": (28, 233),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "setitimer": (38, 103), "getitimer": (36, 102), "alarm": (37, None),
    "pause": (34, None), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getgroups": (115, 158), "uname": (63, 160), "times": (100, 153), "getrusage": (98, 165), "getcpu": (309, 168),
    "getrlimit": (97, 163), "gettimeofday": (96, 169), "time": (201, None), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "getrandom": (318, 278),
    "exit": (60, 93), "exit_group": (231, 94), "wait4": (61, 260), "umask": (95, 166),
}  # fmt: skip

# Calls that take a path: only where mounts or Landlock decide which paths there are.
WITH_FILES = {
    "open": (2, None), "openat": (257, 56), "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None),
    "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None),
    "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "statfs": (137, 43), "fstatfs": (138, 44),
}  # fmt: skip

# name: (x86_64, aarch64), which argument, its values that are allowed
WITH_VALUES = {
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),  # duplicates, flags, locks; not F_SETOWN, which signals
    "ioctl": (
        (16, 29),
        1,
        (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
    ),  # is it a terminal, FIO*
    "prlimit64": ((302, 261), 0, (0,)),  # its own limits only
}
SOCKETPAIR = (53, 199)
CLONE3 = 435

LOAD, EQUAL, AND, RETURN = 0x20, 0x15, 0x54, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # SECCOMP_RET_ALLOW, _ERRNO | errno, _KILL_PROCESS
EPERM, ENOSYS = 1, 38
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; an argument has 8 bytes


def build_filter(machine, with_files):
    """The filter's BPF program, bytes, for a machine as platform.machine() names it; None if it is not known here.

    with_files: whether files may be opened at all.
    """
    if machine not in ARCHITECTURES:
        return None
    architecture, column = ARCHITECTURES[machine]
    program = [_op(LOAD, ARCHITECTURE), _op(EQUAL, architecture, 1, 0), _op(RETURN, KILL), _op(LOAD, NUMBER)]
    for numbers in (ALWAYS | (WITH_FILES if with_files else {})).values():
        if numbers[column] is not None:
            program += [_op(EQUAL, numbers[column], 0, 1), _op(RETURN, ALLOW)]
    for numbers, argument, values in WITH_VALUES.values():
        program += _with_values(numbers[column], argument, values)
    program += _with_socketpair(SOCKETPAIR[column])
    program += [_op(EQUAL, CLONE3, 0, 1), _op(RETURN, REFUSE | ENOSYS)]  # glibc then tries clone, and is refused
    return b"".join([*program, _op(RETURN, REFUSE | EPERM)])


def _op(code, value, if_true=0, if_false=0):
    """One instruction, 8 bytes: struct sock_filter."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _with_values(number, argument, values):
    """A call that is allowed for certain values of an argument's low 32 bits, which are all that the kernel reads."""
    checks = [_op(LOAD, ARGUMENTS + 8 * argument)]
    for value in values:
        checks += [_op(EQUAL, value, 0, 1), _op(RETURN, ALLOW)]
    checks.append(_op(RETURN, REFUSE | EPERM))
    return [_op(EQUAL, number, 0, len(checks)), *checks]


def _with_socketpair(number):
    """A pair of stream sockets, which asyncio needs: both ends are the program's own, and it can address no other."""
    checks = [
        _op(LOAD, ARGUMENTS),
        _op(EQUAL, 1, 0, 4),  # AF_UNIX
        _op(LOAD, ARGUMENTS + 8),
        _op(AND, 0xF),
        _op(EQUAL, 1, 0, 1),  # SOCK_STREAM, whatever its flags
        _op(RETURN, ALLOW),
        _op(RETURN, REFUSE | EPERM),
    ]
    return [_op(EQUAL, number, 0, len(checks)), *checks]
