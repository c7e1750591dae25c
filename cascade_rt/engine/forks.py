"""Keeps forks out of calls of the engines and the tokenizer, and threads of the parent process out of its children.

A forked child has one thread. A mutex that another thread of the parent held stays locked there, so a fork waits for
calls that other threads are in, and holds new ones off. The threads of a session's pool do not exist in the child: runs
can wait for them, and destroying the session does. So the child keeps such sessions unused and makes its own.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from threading import Condition, get_ident
from time import monotonic
from typing import Any, Protocol
from weakref import WeakSet

LONGEST_WAIT = 60.0
"""Seconds that a fork waits for calls of other threads."""


class Inherits(Protocol):
    """An object that a forked child inherits and has to change before it is used there."""

    def after_fork(self) -> None:
        """Leave to the parent process what the child cannot use; called in the child."""


class Forks:
    """A context manager around a call of a library that has locks or threads: no other thread forks in it.

    It may be entered again by a thread that is in it, and that thread may fork (a signal's handler does both). Entering
    and leaving are each one atomic operation on a list, unless a fork is pending.
    """

    def __init__(self) -> None:
        self._inside: list[int] = []  # threads, once for each time that they have entered
        self._pending = 0  # forks that wait or are going on
        self._changed = Condition()
        self._heirs: WeakSet[Inherits] = WeakSet()
        self._registered = False
        self._tokenizing: int | None = None

    def __enter__(self) -> None:
        """Note the thread; wait while a fork is pending, unless the thread is inside already."""
        thread = get_ident()
        self._inside.append(thread)
        if self._pending and self._inside.count(thread) == 1:
            self._wait_for_forks(thread)

    def __exit__(self, *_: object) -> None:
        """Let a pending fork go on if this was the last call."""
        try:
            self._inside.remove(get_ident())
        except ValueError:  # a fork has given up waiting for it
            return
        if self._pending:
            with self._changed:
                self._changed.notify_all()

    def register(self, heir: Inherits) -> None:
        """Call `heir.after_fork` in forked children as long as the object exists; forks are watched from now on."""
        with self._changed:
            self._heirs.add(heir)
            if not self._registered and hasattr(os, "register_at_fork"):
                self._registered = True
                os.register_at_fork(before=self._before, after_in_parent=self._in_parent, after_in_child=self._in_child)

    def own_tokenizers_threads(self) -> bool:
        """Return whether this process may use the tokenizers library's threads: not if a parent process has."""
        if self._tokenizing is None:
            self._tokenizing = os.getpid()
        return self._tokenizing == os.getpid()

    def _wait_for_forks(self, thread: int) -> None:
        with self._changed:
            while self._pending:
                self._inside.remove(thread)
                self._changed.notify_all()
                self._changed.wait()
                self._inside.append(thread)

    def _before(self) -> None:
        thread, until = get_ident(), monotonic() + LONGEST_WAIT
        with self._changed:
            self._pending += 1
            while any(other != thread for other in tuple(self._inside)):
                if (left := until - monotonic()) <= 0:
                    self._inside = self._own(thread)
                    warnings.warn("forked in a run that does not end; the child may hang", RuntimeWarning, stacklevel=2)
                    return
                self._changed.wait(left)

    def _in_parent(self) -> None:
        with self._changed:
            self._pending -= 1
            self._changed.notify_all()

    def _in_child(self) -> None:
        self._inside = self._own(get_ident())
        self._pending = 0
        self._changed = Condition()  # other threads may wait on the parent's
        for heir in list(self._heirs):
            heir.after_fork()

    def _own(self, thread: int) -> list[int]:
        return [thread] * self._inside.count(thread)


FORKS = Forks()


def never_destroy(inherited: Any) -> None:
    """Keep an object to the end of the process, also where modules are cleared at its end."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
