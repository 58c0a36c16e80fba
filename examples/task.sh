#!/usr/bin/env bash
# One task from published data to a comparison and a merged adapter, by the commands of the README:
#
#     examples/task.sh TASK DATA MODEL OUT [a.b=c ...]
#
# TASK is slot_filling, translation or json_extraction. DATA holds massive/, mt/ or uner/, whichever the task needs, and
# tatoeba/. MODEL is a directory or a hub id. a.b=c change the recipe, in all three runs. Run it again after an
# interruption and it goes on. NPROC=2 where there is no GPU; FORMAT=plain for base models; TRAIN_ROWS and TEST_ROWS
# take so many rows per language; examples/tiny_model.py makes a MODEL for a laptop.
set -euo pipefail
task=$1 data=$2 model=$3 out=$4 overrides=("${@:5}")
here=$(cd "$(dirname "$0")/.." && pwd)
case $task in
    slot_filling) corpus=massive folder=massive tokens=64 ;;
    translation) corpus=translation folder=mt tokens=128 ;;
    json_extraction) corpus=uner folder=uner tokens=128 ;;
    *) echo "TASK must be slot_filling, translation or json_extraction" >&2 && exit 2 ;;
esac
train_rows=${TRAIN_ROWS:+--max-rows $TRAIN_ROWS} test_rows=${TEST_ROWS:+--max-rows $TEST_ROWS}
set -x
if [ ! -e "$out/data/task/prepare.json" ]; then
    mlalign prepare $corpus "$data/$folder" "$out/data/task" --format "${FORMAT:-chat}" $train_rows
fi
if [ ! -e "$out/data/bitext/prepare.json" ]; then
    mlalign prepare bitext "$data/tatoeba" "$out/data/bitext" --dev 20 --against "$out/data/task/dev.*.jsonl" \
        --against "$out/data/task/test.*.jsonl" $train_rows
fi

dev= dev_flags=() # rows of languages that have labels, and of no other: so nothing is tuned on a new language
for file in "$out"/data/task/train.*.jsonl; do
    held_out=${file%/*}/dev.${file##*/train.}
    [ ! -e "$held_out" ] || { dev+=${dev:+,}$held_out && dev_flags+=(--dev "$held_out"); }
done
train() {
    "$here/launch/deepspeed.sh" "$here/mlalign/recipes/$task.yaml" "model.path=$model" "run_dir=$out/$1" \
        "task.train=$out/data/task/train.*.jsonl" "task.dev=[$dev]" \
        "alignment.train=$out/data/bitext/train.*.jsonl" "alignment.dev=$out/data/bitext/dev.*.jsonl" "${@:2}"
}
train sft "${overrides[@]}" alignment=null interleave.ratio=1:0
train aligned "${overrides[@]}"
train alignment_only "${overrides[@]}" task=null interleave.ratio=0:1

test() { "$here/launch/torchrun.sh" evaluate "$model" --task "$task" --max-new-tokens $tokens $test_rows "$@"; }
test --test "$out/data/task/test.*.jsonl" --output "$out/test" --adapter "$out/sft" --adapter "$out/aligned"
mlalign compare "$out/test/sft" "$out/test/aligned" --output "$out/compare"

"$here/launch/torchrun.sh" merge "$out/sft" "$out/alignment_only" --output "$out/merged" --weight auto --task "$task" \
    "${dev_flags[@]}" --grid 0,0.25,0.5,0.75,1 --max-new-tokens $tokens $test_rows
test --test "$out/data/task/test.*.jsonl" --output "$out/test/merged" --adapter "$out/merged"
mlalign compare "$out/test/sft" "$out/test/aligned" "$out/test/merged" --output "$out/compare_all"
