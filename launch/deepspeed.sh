#!/usr/bin/env bash
# mlalign on this machine: launch/deepspeed.sh CONFIG [a.b=c ...] trains; launch/deepspeed.sh VERB ... runs doctor,
# probe, evaluate, merge or plan. Uses all GPUs, or one process if there is none; NPROC=2 chooses the number. Repeat the
# command to resume.
set -euo pipefail
case ${1:-} in train | doctor | evaluate | probe | merge | plan) verb=$1 && shift ;; *) verb=train ;; esac
nproc=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c "from mlalign.launchers import threads; print(threads($nproc))")}
port=${MASTER_PORT:-$(python -c 'from mlalign.launchers import free_port; print(free_port())')} # the default, 29500, is every job's
where=(--num_accelerators "$nproc")
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ] && [ "${DS_ACCELERATOR:-}" != cpu ] &&
    [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -gt 0 ]; then # given a number, the launcher ignores it
    visible=${CUDA_VISIBLE_DEVICES// /}
    if ! [[ $visible =~ ^([0-9]+,){$((nproc - 1))}[0-9]+(,|$) ]]; then
        echo "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES is no list of $nproc numbers: use launch/torchrun.sh, or another NPROC" >&2
        exit 2
    fi
    where=(--include "localhost:$(cut -d, -f"1-$nproc" <<<"$visible")")
fi
exec deepspeed --master_port "$port" "${where[@]}" --no_local_rank --log_level error --module mlalign "$verb" "$@"
