#!/usr/bin/env bash
# mlalign on this machine: launch/torchrun.sh CONFIG [a.b=c ...] trains; launch/torchrun.sh VERB ... runs doctor, probe,
# evaluate, merge or plan. Uses all GPUs, or one process if there is none; NPROC=2 chooses the number. Repeat the
# command to resume.
# On several hosts: the same command on each, after NNODES=2 MASTER_ADDR=HOST; HOST is one of them.
set -euo pipefail
case ${1:-} in train | doctor | evaluate | probe | merge | plan) verb=$1 && shift ;; *) verb=train ;; esac
nproc=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c "from mlalign.launchers import threads; print(threads($nproc))")}
# After SIGTERM, ranks finish their step and save; torchrun would kill them after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
meeting=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
    : "${MASTER_ADDR:?NNODES=$NNODES needs MASTER_ADDR, the name of one of the hosts}"
    meeting=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id mlalign --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}")
fi
exec torchrun "${meeting[@]}" --nproc-per-node "$nproc" -m mlalign "$verb" "$@"
