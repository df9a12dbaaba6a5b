#!/usr/bin/env bash
# The whole line once, on a built-in dataset or a real one: prepare, train, evaluate, score, a picture.
#
#   bash launch/quickstart.sh [KIND:PATH]      such as movielens:path/to/ml-1m; default: the synthetic set
#
# Writes quickstart/{dataset,workdir,scores,interests.png} in the folder it is called from. Called again, it goes
# on from what is there.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source="${1:-synthetic:users=2000,items=1000,seed=0}"

. "$root/launch/environment.sh"

say() { printf '\n== %s\n' "$*"; }

if [ -e quickstart/source ] && [ "$(cat quickstart/source)" != "$source" ]; then
  echo "quickstart: quickstart/ here was made from $(cat quickstart/source); move it away to start from $source" >&2
  exit 2
fi
began=$SECONDS

say "prepare: $source"
if [ -e quickstart/dataset/dataset.json ]; then
  echo "quickstart/dataset is there"
else
  dynrec prepare --source="$source" --out=quickstart/dataset
fi
printf '%s\n' "$source" >quickstart/source

say "train: experiments/quickstart.py"
dynrec train --config="$root/experiments/quickstart.py" --workdir=quickstart/workdir

say "evaluate: the test targets, whole catalogue"
dynrec evaluate --workdir=quickstart/workdir --split=test

say "score: 10 recommendations for every user"
dynrec score --workdir=quickstart/workdir --out=quickstart/scores --k=10 --filter_seen

say "picture: one user's interests over time"
python -m dynrec_jax.report.picture --workdir=quickstart/workdir --out=quickstart/interests.png ||
  echo "no picture: it needs times, and a topic, genre or category of the items"

cat <<TEXT

Done in $((SECONDS - began)) s. In quickstart/ here:
  dataset/         the prepared histories, plain Parquet
  workdir/         config, metrics.jsonl, checkpoints, evaluation/test.json
  scores/          user_id, item_ids, scores: python -c "import duckdb; duckdb.sql(\"from 'quickstart/scores/*.parquet'\").show()"
  interests.png    what the model thinks a user wants, month by month

Next, with your own log (a CSV with the columns user,item,time):
  . "$root/launch/environment.sh"
  dynrec prepare --source=table:log.csv --out=data/mine
  dynrec train --config="$root/experiments/default.py:mine" --workdir=runs/mine
  dynrec evaluate --workdir=runs/mine && dynrec score --workdir=runs/mine --out=recommendations --k=100
TEXT
