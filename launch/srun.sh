#!/usr/bin/env bash
# mlalign inside a Slurm allocation: launch/srun.sh CONFIG [a.b=c ...] trains; launch/srun.sh VERB ... runs doctor,
# probe, evaluate, merge or plan. One task per GPU; NPROC=2 chooses the number per node. slurm/*.sbatch are whole jobs
# around it.
set -euo pipefail
case ${1:-} in train | doctor | evaluate | probe | merge | plan) verb=$1 && shift ;; *) verb=train ;; esac
: "${SLURM_JOB_ID:?launch/srun.sh runs inside a Slurm job: use sbatch slurm/train.sbatch, or salloc first}"
nproc=${NPROC:-${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
unset SLURM_EXPORT_ENV # else a job submitted with --export=NONE would start its tasks without PATH
nodes=${SLURM_JOB_NUM_NODES:-1}
# Without --ntasks, the allocation's number of tasks would count.
exec srun --nodes "$nodes" --ntasks $((nodes * nproc)) --ntasks-per-node "$nproc" --kill-on-bad-exit=1 ${SRUN_FLAGS:-} \
    python -m mlalign "$verb" "$@"
