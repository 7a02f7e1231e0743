#!/usr/bin/env bash
# Start the processes of one node of a training on several; slurm.sh and pytorchjob.yaml run it on each.
#
#   NODES=8 NODE_RANK=0 GPUS=8 MASTER_ADDR=HOST MASTER_PORT=29500 yamls/launch/node.sh recipe/train.py YAML
#
# NODE_RANK is 0 to NODES - 1, and HOST the node whose NODE_RANK is 0. If a node is lost, the processes of the others
# end by themselves: start all nodes again. The status is that of the first process that failed: 75 if all progress is
# saved, 65 if training diverged, 2 for a mistake in the yaml. A new start repeats the last two.
set -euo pipefail
: "${NODES:?}" "${NODE_RANK:?}" "${GPUS:?}" "${MASTER_ADDR:?}" "${MASTER_PORT:?}"

# A session of its own: a scheduler's SIGTERM must not reach the launcher, which would kill the processes 30 s later.
setsid composer -n "$GPUS" --world_size $((NODES * GPUS)) \
  --node_rank "$NODE_RANK" --base_rank $((NODE_RANK * GPUS)) \
  --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@" &
launcher=$!
trap 'pkill -TERM -P "$launcher" || true' TERM # to its processes: they finish the batch, save and exit with 75

status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do # the signal has ended `wait`, not the launcher
  status=0
  wait "$launcher" || status=$?
done
exit "$status"
