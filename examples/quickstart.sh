#!/usr/bin/env bash
# The same with curl, against a running stack (`make up`): bash examples/quickstart.sh
set -euo pipefail
field() { sed -nE "s/.*\"$1\": ?\"([^\"]*)\".*/\1/p"; }
URL=$(field url < .tunesmith/connection.json)
AUTH="Authorization: Bearer $(field api_key < .tunesmith/connection.json)"

DATA=$(mktemp)
for n in $(seq 0 39); do echo "{\"instruction\": \"Say $n twice.\", \"output\": \"$n $n\"}"; done > "$DATA"
FILE=$(curl -sSf "$URL/v1/files" -H "$AUTH" -F purpose=fine-tune -F "file=@$DATA;filename=twice.jsonl" | field id)

JOB=$(curl -sSf "$URL/v1/fine_tuning/jobs" -H "$AUTH" -H "Content-Type: application/json" -d '{
  "model": "smollm2-135m-instruct", "training_file": "'"$FILE"'", "suffix": "twice"}' | field id)

until curl -sSf "$URL/v1/fine_tuning/jobs/$JOB" -H "$AUTH" | grep -qE '"status":"(succeeded|failed|cancelled)"'; do sleep 1; done
MODEL=$(curl -sSf "$URL/v1/fine_tuning/jobs/$JOB" -H "$AUTH" | field fine_tuned_model)

curl -sSf "$URL/generate" -H "$AUTH" -H "Content-Type: application/json" -d '{
  "instruction": "Say 7 twice.", "parameters": {"adapter_id": "'"$MODEL"'", "max_new_tokens": 20}}'
