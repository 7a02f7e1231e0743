#!/usr/bin/env bash
# Since filelock 4, a lock no longer lasts until the last forked worker has ended: it is free once the parent is killed.
#
# Versions: filelock 3.20.0 and 4.2.11, on Linux with the default `FileLock`.
# Valid use: a program takes a lock on its output folder and forks workers that write there, as a process pool does. The
#   parent is killed (out of memory, a scheduler); a worker lives on for a moment. The program is run again.
# Seen: with 3.20.0 the second run waits until the worker has ended, because the worker inherited the open lock file.
#   With 4.2.11 the second run gets the lock at once, while the worker still writes: the library closes the file in every
#   forked process. Neither raises nor warns.
# Whom it hurts: converters and caches that clean their folder after they have got the lock. The old worker then removes
#   or replaces files of the new run, whose result lacks them.
# Remedy: `fcntl.flock` on a file of your own, which forked processes share, or a lock that each worker takes for itself.
# Exits with 0 while this holds, with 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > seen.py <<'PY'
import os
import signal
import time
from pathlib import Path

import filelock

lock, done = Path("lock"), Path("done")
program = os.fork()
if program == 0:
    with filelock.FileLock(lock):
        if os.fork() != 0:
            os.kill(os.getpid(), signal.SIGKILL)  # the parent
        time.sleep(2)  # the worker writes
        done.touch()
        os._exit(0)
os.waitpid(program, 0)
with filelock.FileLock(lock, timeout=30):
    waited = done.exists()
print(f"filelock {filelock.__version__}: the second run got the lock {'after' if waited else 'BEFORE'} the worker's end")
time.sleep(3)
raise SystemExit(10 if waited else 20)
PY
status() {
    python3 -m venv "$folder/$1"
    "$folder/$1/bin/python" -m pip install --disable-pip-version-check --quiet "filelock==$1"
    rm -f lock done
    local code=0
    "$folder/$1/bin/python" seen.py || code=$?
    eval "$2=$code"
}
status 3.20.0 before
status 4.2.11 after
[[ $before == 10 && $after == 20 ]]
