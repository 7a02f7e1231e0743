"""How a training process ends, for whoever starts it again."""

import os

DIVERGED = os.EX_DATAERR  # 65: too many rollbacks; the log and the audit file say of which batches
PREEMPTED = os.EX_TEMPFAIL  # 75: SIGTERM came and all that was done is saved; run the same command again
