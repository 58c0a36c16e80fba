#!/usr/bin/env bash
# mlalign on all hosts of an MPI allocation: launch/mpirun.sh CONFIG [a.b=c ...] trains; launch/mpirun.sh VERB ... runs
# doctor, probe, evaluate, merge or plan. On every host, one process per GPU of this host; NPROC=2 chooses the number
# per host. Repeat the command to resume.
# MPIRUN_FLAGS adds your own, such as "--hostfile hosts" or "--mca btl_tcp_if_include ib0".
set -euo pipefail
case ${1:-} in train | doctor | evaluate | probe | merge | plan) verb=$1 && shift ;; *) verb=train ;; esac
nproc=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c "from mlalign.launchers import threads; print(threads($nproc))")}
[ "$(id -u)" = 0 ] && MPIRUN_FLAGS="--allow-run-as-root ${MPIRUN_FLAGS:-}"
# shellcheck disable=SC2086  # the flags are words
exec mpirun --map-by "ppr:$nproc:node:OVERSUBSCRIBE" --bind-to none ${MPIRUN_FLAGS:-} \
    python -m mlalign "$verb" "$@"
