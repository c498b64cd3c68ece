#!/bin/bash
# Trains on two nodes of 8 GPUs, one task per GPU; goes on after time limits, preemption and failures:
#
#     sbatch examples/slurm.sh
#
# Slurm itself requeues a job that it preempts or whose node fails. It does not requeue one that ends
# with a status, so the last lines do, for statuses after which the same command continues.
#SBATCH --job-name=warm-diffusion
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue --open-mode=append

source .venv/bin/activate
statuses=$(mktemp -d statuses.XXXXXX)
srun sh -c 'python main.py --distributed --config=configs/cifar10.py --download --workdir=/shared/runs/cifar10
  status=$?; echo $status > "$0/$SLURM_PROCID"; exit $status' "$statuses"
status=$?
# When one task fails, the others end with 75, and srun returns the highest status: look for the cause.
cause=$(cat "$statuses"/* | grep -m1 -x '[1-4]') && status=$cause
rm -r "$statuses"
case $status in
  74 | 75 | 134) scontrol requeue "$SLURM_JOB_ID" ;; # storage failed, stopped and saved, lost a process
esac
exit $status
