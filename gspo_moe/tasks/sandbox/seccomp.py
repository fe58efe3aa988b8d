"""The filter of system calls that a program in the sandbox runs under, as the kernel reads it (seccomp(2), BPF).

What is denied gives EPERM, and clone3, whose flags a filter cannot see, ENOSYS, so that libc takes clone.
"""

from __future__ import annotations

import errno
import platform
import struct

# Of x86_64 and aarch64: what reaches other processes, memory that no limit counts, and the kernel's rarer doors.
DENIED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "perf_event_open": (298, 241),
    "mount": (165, 40),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "pidfd_getfd": (438, 438),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "swapon": (167, 224),
    "reboot": (169, 142),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
}
# Where no namespace of its own keeps the program from the machine's network and processes.
DENIED_WITHOUT_NAMESPACES = {
    "socket": (41, 198),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "setpriority": (141, 140),
}
CLONE, CLONE3, PRLIMIT64 = (56, 220), (435, 435), (302, 261)
NEW_NAMESPACES = 0x7E020000  # flags of clone(2)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # linux/audit.h

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000  # linux/seccomp.h


def call_filter(namespaces: bool) -> bytes:
    """The BPF program of this machine: an array of struct sock_filter; empty for architectures not known here.

    namespaces: the program runs in a network and process namespace of its own.
    """
    column, architecture = ARCHITECTURES.get(platform.machine(), (None, 0))
    if column is None:
        return b""
    denied = DENIED if namespaces else DENIED | DENIED_WITHOUT_NAMESPACES
    permission = ERROR | errno.EPERM
    steps = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    # x32's calls carry this bit.
    steps += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, permission)]
    for numbers in denied.values():
        steps += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, permission)]
    steps += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, ERROR | errno.ENOSYS)]
    steps += [(EQUAL, 0, 3, CLONE[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 0, 5, NEW_NAMESPACES)]
    steps += [(RETURN, 0, 0, permission)]
    # The limits of other processes; 0 is one's own.
    steps += [(EQUAL, 0, 3, PRLIMIT64[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (EQUAL, 1, 0, 0)]
    steps += [(RETURN, 0, 0, permission), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", code, yes, no, value) for code, yes, no, value in steps)
