#!/usr/bin/env bash
# A killed rank of Composer with checkpoints in a store leaves a process behind that never ends, with torch in its memory.
#
# Versions: mosaicml 0.32.1, with the torch 2.7 that it installs.
# Valid use: `CheckpointSaver(folder="s3://...")`, as `Trainer(save_folder="s3://...")` makes one on each rank; then the
#   rank is killed, as by the system when memory runs out, or by a cluster's scheduler.
# Seen: `RemoteUploader.__init__` starts a process for `Manager().Event()`, one flag. It is spawned, so it imports the
#   main script and with it torch and Composer: about 0.6 GB and some seconds of a core per rank, before anything is
#   uploaded. Nothing ends it but the rank's own exit. Half a minute after a SIGKILL of the rank it is there and waits.
# Whom it hurts: a job that a loop starts again after each kill. On a machine of 8 ranks each kill takes gigabytes for
#   good, until the machine itself runs out of memory.
# Remedy: make the saver while the spawn context's `Manager` gives a `threading.Event`; the flag is read by other
#   processes only in Composer's wait for the symlink of the newest checkpoint, which ends without it too.
# Exits with 0 while this holds, with 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet 'mosaicml==0.32.1' 'setuptools<81'
cd "$folder"
cat > rank.py <<'PY'
import time

from composer.callbacks import CheckpointSaver

if __name__ == "__main__":
    saver = CheckpointSaver(folder="s3://bucket/run")
    print("ready", flush=True)
    time.sleep(600)
PY
cat > seen.py <<'PY'
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def members(group):
    """The processes of a group that have not ended, with their memory in MB."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group, *_ = stat.read_text().rpartition(")")[2].split()
            status = (stat.parent / "status").read_text().splitlines()
        except OSError:
            continue
        if int(process_group) == group and state != "Z":
            memory = [line.split()[1] for line in status if line.startswith("VmRSS")]
            found[int(stat.parent.name)] = int(memory[0]) // 1000 if memory else 0
    return found


rank = subprocess.Popen(
    [sys.executable, "rank.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
)
assert rank.stdout.readline() == "ready\n"
time.sleep(1)
before = members(rank.pid)
rank.kill()
rank.wait()
time.sleep(30)
after = members(rank.pid)
for process in after:
    os.kill(process, signal.SIGKILL)
print(f"processes before the kill: {len(before)}, of {sorted(before.values())} MB")
print(f"30 s after the SIGKILL of the rank: {len(after)}, of {sorted(after.values())} MB")
sys.exit(int(not any(size > 100 for size in after.values())))
PY
CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 "$folder/venv/bin/python" seen.py
