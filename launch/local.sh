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

exec python "$root/launch/local.py" "$number" "$@"
