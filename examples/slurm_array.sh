#!/usr/bin/env bash
# One model to a task, one GPU to a task, on as many nodes as Slurm gives:
#
#     sbatch --array=0-2 examples/slurm_array.sh CALIBRATION OUT MODEL MODEL MODEL
#
# OUT must be on a volume that every node sees. Two minutes before the time is over, Slurm sends
# SIGTERM; rilq keeps its state and exits with 75, and the task is queued again and goes on, on
# whatever node comes.
#SBATCH --job-name=rilq
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
set -u
calibration=$1 out=$2
shift 2
models=("$@")
model=${models[$SLURM_ARRAY_TASK_ID]}
srun rilq convert "$model" --bits 2 --rank 16 --dataset "$calibration" \
    --output-dir "$out/$(basename "$model")"
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
