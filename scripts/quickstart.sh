#!/usr/bin/env bash
# From nothing to a server: set up, pretrain a small Llama on the text of Python's standard library, tune it on twelve
# tasks, ask it questions, serve it.
#
#   OUTPUT=DIR             folder of models and logs (default: output/quickstart)
#   PRETRAIN_STEPS=N       steps of pretraining (default: 200)
#   TUNING_EPOCHS=N        epochs of instruction tuning, may be a fraction (default: 4)
#   All other variables: setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-$PWD/.venv}
OUTPUT=${OUTPUT:-output/quickstart}
started=$SECONDS

VENV=$VENV bash scripts/setup.sh serve
python=$VENV/bin/python

echo
echo "== 1/5 data (embedded, no download) =="
if [ ! -f "$OUTPUT/data/done" ]; then
  "$python" -m oarlock data embedded --output "$OUTPUT/data"
  touch "$OUTPUT/data/done"
fi

echo
echo "== 2/5 pretraining =="
"$python" llm/run_pretrain.py configs/quickstart/pretrain.yaml \
  --input_dir "$OUTPUT/data/pretrain" --tokenizer_name_or_path "$OUTPUT/data/tokenizer" --output_dir "$OUTPUT/pretrained" \
  ${PRETRAIN_STEPS:+--max_steps "$PRETRAIN_STEPS"}

echo
echo "== 3/5 instruction tuning =="
"$python" llm/finetune_generation.py configs/quickstart/finetune.yaml \
  --model_name_or_path "$OUTPUT/pretrained" --dataset_name_or_path "$OUTPUT/data/instructions" --output_dir "$OUTPUT/tuned" \
  ${TUNING_EPOCHS:+--num_train_epochs "$TUNING_EPOCHS"}

echo
echo "== 4/5 questions =="
"$python" -m oarlock ask "$OUTPUT/tuned" $'Translate to Chinese.\nmountain' $'Repeat the words.\nriver window' $'反义词是什么？\n大' |
  tee "$OUTPUT/answers.txt"

echo
echo "== 5/5 a server =="
bash scripts/quickstart_serve.sh "$python" "$OUTPUT/tuned" "$OUTPUT/served"

"$python" scripts/quickstart_report.py "$OUTPUT" $((SECONDS - started))
