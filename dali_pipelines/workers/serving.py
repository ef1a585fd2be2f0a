"""The worker's side of a pool: its main function, and what it shares with its parent."""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import struct
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import reduction, util
from typing import Any

import numpy as np

from dali_pipelines.workers.processes import STOPPING, end_with_parent

TASK, _LENGTH = struct.Struct("<q"), struct.Struct("<Q")


@contextmanager
def holding_signals() -> Iterator[None]:
    """Inside the block, signals to a whole job wait. Processes that it starts never get them.

    A worker ignores them only once it has imported everything, and Ctrl-C before that would leave a traceback.
    """
    held: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # it runs the handlers, whichever thread gets a signal
        numbers = [number for number in STOPPING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        handlers = {number: signal.signal(number, lambda signum, _: held.append(signum)) for number in numbers}
    old = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for signum in held:
            signal.raise_signal(signum)


class SharedMemory:
    """Anonymous shared memory. Worker processes get it as an argument.

    doing   int64 [W]: the task of each worker plus one, or 0
    stop    int64 [1]: 1 where workers must not begin another task
    work    pickled
    room    for results
    """

    def __init__(self, fd: int, num_workers: int, work_bytes: int, room_bytes: int) -> None:
        self.fd, self.sizes = fd, (num_workers, work_bytes, room_bytes)
        head_bytes = num_workers * 8 + 8
        start = -(-(head_bytes + work_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(fd, start + max(room_bytes, 1))
        memory = memoryview(mmap.mmap(fd, 0))
        head = np.frombuffer(memory[:head_bytes], np.int64)
        self.doing, self.stop = head[:-1], head[-1:]
        self.work = memory[head_bytes : head_bytes + work_bytes]
        self.room = memory[start : start + room_bytes]

    @classmethod
    def allocate(cls, num_workers: int, work: bytes, room_bytes: int) -> SharedMemory:
        try:
            memory = cls(os.memfd_create("tgmae"), num_workers, len(work), room_bytes)
        except OSError as error:  # such as a limit on the size of files (ulimit -f), which counts here too
            raise OSError(error.errno, error.strerror, "memory that worker processes share") from error
        memory.work[:] = work
        util.Finalize(memory, os.close, args=(memory.fd,))
        return memory

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_memory, (reduction.DupFd(self.fd), *self.sizes)


def _open_memory(fd: Any, *sizes: int) -> SharedMemory:
    return SharedMemory(fd.detach(), *sizes)


class Inbox:
    """Reads pickled messages from a pipe without waiting for the rest of one: its writer may be stopped or dead."""

    def __init__(self, reader: Any) -> None:
        self.reader, self.fd = reader, reader.fileno()
        os.set_blocking(self.fd, False)
        self.buffer = bytearray()

    def read(self) -> list[Any]:
        """Return the messages that have arrived whole."""
        while True:
            try:
                chunk = os.read(self.fd, 1 << 20)
            except BlockingIOError:
                break
            if not chunk:
                break
            self.buffer += chunk
        messages = []
        while len(self.buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self.buffer)[0]
            if len(self.buffer) < end:
                break
            messages.append(pickle.loads(self.buffer[_LENGTH.size : end]))
            del self.buffer[:end]
        return messages


def serve(place: int, memory: SharedMemory, tasks: Any, results: Any) -> None:
    """Work in a worker process until the pipe of tasks has an end."""
    end_with_parent()
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    work = pickle.loads(memory.work)
    while data := os.read(tasks.fileno(), TASK.size):
        if memory.stop[0]:
            break
        (task,) = TASK.unpack(data)
        memory.doing[place] = task + 1
        try:
            message = pickle.dumps((task, work(task, memory.room), None))
        except Exception as error:
            message = _dump_error(task, error)
        left = memoryview(_LENGTH.pack(len(message)) + message)
        while left:
            left = left[os.write(results.fileno(), left) :]
        memory.doing[place] = 0


def _dump_error(task: int, error: Exception) -> bytes:
    text = traceback.format_exc()
    try:
        pickle.loads(message := pickle.dumps((task, error, text)))
    except Exception:  # whatever an exception holds that cannot travel
        return pickle.dumps((task, RuntimeError(str(error)), text))
    return message
