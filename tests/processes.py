"""Real processes: some that train together, some that are killed."""

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any


def in_processes(work: Callable[[], object], count: int = 2) -> list[Any]:
    """Call `work` in that many processes of one group, as torchrun starts them. -> what it returned, by rank.

    The processes are forked: the libraries are imported already, which takes a launched process ten seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    members = [context.Process(target=_member, args=(work, rank, count, port, answers)) for rank in range(count)]
    for member in members:
        member.start()
    try:
        found = dict(answers.get(timeout=120) for _ in members)
    finally:
        for member in members:
            member.join(20)
            member.kill()
    failed = [answer for answer in found.values() if isinstance(answer, str) and answer.startswith("Traceback")]
    assert not failed, failed[0]
    return [found[rank] for rank in range(count)]


def _member(work: Callable[[], object], rank: int, count: int, port: str, answers: Any) -> None:
    from accelerate.state import AcceleratorState, PartialState

    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in group.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"})
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        answer = work()
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
    except BaseException:
        answer = traceback.format_exc()
    answers.put((rank, answer))
    answers.close()
    answers.join_thread()
    os._exit(0)


def killed(work: Callable[[], object], ready: Callable[[str, tuple[Any, ...]], bool]) -> bool:
    """Call `work` in a forked process that is killed at the first audit event for which `ready` holds. -> whether it was."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if ready(event, details):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        work()
    finally:
        os._exit(0)
