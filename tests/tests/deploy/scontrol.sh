#!/usr/bin/env bash
# Stands for scontrol: notes what it is asked for, and knows lists of hosts that are separated by commas.
echo "scontrol $*" >>"$SLURM_LOG"
if [[ $1 == show && $2 == hostnames ]]; then tr , '\n' <<<"$3"; fi
