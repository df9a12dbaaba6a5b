#!/usr/bin/env bash
# One run in several processes on this machine, as on a cluster: for trying things out, and for machines whose
# devices are shared out over processes.
#
#   bash launch/local.sh N VERB [--flag=value …]       such as: bash launch/local.sh 2 train --config=… --workdir=…
#   bash launch/local.sh N sweep [--flag=value …]      a sweep with N workers, each on its share of the machine
#
# On CPU each process has 4 simulated devices; JAX_NUM_CPU_DEVICES changes that. When one process fails, the others
# get DYNREC_GRACE seconds (5) to end by themselves. A training is then started again, and goes on from its newest
# checkpoint, unless it was a user's mistake (status 2); it is given up after DYNREC_RESTARTS starts (3) that brought no
# new checkpoint. Told to stop (SIGTERM, or control-C), it has DYNREC_STOP seconds (60) to have its state on the disk.
# The exit status is that of the first process that failed: 75 of a run that was stopped, and goes on when it is started
# again.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

number="${1:-}"
case "$number" in
  '' | *[!0-9]* | 0*)
    echo "local: found ${number:-nothing}, expected a number of processes: bash launch/local.sh N VERB [--flag=value …]" >&2
    exit 2
    ;;
esac
shift

. "$root/launch/environment.sh"

# A sweep's workers are no processes of one run: each trains trials of its own.
if [ "${1:-}" = sweep ]; then
  shift
  exec dynrec sweep --workers="$number" "$@"
fi

workdir=""
if [ "${1:-}" = train ]; then
  for argument in "$@"; do
    case "$argument" in
      --workdir=* | -workdir=*) workdir="${argument#*=}" ;;
    esac
  done
fi

export JAX_NUM_PROCESSES="$number" JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-4}"

# A pause of a number of seconds without a process of its own, which would be left behind.
exec {silence}<> <(:)
pause() {
  read -rt "$1" -u "$silence" || true
}

processes=()
end_all() {
  kill "-$1" "${processes[@]}" 2>/dev/null || true
}
stop() {
  trap - TERM INT
  end_all TERM # not INT, which the shell has its background processes ignore
  (pause "${DYNREC_STOP:-60}" && end_all KILL) >/dev/null 2>&1 &
  local killer=$! status="$1" each
  for process in "${processes[@]}"; do
    each=0
    wait "$process" 2>/dev/null || each=$?
    [ "$each" -ne 75 ] || status=75
  done
  kill "$killer" 2>/dev/null || true # it must not outlive what it was to kill: numbers are given anew
  exit "$status"
}
trap 'stop 143' TERM
trap 'stop 130' INT

# Starts all of them, and returns when none is left: with the status of the first that failed.
run_all() {
  local index one ended each left=() still=() status=0 reaper=""
  JAX_COORDINATOR_ADDRESS="127.0.0.1:$(python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')"
  export JAX_COORDINATOR_ADDRESS
  processes=()
  for ((index = 0; index < number; index++)); do
    JAX_PROCESS_ID="$index" dynrec "$@" &
    processes+=($!)
  done
  left=("${processes[@]}")
  while [ "${#left[@]}" -gt 0 ]; do
    one=0 ended=""
    wait -n -p ended "${left[@]}" 2>/dev/null || one=$?
    if [ -z "${ended:-}" ]; then # several ended at once, and bash has told of them before it was asked
      ended=""
      for each in "${left[@]}"; do
        kill -0 "$each" 2>/dev/null || ended="$each"
      done
      if [ -z "$ended" ]; then
        pause 0.1
        continue
      fi
      one=0
      wait "$ended" 2>/dev/null || one=$?
    fi
    still=()
    for each in "${left[@]}"; do
      [ "$each" = "$ended" ] || still+=("$each")
    done
    left=("${still[@]}")
    if [ "$one" -ne 0 ] && [ "$status" -eq 0 ]; then
      status="$one"
      # What one process found, it has told the others where it could; none is left behind.
      (pause "${DYNREC_GRACE:-5}" && end_all TERM && pause 2 && end_all KILL) >/dev/null 2>&1 &
      reaper=$!
    fi
  done
  if [ -n "$reaper" ]; then
    kill "$reaper" 2>/dev/null || true
    wait "$reaper" 2>/dev/null || true
  fi
  return "$status"
}

newest() {
  # shellcheck disable=SC2012 # names of checkpoints are numbers
  ls "$workdir/checkpoints" 2>/dev/null | grep -E '^[0-9]+$' | sort -n | tail -n 1 || true
}

vain=0
while true; do
  before="$(newest)" status=0
  run_all "$@" || status=$?
  [ -n "$workdir" ] || exit "$status"
  case "$status" in 0 | 2) exit "$status" ;; esac
  vain=$((vain + 1))
  [ "$(newest)" = "$before" ] || vain=0
  if [ "$vain" -ge "${DYNREC_RESTARTS:-3}" ]; then
    echo "local: status $status; $vain starts brought no new checkpoint, so there is no further one" >&2
    exit "$status"
  fi
  after="$(newest)"
  echo "local: a process ended with status $status; starts again${after:+ from step $after}" >&2
done
