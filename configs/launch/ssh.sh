#!/usr/bin/env bash
# Run a command on several hosts by ssh, one process a host, which takes all GPUs of it:
#
#   configs/launch/ssh.sh node1,node2 python -m affectgpt_jax.check_cluster
#   configs/launch/ssh.sh node1,node2 python -m affectgpt_jax.train \
#       --config=affectgpt_qwen25_7b:48 ...
#
# The hosts let you in without a password, and have this directory, Python and the data under the
# same paths. The first one is the coordinator: all others must reach its port (PORT, 5123). Ends
# with the status of the first process that failed, and takes the others with it.
set -euo pipefail

if (($# < 2)); then
  echo "usage: ${0##*/} HOST1,HOST2,... COMMAND..." >&2
  exit 2
fi
IFS=, read -ra hosts <<<"$1"
shift
program=$(command -v "$1") || { echo "no command $1 here" >&2 && exit 127; }
command=("$program" "${@:2}" "--coordinator_address=${hosts[0]}:${PORT:-5123}"
  "--num_processes=${#hosts[@]}")

processes=()
for i in "${!hosts[@]}"; do
  # With a terminal of its own the remote process ends when ssh does.
  ssh -tt -o BatchMode=yes "${hosts[i]}" \
    "cd $(printf %q "$PWD") && exec $(printf '%q ' "${command[@]}" "--process_id=$i")" \
    </dev/null > >(sed -u "s/^/[$i ${hosts[i]}] /") 2>&1 &
  processes+=($!)
done
trap 'kill "${processes[@]}" 2>/dev/null || true' EXIT
for _ in "${processes[@]}"; do
  wait -n
done
