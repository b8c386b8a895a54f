#!/usr/bin/env bash
# Train under SLURM, one process a GPU:
#
#   sbatch --nodes=8 configs/launch/slurm.sh --config=affectgpt_qwen25_7b:192 \
#       --workdir=runs/paper --config.llm=/models/Qwen2.5-7B-Instruct \
#       --config.data.train=/records/mercaptionplus
#
# That is the paper's 900,000 clips in batches of 192. By `affectgpt plan`, 64 A100 take under an
# hour for them, 8 (with :24) six hours, and validation beside; nobody has measured it yet. A run
# that reaches the limit below has saved, and the same command goes on.
#
# Everything behind the script's name goes to training. The processes find each other by what srun
# tells them; the same command, or a requeued job, resumes from the newest checkpoint.
#
#SBATCH --job-name=affectgpt
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Preempted jobs start again by themselves.
#SBATCH --requeue
# SIGTERM to the processes, not to this script, two minutes before the end: time to save.
#SBATCH --signal=TERM@120
set -euo pipefail

# One process that fails ends the others, or they would wait for it until the time is up.
run=(srun --kill-on-bad-exit=1)

# Half a minute, against hours in a job that hangs or crawls. CHECK_CLUSTER=0 leaves it out.
if [[ "${CHECK_CLUSTER:-1}" == 1 ]]; then
  "${run[@]}" python -m affectgpt_jax.check_cluster
fi
"${run[@]}" python -m affectgpt_jax.train "$@"
