# What every job does around its `srun`: environment, signals, restarts. Sourced by the .sbatch files.
#
#     run_job VERB ARGS...      mlalign doctor, then mlalign VERB ARGS, on one task per GPU of the allocation
#
# The job's directory, $LOG_DIR/<name>-<job id>, holds rank-N.log, and what the ranks leave there (see mlalign/jobs.py):
# `stopped` after a signal, `error-rank-N` after a mistake, `progress` after every save. A chain has its first job's.

site=${MLALIGN_SITE:-$MLALIGN_HOME/slurm/site.env}
# shellcheck source=/dev/null
[ ! -e "$site" ] || source "$site"

say() { echo "$(date +%FT%T) mlalign job $SLURM_JOB_ID: $*"; }

run_job() {
    local verb=$1 dir=${MLALIGN_CHAIN:-${LOG_DIR:-$SLURM_SUBMIT_DIR/logs}/$SLURM_JOB_NAME-$SLURM_JOB_ID} rc
    shift
    export MLALIGN_JOB_DIR=$dir
    mkdir -p "$dir"
    local warned= step=
    trap 'say "warned by USR1: stopping after the step that runs"; warned=yes; [ -z "${step:-}" ] || kill -USR1 $step 2>/dev/null || :' USR1
    trap 'warned=yes; [ -z "${step:-}" ] || kill -TERM $step 2>/dev/null || :' TERM
    prepare_environment
    stage "$@"
    rm -f "$dir/stopped" "$dir"/error-rank-*
    local command=(srun --kill-on-bad-exit=1 --open-mode=append --output="$dir/rank-%t.log" ${SRUN_FLAGS:-})
    case ${CONTAINER_RUNTIME:-none} in
        none) ;;
        pyxis) command+=(--container-image="$CONTAINER" --container-mounts="${CONTAINER_MOUNTS:-$PWD}" --container-workdir="$PWD") ;;
        apptainer) command+=(apptainer exec --nv --bind "${CONTAINER_MOUNTS:-$PWD}" --pwd "$PWD" "$CONTAINER") ;;
        *) say "CONTAINER_RUNTIME is $CONTAINER_RUNTIME, expected none, pyxis or apptainer" && exit 2 ;;
    esac
    say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)): mlalign $verb $* on $SLURM_JOB_NODELIST; logs in $dir"
    local inputs=()
    [ "$verb" != train ] || inputs=("${STAGED[@]}")
    rc=0
    [ "${DOCTOR:-yes}" = no ] || [ -n "$warned" ] || run_step doctor "${inputs[@]}"
    [ -z "$warned" ] || [ -e "$dir/stopped" ] || rc=1 # asked to stop before anything had begun
    [ $rc -ne 0 ] || [ -e "$dir/stopped" ] || run_step "$verb" "${STAGED[@]}"
    unstage
    if [ -e "$dir/stopped" ]; then
        again "stopped by a signal, all is saved"
    elif compgen -G "$dir/error-rank-*" >/dev/null; then
        say "not started again, fix it first: $(head -qn1 "$dir"/error-rank-* | head -1)"
        exit 2
    elif [ $rc -ne 0 ] && [ -n "$warned" ]; then
        again "stopped by a signal before it had begun"
    elif [ $rc -ne 0 ]; then
        after_crash $rc
    else
        rm -f "$dir/progress" "$dir/crashes"
        say "done"
    fi
}

# mlalign ARGS... on all tasks, passing signals on; its exit code is in rc.
run_step() {
    "${command[@]}" python -m mlalign "$@" &
    step=$!
    [ -z "$warned" ] || kill -USR1 $step 2>/dev/null || : # a signal that came just before
    # A trapped signal ends `wait`, not srun: wait again until srun has ended.
    while wait $step && rc=0 || rc=$?; kill -0 $step 2>/dev/null; do :; done
    wait $step && rc=0 || rc=$? # its own exit code, in case the signal came as it ended
    step=
}

prepare_environment() {
    for module in ${MODULES:-}; do module load "$module"; done
    # shellcheck source=/dev/null
    [ -z "${VENV:-}" ] || source "$VENV/bin/activate"
    unset SLURM_EXPORT_ENV # set by --export=NONE, with which the tasks would start without PATH
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # compute nodes have no internet: fetch on the login node, see slurm/README.md
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    # Compiled kernels go to local disk: ranks on a shared file system wait for each other's locks.
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${LOCAL_DIR:-/tmp}/mlalign-$(id -un)/triton}
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-${LOCAL_DIR:-/tmp}/mlalign-$(id -un)/extensions}
    # Tokenised rows too: all ranks of a node map them.
    export MLALIGN_CACHE=${MLALIGN_CACHE:-${LOCAL_DIR:-/tmp}/mlalign-$(id -un)/cache}
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
    # Another port after a restart, so that a taken one does not stop the job for good.
    export MASTER_ADDR MASTER_PORT=$((20000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 10000))
}

# Copies STAGE_DIR to LOCAL_DIR on every node and replaces it by the copy's path in the arguments. The path is the same
# for every job, because a run resumes only with its own paths.
stage() {
    STAGED=("$@")
    [ -n "${STAGE_DIR:-}" ] || return 0
    STAGE_DIR=${STAGE_DIR%/}
    local word before= pattern copy
    for word in "$@"; do
        case $before${word//[\'\"]/}/ in
            "run_dir=$STAGE_DIR"/* | "--output=$STAGE_DIR"/* | "--output$STAGE_DIR"/*)
                say "$before $word lies in STAGE_DIR, whose copy is taken away at the end: write elsewhere" && exit 2 ;;
        esac
        before=
        [ "$word" != --output ] || before=--output
    done
    staged_copy=${LOCAL_DIR:?STAGE_DIR needs LOCAL_DIR, the local disk of a node}/mlalign-$(id -un)
    staged_copy+=/staged-$(cksum <<<"$STAGE_DIR" | cut -d' ' -f1)
    say "staging $STAGE_DIR to $staged_copy"
    on_every_node in
    # Whole paths only: /data does not match the start of /data2, nor the end of /my/data.
    pattern=$(sed 's/[][(){}.*+?^$|\\#]/\\&/g' <<<"$STAGE_DIR")
    copy=$(sed 's/[&#\\]/\\&/g' <<<"$staged_copy")
    STAGED=()
    for word in "$@"; do
        STAGED+=("$(sed -E "s#(^|[]=,[{ '\":])$pattern(/|\$|[],} '\"])#\1$copy\2#g" <<<"$word")")
    done
}

# The next attempt may get other nodes.
unstage() {
    [ -z "${STAGE_DIR:-}" ] || on_every_node out || :
}

on_every_node() {
    srun --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" \
        bash "$MLALIGN_HOME/slurm/stage" "$1" "$STAGE_DIR" "$staged_copy" "$SLURM_JOB_ID"
}

# Starts the job again, unless it is being cancelled or Slurm requeues it itself.
again() {
    # An array's id is also that of its last task, and then means all of them.
    local state job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    state=$(scontrol show job -o "$job" | sed -n 's/.*JobState=\([A-Z]*\).*/\1/p')
    if [ "$state" != RUNNING ]; then
        say "$1; not requeued by this script: the job is $state"
    elif [ "${REQUEUE:-yes}" = yes ]; then
        say "$1: requeued"
        scontrol requeue "$job"
    elif [ -n "${MLALIGN_RESUBMIT:-}" ]; then
        say "$1: the next job of the chain is submitted"
        # Each task of an array has its own chain: the last --array counts.
        local more=--dependency=afterany:$job${SLURM_ARRAY_TASK_ID:+ --array=$SLURM_ARRAY_TASK_ID}
        export MLALIGN_CHAIN=$MLALIGN_JOB_DIR
        eval "sbatch $MLALIGN_RESUBMIT_FLAGS $more $MLALIGN_RESUBMIT"
    else
        say "$1; submit the same command again, REQUEUE is $REQUEUE"
    fi
}

# A rank was killed, or a node was lost: start again, but not forever, and not without progress.
after_crash() {
    local dir=$MLALIGN_JOB_DIR progress count=0
    progress=$(cat "$dir/progress" 2>/dev/null || echo nothing)
    [ ! -e "$dir/crashes" ] || count=$(wc -l <"$dir/crashes")
    if [ "$count" -gt 0 ] && [ "$(tail -1 "$dir/crashes")" = "$progress" ]; then
        say "crashed with exit code $1, twice after the same save ($progress): not started again, see $dir/rank-*.log"
        exit "$1"
    fi
    if [ "$count" -ge "${MAX_CRASHES:-20}" ]; then
        say "crashed with exit code $1 for the $((count + 1))th time, MAX_CRASHES is ${MAX_CRASHES:-20}: not started again"
        exit "$1"
    fi
    echo "$progress" >>"$dir/crashes"
    again "crashed with exit code $1, saved last: $progress"
}
