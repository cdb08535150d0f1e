"""Work that goes on beside its caller: pixels are encoded while the next ones are decoded or sampled."""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

Job = Callable[[], object]


class Beside:
    """One thread that does jobs in the order in which they are given: `with Beside("encoding") as beside: ...`.

    At most one job is at work and one waits; `give` holds the caller up until there is room, so what jobs hold is
    bounded. A job that raises ends the work: those after it are left out, and the caller gets the error from whatever
    it calls next, at the latest from `close`. Jobs see the caller's inference mode and context variables.
    After `close`, and so after the block, there is no thread, and `give` does the job at once.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue(maxsize=1)
        self._failure: BaseException | None = None
        self._failed = False
        self._inference = torch.is_inference_mode_enabled()
        self._thread: threading.Thread | None = threading.Thread(
            target=contextvars.copy_context().run, args=(self._work,), name=name, daemon=True
        )
        self._thread.start()

    def give(self, job: Job) -> None:
        """Do a job behind those given before. Raises what one of those has raised."""
        self.check()
        if self._thread is None:
            job()
        else:
            self._jobs.put(job)

    def check(self) -> None:
        """Raise what a job has raised, once; waits for nothing."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Until all jobs are done. Raises what one has raised."""
        self._jobs.join()
        self.check()

    def close(self) -> None:
        """End the thread when all jobs are done. Raises what one has raised. Closing twice does nothing."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Jobs that were given are done before the block ends, also where it ends with an error, which comes first."""
        try:
            self.close()
        except BaseException as late:
            if error is None:
                raise
            log.warning("beside %r: %s", error, late)

    def _work(self) -> None:
        with torch.inference_mode(self._inference):
            while (job := self._jobs.get()) is not None:
                try:
                    if not self._failed:
                        job()
                except BaseException as error:
                    self._failed, self._failure = True, error
                finally:
                    job = None  # what it holds is free before the next one comes
                    self._jobs.task_done()
            self._jobs.task_done()
