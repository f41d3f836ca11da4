"""Locks of open files, which the system takes back when a process ends, however it ends.

``flock`` of the standard library, and no lock that is a file's being there: that one would outlive a killed process. It
goes without where the system or the file system knows none.
"""

from __future__ import annotations

import errno
import time

_POLL_SECONDS = 0.005
# What file systems say that have no such locks, or none of directories.
_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}


def wait_for_lock(descriptor: int, seconds: float) -> bool:
    """Whether the lock of an open file is this process's, until the file is closed, within so many seconds.

    Raises:
        OSError: the file system has locks, and failed.
    """
    deadline = time.monotonic() + seconds
    while not _locked(descriptor):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _locked(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # no POSIX system
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    return True


__all__ = ["wait_for_lock"]
