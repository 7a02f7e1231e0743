"""How a training process ends, for whoever starts it again."""

import os

DIVERGED = os.EX_DATAERR  # 65: too many rollbacks; the log and the audit file say of which batches
PREEMPTED = os.EX_TEMPFAIL  # 75: SIGTERM came and a checkpoint was saved; the same command goes on from it
