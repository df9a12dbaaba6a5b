#!/usr/bin/env bash
# One run on a Cloud TPU slice, or on several: asks for the machines, installs this clone's commit on every worker,
# runs, shows the logs, asks again when the machines are taken away, and gives them back at the end.
#
#   bash launch/tpu_vm.sh --name=NAME --zone=ZONE --type=v5litepod-16 [option …] -- VERB [--flag=value …]
#
#   --slices=N        slices of that type, joined by the data centre's network; default 1
#   --version=NAME    runtime of the machines; default v2-alpha-tpuv5-lite
#   --project=ID      if not gcloud's own
#   --spot            cheaper machines, which may be taken away
#   --nfs=HOST:/PATH  a share (Filestore) that every worker mounts at /data: for datasets and run folders
#   --commit=REV      of this clone; default HEAD. What is not committed is not run
#   --restarts=N      how many faults in a row are started again; default 10. Preemptions are not counted
#   --keep            leaves the machines at the end: they cost until
#                     gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
#   --dry_run         prints every command instead of running it
#
# Needs gcloud, logged in, with ssh to the project's machines. The exit status is that of dynrec.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
say() { printf 'tpu_vm: %s\n' "$*" >&2; }
refuse() {
  say "$*"
  exit 2
}

# Part 1: what every worker does, in the folder that this clone was unpacked to.
worker() {
  local nfs="$1" index endpoints hosts workers slices slice first pid told="" status=0 old
  shift
  # An attempt whose connection broke may still hold the chips.
  if [ -f ../pid ] && old="$(cat ../pid)" && tr '\0' ' ' <"/proc/$old/cmdline" 2>/dev/null | grep -q dynrec; then
    kill -KILL "$old" || true
  fi
  metadata() {
    curl --silent --fail --header 'Metadata-Flavor: Google' \
      "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
  }
  of_slices() { { metadata tpu-env || true; } | sed -n "s/^$1: *'\(.*\)'\$/\1/p"; }
  if [ -n "$nfs" ] && ! mountpoint -q /data; then
    command -v mount.nfs >/dev/null || sudo apt-get install --yes --quiet nfs-common
    sudo mkdir -p /data
    sudo mount -t nfs "$nfs" /data
  fi
  if [ -z "${DYNREC_ACTIVATE:-}" ]; then
    export DYNREC_EXTRAS=tpu DYNREC_VENV="$HOME/dynrec/venv"
    # The machines' own Python may be older than the package wants.
    if [ ! -x "$DYNREC_VENV/bin/python" ] && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --seed --python=3.12 "$DYNREC_VENV"
    fi
    # shellcheck source=launch/environment.sh
    . launch/environment.sh
  else
    # shellcheck disable=SC1090
    . "$DYNREC_ACTIVATE"
  fi
  # As JAX finds it: workers of a slice are numbered in the order of this list, and slices by their own number.
  index="$(metadata agent-worker-number)"
  endpoints="$(metadata worker-network-endpoints)"
  IFS=, read -r -a hosts <<<"$endpoints"
  workers="${#hosts[@]}"
  slices="$(of_slices MEGASCALE_NUM_SLICES)"
  slice="$(of_slices MEGASCALE_SLICE_ID)"
  first="$(of_slices MEGASCALE_COORDINATOR_ADDRESS)"
  first="${first%%:*}"
  export JAX_NUM_PROCESSES=$((workers * ${slices:-1}))
  export JAX_PROCESS_ID=$((${slice:-0} * workers + index))
  export JAX_COORDINATOR_ADDRESS="${first:-${hosts[0]##*:}}:8482" # an entry is name:number:address, or an address
  dynrec "$@" &
  pid=$!
  echo "$pid" >../pid
  trap 'told=1; kill -TERM "$pid"' TERM
  wait "$pid" || status=$?
  if [ -n "$told" ]; then # the signal ended the waiting, not the run, which is saving
    status=0
    wait "$pid" || status=$?
  fi
  echo "dynrec-exit: $status"
}
if [ "${1:-}" = --worker ]; then
  shift
  worker "$@"
  exit 0
fi

# Part 2: on the machine that it was called on.
name="" zone="" type="" slices=1 version=v2-alpha-tpuv5-lite project="" spot="" nfs="" commit=HEAD restarts=10 keep="" dry=""
while [ "$#" -gt 0 ]; do
  case "$1" in
    --name=* | --zone=* | --type=* | --slices=* | --version=* | --project=* | --nfs=* | --commit=* | --restarts=*)
      flag="${1%%=*}"
      printf -v "${flag#--}" '%s' "${1#*=}"
      ;;
    --spot) spot=1 ;;
    --keep) keep=1 ;;
    --dry_run) dry=1 ;;
    --)
      shift
      break
      ;;
    *) refuse "$1: unknown; expected --name= --zone= --type= [option …] -- VERB [--flag=value …] (see the head of this file)" ;;
  esac
  shift
done
[ "$#" -gt 0 ] || refuse "no verb; expected -- VERB [--flag=value …] at the end"
check() { # what, its value, what it must look like
  [[ "$2" =~ ^($3)$ ]] || refuse "--$1=$2: expected $4"
}
check name "$name" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "lower-case letters, digits and hyphens, 40 at most, beginning with a letter"
check zone "$zone" '[a-z0-9-]+' "a zone such as us-west4-a"
check type "$type" '[a-z0-9-]+' "an accelerator type such as v5litepod-16"
check version "$version" '[a-z0-9.-]+' "a runtime version such as v2-alpha-tpuv5-lite"
check project "$project" '|[a-z0-9:.-]+' "a project's id"
check slices "$slices" '[1-9][0-9]{0,3}' "a number"
check restarts "$restarts" '[0-9]{1,6}' "a number"
check nfs "$nfs" '|[A-Za-z0-9.-]+:/[A-Za-z0-9_./-]*' "HOST:/PATH"
sha="$(git -C "$root" rev-parse --verify --quiet "$commit^{commit}")" || refuse "--commit=$commit: no commit of $root"

export CLOUDSDK_CORE_DISABLE_PROMPTS=1 # it is never asked anything
where=(--zone="$zone" ${project:+--project="$project"})
act() { # runs a command, or shows it
  local words
  if [ -n "$dry" ]; then
    printf -v words '%q ' "$@"
    echo "${words% }"
  else
    "$@"
  fi
}
nodes=("$name")
several=()
if [ "$slices" -gt 1 ]; then
  several=(--node-prefix="$name" --node-count="$slices")
  for ((i = 0; i < slices; i++)); do nodes[i]="$name-$i"; done
else
  several=(--node-id="$name")
fi
resource() { act gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
state() { gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || true; }

scratch=/tmp/dynrec
[ -n "$dry" ] || scratch="$(mktemp -d)"
running=()
finish() {
  local group
  trap - EXIT INT TERM
  for group in "${running[@]}"; do kill -- "-$group" 2>/dev/null || true; done
  if [ -z "$keep" ] && [ -n "$asked" ]; then
    say "giving $name back"
    resource delete --force --quiet || say "$name is NOT given back, and costs: see gcloud compute tpus queued-resources list"
  fi
  [ -n "$dry" ] || rm -rf "$scratch"
}
asked=""
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

obtain() { # waits until the machines are there
  local seen=""
  [ -n "$dry" ] || seen="$(state)"
  asked=1
  while [ "$seen" != ACTIVE ]; do
    case "$seen" in
      FAILED)
        say "$name: the request failed; see: gcloud compute tpus queued-resources describe $name ${where[*]}"
        exit 1
        ;;
      "" | SUSPENDED) # not asked for yet, or taken away
        [ -z "$seen" ] || resource delete --force --quiet
        resource create --accelerator-type="$type" --runtime-version="$version" "${several[@]}" ${spot:+--spot}
        ;;
    esac
    [ -z "$dry" ] || return 0
    sleep "${DYNREC_POLL:-30}"
    [ "$(state)" = "$seen" ] || say "$name: $(state)"
    seen="$(state)"
  done
}

attempt() { # one start on all workers of all slices; its exit status
  local command node start group status=0 lost=""
  act git -C "$root" archive --format=tar.gz --output="$scratch/dynrec-$sha.tar.gz" "$sha" || return 1
  command="mkdir -p dynrec/$sha && tar -xzf dynrec-$sha.tar.gz -C dynrec/$sha && cd dynrec/$sha && exec bash launch/tpu_vm.sh --worker"
  command="$command $(printf '%q ' "$nfs" "$@")"
  running=()
  for node in "${nodes[@]}"; do
    act gcloud compute tpus tpu-vm scp "$scratch/dynrec-$sha.tar.gz" "$node:" "${where[@]}" --worker=all || return 1
  done
  for node in "${nodes[@]}"; do
    start=(gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$command")
    start+=(--ssh-flag=-oServerAliveInterval=30) # or a machine that is gone would be waited for
    if [ -n "$dry" ]; then
      act "${start[@]}"
    else
      set -m # each in a process group of its own, which can be ended
      "${start[@]}" 2>&1 | tee "$scratch/$node.log" | sed -u "s/^/$node: /" &
      running+=($!)
      set +m
    fi
  done
  [ -z "$dry" ] || return 0
  for group in "${running[@]}"; do wait "$group" || lost=1; done
  running=()
  status="$(cat "$scratch"/*.log | sed -n 's/.*dynrec-exit: \([0-9][0-9]*\)$/\1/p' | sort -n | tail -n 1)"
  [ -z "$lost" ] || [ "${status:-0}" -ne 0 ] || status=1 # a connection broke: nobody said why
  return "${status:-1}"
}

faults=0
while :; do
  obtain
  status=0
  attempt "$@" || status=$?
  case "$status" in
    0 | 2) break ;;
    75) faults=0 ;;
    *)
      sleep "${DYNREC_POLL:-30}" # until it shows whether the machines were taken away
      [ "$(state)" != ACTIVE ] || faults=$((faults + 1))
      ;;
  esac
  say "status $status"
  if [ "$faults" -gt "$restarts" ]; then
    say "more than $restarts faults in a row; not started again (the same command goes on from the last checkpoint)"
    break
  fi
done
exit "$status"
