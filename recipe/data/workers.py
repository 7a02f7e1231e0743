"""What a loader's worker does about SIGTERM."""

import multiprocessing
import os
import signal
import threading


def obey_only_parent(worker_id: int) -> None:
    """Lets a worker end on a SIGTERM of the process that made it, and on no other; a DataLoader's `worker_init_fn`.

    Schedulers send SIGTERM to all processes at once. torch's workers would end at once, and the run with an error,
    before the batch it is at can be finished and saved.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for, args=(parent.pid,), daemon=True).start()


def _wait_for(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
