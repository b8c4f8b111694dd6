#!/usr/bin/env bash
# Stands for srun: runs as many tasks as --ntasks says, all on this machine, hands SIGTERM on to them, and ends with the
# highest of their codes.
set -u
echo "srun $*" >>"$SLURM_LOG"
while [[ $1 == --* ]]; do
  [[ $1 == --ntasks=* ]] && ntasks=${1#*=}
  [[ $1 == --ntasks-per-node=* ]] && per_node=${1#*=}
  shift
done
pids=()
for ((task = 0; task < ntasks; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % per_node)) "$@" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
highest=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
  wait "$pid"
  code=$?
  ((code > highest)) && highest=$code
done
exit "$highest"
