#!/usr/bin/env bash
# One run in several processes on this machine, as on a cluster: for trying things out, and for machines whose
# devices are shared out over processes.
#
#   bash launch/local.sh N VERB [--flag=value …]       such as: bash launch/local.sh 2 train --config=… --workdir=…
#   bash launch/local.sh N sweep [--flag=value …]      a sweep with N workers, each on its share of the machine
#
# On CPU each process has 4 simulated devices; JAX_NUM_CPU_DEVICES changes that. When one process fails, the others
# get DYNREC_GRACE seconds (15) to end by themselves; the exit status is that of the first that failed.
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

port="$(python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')"
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$number"
export JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-4}"

processes=()
end_all() {
  kill "-$1" "${processes[@]}" 2>/dev/null || true
}
stop() {
  trap - TERM INT
  end_all TERM # not INT, which the shell has its background processes ignore
  (sleep 5 && end_all KILL) >/dev/null 2>&1 &
  local killer=$!
  wait "${processes[@]}" 2>/dev/null || true
  kill "$killer" 2>/dev/null || true # it must not outlive what it was to kill: numbers are given anew
  exit "$1"
}
trap 'stop 143' TERM
trap 'stop 130' INT

for ((index = 0; index < number; index++)); do
  JAX_PROCESS_ID="$index" dynrec "$@" &
  processes+=($!)
done

status=0
for ((left = number; left > 0; left--)); do
  one=0
  wait -n || one=$?
  if [ "$one" -ne 0 ] && [ "$status" -eq 0 ]; then
    status="$one"
    # What one process found, it has told the others where it could; none is left behind.
    (sleep "${DYNREC_GRACE:-15}" && end_all TERM && sleep 5 && end_all KILL) >/dev/null 2>&1 &
    reaper=$!
  fi
done
[ -z "${reaper:-}" ] || kill "$reaper" 2>/dev/null || true
exit "$status"
