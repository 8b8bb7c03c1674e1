#!/usr/bin/env bash
# Build a TensorRT engine from a compressed-tensors checkpoint, with a TensorRT-LLM that still has trtllm-build
# (up to 1.2.1; of the release candidates, up to 1.3.0rc20).
#
#   examples/build_engine.sh DIR [WORK [OPTION...]]
#
# DIR is the checkpoint. WORK gets the folders checkpoint and engine; it is ./engine-build by default. Further options
# are passed on to trtllm-build, for instance --max_batch_size 8; they come after those that the model needs, so that
# they decide. TP and PP are the parallel sizes, 1 by default.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: [TP=1] [PP=1] $0 DIR [WORK [OPTION...]]" >&2
  exit 2
fi
directory=$1
work=${2:-engine-build}
tensor=${TP:-1}
pipeline=${PP:-1}
shift $(($# < 2 ? $# : 2))

if ! command -v trtllm-build > /dev/null; then
  echo "trtllm-build is not installed: TensorRT-LLM has it up to 1.2.1. Later releases load the directory that" >&2
  echo "  trtllm-ct convert $directory OUT --to modelopt" >&2
  echo "writes, with trtllm-serve OUT." >&2
  exit 1
fi

mkdir -p "$work"
report=$work/convert.json
if ! trtllm-ct convert "$directory" "$work/checkpoint" --to engine --tp "$tensor" --pp "$pipeline" --overwrite --json \
  > "$report"; then
  cat "$report" >&2
  exit 1
fi
# The directory can't say everything: the report has the arguments that builder and run need beside it, and why.
field() {
  python3 -c 'import json, sys; print(sys.argv[3].join(json.load(open(sys.argv[1]))[sys.argv[2]]))' "$report" "$1" "$2"
}
field warnings $'\n' >&2
build_options=$(field build_options " ")
run_options=$(field run_options " ")
read -r -a build <<< "$build_options"

trtllm-ct verify "$directory" "$work/checkpoint"
trtllm-build --checkpoint_dir "$work/checkpoint" --output_dir "$work/engine" "${build[@]}" "$@"

# run.py is in the folder examples of the sources of the same TensorRT-LLM release.
echo "Run it with: mpirun -n $((tensor * pipeline)) python3 run.py --engine_dir $work/engine" \
  "--tokenizer_dir $directory ${run_options:+$run_options }--max_output_len 32 --input_text 'Hello'"
