"""
The program that runs untrusted code with its tests. It is started as a file, by `code_tests.py`, and imports nothing of
Arriero.

Before it compiles a line of that code, it gives up what the code could misuse, for good:

- resource limits: processor time, memory, size of files, open files, no core dumps;
- root becomes the user `nobody`, or where that user cannot read Python's library, loses all its capabilities;
- Landlock: it may read Python's library and the shared libraries, write into its own directory, and open nothing else;
- seccomp: no sockets, no other processes, no signals, no programs, no namespaces, no changes of owners and modes, no
  system call that is newer than this list.

Where the kernel offers no Landlock or no seccomp it runs nothing, and says so, unless it is told to run unprotected.
What it finds goes to its output, a line for each test, with a prefix that the tested code is not told.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_DUMPABLE = 38, 22, 2, 4
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_NOBODY = 65534

# Rights of Landlock on files (linux/landlock.h), and since which version of its interface they can be handled.
_EXECUTE, _WRITE, _READ, _READ_DIR, _REMOVE_FILE, _MAKE_FILE = 1, 2, 4, 8, 32, 256
_TRUNCATE = 1 << 14
_HANDLED = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
#: TCP (bind, connect), and the scopes of abstract sockets and of signals.
_NETWORK, _SCOPES = 3, 3

#: System calls that are refused: number on x86_64 and on aarch64; 0 where there is none.
_REFUSED: dict[str, tuple[int, int]] = {
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242), "bind": (49, 200),
    "listen": (50, 201), "sendmsg": (46, 211), "sendmmsg": (307, 269), "fork": (57, 0), "vfork": (58, 0),
    "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "msgctl": (71, 187), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191),
    "semtimedop": (220, 192), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "mq_open": (240, 180),
    "ptrace": (101, 117), "syslog": (103, 116), "chroot": (161, 51), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, 0), "ioperm": (173, 0),
    "init_module": (175, 105), "delete_module": (176, 106), "finit_module": (313, 273), "quotactl": (179, 60),
    "acct": (163, 89), "settimeofday": (164, 170), "personality": (135, 92), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "unshare": (272, 97), "setns": (308, 268),
    "perf_event_open": (298, 241), "fanotify_init": (300, 262), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "bpf": (321, 280), "userfaultfd": (323, 282), "memfd_create": (319, 279),
    "seccomp": (317, 277), "prlimit64": (302, 261), "setpriority": (141, 140), "chmod": (90, 0), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, 0), "lchown": (94, 0), "fchown": (93, 55),
    "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "utime": (132, 0),
    "utimes": (235, 0), "futimesat": (261, 0), "utimensat": (280, 88), "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440), "mount_setattr": (442, 442), "quotactl_fd": (443, 443),
    "process_mrelease": (448, 448), "memfd_secret": (447, 447), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
}  # fmt: skip
#: fcntl and ioctl have the kernel signal another process where a file is ready: number, and the commands that do so.
_REFUSED_COMMANDS = (((72, 25), (8, 10, 15)), ((16, 29), (0x8901, 0x8902)))
#: clone, with which threads begin, and sendto: number, and what they are allowed for.
_CLONE, _SENDTO, _CLONE3 = (56, 220), (44, 206), 435
_THREAD = 0x10000
#: Later system calls are unknown here, and refused.
_LAST = 462
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38


class Unconfinable(Exception):
    """The kernel does not offer a part of the confinement; the message says which."""


def confine(directory: str, memory: int, seconds: int, file_bytes: int, *, unprotected: bool) -> None:
    """Give up all rights but those of plain computation. Raises Unconfinable."""
    libc = ctypes.CDLL(None, use_errno=True)
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, seconds + 1),  # the parent ends it before that, with a reason
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_AS, memory),
    ):
        resource.setrlimit(limit, (value, value))
    _drop_root(libc)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 and not unprotected:
        raise Unconfinable("the kernel does not keep it from gaining privileges (no_new_privs)")
    try:
        _landlock(libc, directory)
        _filter(libc)
    except Unconfinable:
        if not unprotected:
            raise


def _drop_root(libc: ctypes.CDLL) -> None:
    if os.geteuid() != 0:
        return
    os.setgroups([])
    os.setegid(_NOBODY)
    os.seteuid(_NOBODY)
    readable = os.access(os.__file__, os.R_OK, effective_ids=True)
    os.seteuid(0)
    os.setegid(0)
    if readable:
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        return
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    header = struct.pack("Ii", 0x20080522, 0)
    libc.capset(header, struct.pack("6I", *[0] * 6))


def _landlock(libc: ctypes.CDLL, directory: str) -> None:
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 3:
        raise Unconfinable("the kernel has no Landlock of version 3 (Linux 6.2) that is turned on")
    handled = sum(rights for since, rights in _HANDLED.items() if since <= version)
    attributes = struct.pack("QQQ", handled, _NETWORK if version >= 4 else 0, _SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        raise Unconfinable("the kernel refuses a Landlock ruleset")
    for path, rights in _paths(directory):
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not Path(path).is_dir():
            rights &= _READ | _WRITE | _TRUNCATE
        rule = struct.pack("<Qi", rights & handled, opened)
        added = libc.syscall(_ADD_RULE, ruleset, 1, rule, ctypes.c_uint32(0))
        os.close(opened)
        if added != 0:
            raise Unconfinable("the kernel refuses a Landlock rule")
    if libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)) != 0:
        raise Unconfinable("the kernel refuses to apply Landlock")
    os.close(ruleset)


def _paths(directory: str) -> Iterator[tuple[str, int]]:
    library = str(Path(os.__file__).resolve().parent)
    for path in (library, f"{sys.base_prefix}/lib", "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo"):
        yield path, _READ | _READ_DIR
    yield directory, _READ | _READ_DIR | _WRITE | _MAKE_FILE | _REMOVE_FILE | _TRUNCATE
    yield from ((path, _READ) for path in ("/dev/urandom", "/etc/ld.so.cache"))
    yield "/dev/null", _READ | _WRITE


def _filter(libc: ctypes.CDLL) -> None:
    architecture = _ARCHITECTURES.get(platform.machine())
    if architecture is None or sys.byteorder != "little":
        raise Unconfinable(f"there is no list of system calls for {platform.machine()}")
    column, audit = architecture
    program: list[tuple[int, int, int, int]] = []
    load, equal, above, refuse = 0x20, 0x15, 0x25, 0x06
    program += [(load, 0, 0, 4), (equal, 1, 0, audit), (refuse, 0, 0, _KILL), (load, 0, 0, 0)]
    program += [(above, 0, 1, _LAST), (refuse, 0, 0, _ERROR | _ENOSYS)]
    program += [(equal, 0, 1, _CLONE3), (refuse, 0, 0, _ERROR | _ENOSYS)]
    for numbers in _REFUSED.values():
        if numbers[column]:
            program += [(equal, 0, 1, numbers[column]), (refuse, 0, 0, _ERROR | _EPERM)]
    for number, commands in _REFUSED_COMMANDS:
        program += [(equal, 0, len(commands) + 3, number[column]), (load, 0, 0, 24)]
        last = len(commands) - 1
        program += [(equal, last - at, 1 if at == last else 0, command) for at, command in enumerate(commands)]
        program += [(refuse, 0, 0, _ERROR | _EPERM), (refuse, 0, 0, _ALLOW)]
    # A new process: its first argument lacks CLONE_THREAD.
    program += [
        (equal, 0, 4, _CLONE[column]),
        (load, 0, 0, 16),
        (0x45, 1, 0, _THREAD),
        (refuse, 0, 0, _ERROR | _EPERM),
        (refuse, 0, 0, _ALLOW),
    ]
    # A datagram to an address: its fifth argument is not null.
    program += [(equal, 0, 6, _SENDTO[column])]
    for offset in (48, 52):
        program += [(load, 0, 0, offset), (equal, 1, 0, 0), (refuse, 0, 0, _ERROR | _EPERM)]
    program += [(refuse, 0, 0, _ALLOW)]
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    filter_ = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filter_, 0, 0) != 0:
        raise Unconfinable("the kernel offers no seccomp filters")


def run(code: str, tests: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Run the code, and each test with what it defined; yields what was found."""
    namespace: dict[str, Any] = {"__name__": "answer", "__builtins__": __builtins__}
    try:
        exec(compile(code, "<answer>", "exec"), namespace)  # noqa: S102 this is what the confinement is for
    except BaseException as error:  # noqa: BLE001 whatever untrusted code raises
        yield {"broken": _said(error)}
        return
    for number, test in enumerate(tests):
        try:
            exec(compile(test["code"], "<test>", "exec"), dict(namespace))  # noqa: S102 as above
        except BaseException as error:  # noqa: BLE001 as above
            yield {"test": number, "error": _said(error)}
        else:
            yield {"test": number}
    yield {"end": True}


def _said(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:  # noqa: BLE001 its text is untrusted code, too
        return "an exception without a readable text"


def main() -> None:
    """Read the task from the input, confine this process, and run it."""
    task = json.loads(sys.stdin.buffer.read())
    os.environ.clear()  # noqa: TID251 the code that is run sees none
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)
    prefix = task.pop("prefix")
    code, tests = task.pop("code"), task.pop("tests")

    def say(found: dict[str, Any]) -> None:
        os.write(report, f"{prefix}{json.dumps(found)}\n".encode("utf-8", "backslashreplace"))

    try:
        confine(**task)
    except Unconfinable as error:
        say({"refused": str(error)})
        return
    except (OSError, ValueError) as error:
        say({"refused": f"the limits cannot be set: {error}"})
        return
    say({"confined": True})
    for found in run(code, tests):
        say(found)
    os._exit(0)


if __name__ == "__main__":
    main()
