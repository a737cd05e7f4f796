#!/usr/bin/env bash
# Submits a run and what comes after it: pretrain -> convert -> evaluate (an array) -> report. Arguments are those of
# launch/pretrain.py; prints the jobs' numbers. Paths are relative to the repository, wherever it is started.
#
#   TASKS="imagenet,real imagenet_v2 knn:pets" launch/chain.sh --config configs/plain_s16_imagenet1k.yaml [key=value ...]
#
# The run's job is requeued under the same number until DONE, and only then has succeeded (pretrain.sbatch); the others
# wait. If it fails for good, its dependents are cancelled instead of waiting forever; the report is made in any case,
# from what there is. The same command again continues where things stand: a run that is DONE does nothing.
#
# Settings that differ between clusters and runs; account and partition of all jobs: SBATCH_ACCOUNT, SBATCH_PARTITION.
tasks=${TASKS:-}                         # an array element each, separated by spaces; empty: no evaluation
data=${DATA:-data}                       # folder of their data sets
format=${TO:-pretrain}                   # of the converted weights: tools/convert.py --to; timm's and transformers' hold no
                                         # model.representation_size. TO=npz wants OUT=NAME.npz
pretrain_options=${PRETRAIN_OPTIONS:-}   # sbatch's, for example "--nodes=8 --time=12:00:00"
convert_options=${CONVERT_OPTIONS:-}
evaluate_options=${EVALUATE_OPTIONS:-}
report_options=${REPORT_OPTIONS:---ntasks=1 --cpus-per-task=4 --time=00:30:00 --output=%x-%j.out}
set -eEuo pipefail  # E: the trap below holds in functions too
cd "$(dirname "$0")/.."

run=$(python launch/pretrain.py "$@" --print-folder)
converted=${OUT:-$run/converted}
[[ $format != npz || $converted == *.npz ]] || { echo "TO=npz writes a file: give OUT=NAME.npz too" >&2; exit 2; }
jobs=()
cancel() {
  [[ $BASH_SUBSHELL -gt 0 ]] && return  # in $(...), whose failure triggers the trap again outside
  [[ ${#jobs[@]} -eq 0 ]] || { scancel "${jobs[@]}"; echo "not submitted: ${jobs[*]} cancelled" >&2; }
}
trap cancel ERR
stopped=
trap 'stopped=1' INT TERM  # checked when the number of the job being submitted is known
submit() {  # sets `job`; not for $(submit ...), a subshell with `jobs` of its own
  job=$(sbatch --parsable --kill-on-invalid-dep=yes "$@")
  job=${job%%;*}  # a cluster's name may follow
  jobs+=("$job")
  [[ -z $stopped ]] || { cancel; exit 130; }
}
# Options are lists of words, therefore unquoted.
submit $pretrain_options launch/pretrain.sbatch "$@"
echo "pretrain $job: $run"
submit $convert_options --dependency="afterok:$job" launch/convert.sbatch "$run" "$converted" --to "$format" --overwrite
echo "convert  $job: $converted"
if [[ -n $tasks ]]; then
  read -d '' -ra elements <<< "$tasks" || true  # reads all lines; fails at their end
  # The user's options come last, so that their --array=0-9%2, say, counts.
  submit --dependency="afterok:$job" --array=0-$((${#elements[@]} - 1)) $evaluate_options launch/evaluate.sbatch "$tasks" \
    "$converted" --data "$data" --out "$run/evaluation"
  echo "evaluate $job: ${#elements[@]} elements"
fi
quote="'\\''"  # --wrap is run by /bin/sh, which does not know all that printf %q writes
submit --job-name=report $report_options --dependency="afterany:$job" --wrap "python tools/report.py '${run//\'/$quote}'"
echo "report   $job: $run/report"
