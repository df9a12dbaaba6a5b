# Sourced by the scripts beside it: makes and activates the virtual environment, with the package in it.
#
#   DYNREC_VENV    where it is; default: .venv in the repository
#   DYNREC_EXTRAS  extras of pyproject.toml to install, separated by commas ("test", "gpu,tensorboard")
#
# Installs only when pyproject.toml has changed or an extra is missing. Returns 1 after one line on standard error
# when it cannot.

_dynrec_find_python() {
  local candidate without_venv=""
  for candidate in python3.13 python3.12 python3.11 python3; do
    # Being on the PATH is not enough: the shims of version managers are there and fail when they are run.
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      echo "$candidate"
      return 0
    fi
    without_venv="$candidate"
  done
  if [ -n "$without_venv" ]; then
    echo "launch: $without_venv lacks the venv module; install it (Debian and Ubuntu: apt install $without_venv-venv)" >&2
  else
    echo "launch: no Python 3.11 or newer found as python3.13, python3.12, python3.11 or python3; install one" >&2
  fi
  return 1
}

_dynrec_make() {
  local venv="$1" python
  [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 && return 0
  if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv" 2>/dev/null || echo file)" ]; then
    echo "launch: $venv exists and is no virtual environment; move it away or set DYNREC_VENV" >&2
    return 1
  fi
  python="$(_dynrec_find_python)" || return 1
  echo "launch: making the virtual environment $venv with $("$python" --version)"
  rm -f "$venv/dynrec.stamp"
  "$python" -m venv "$venv" || {
    echo "launch: $python -m venv $venv failed (see above)" >&2
    return 1
  }
}

_dynrec_install() {
  local root="$1" venv="$2" extras="$3" stamp="$2/dynrec.stamp" key old_key="" old_extras="" extra missing=""
  # The root belongs to the key: an editable install points at it, and a moved clone would import from nowhere.
  key="$({ echo "$root"; cat "$root/pyproject.toml"; } | cksum | tr ' ' -)"
  [ -f "$stamp" ] && { read -r old_key && read -r old_extras; } <"$stamp"
  for extra in ${extras//,/ }; do
    case ",$old_extras," in *",$extra,"*) ;; *) missing="$missing,$extra" ;; esac
  done
  [ "$key" = "$old_key" ] && [ -z "$missing" ] && return 0
  extras="$old_extras$missing"
  extras="${extras#,}"
  echo "launch: installing dynrec_jax${extras:+ [$extras]} into $venv (the first time takes a few minutes)"
  rm -f "$stamp"
  # Most modules are never imported: they are compiled when they are, which halves the time that this takes.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
    --editable "$root${extras:+[$extras]}" || {
    echo "launch: installing into $venv failed (see above)" >&2
    return 1
  }
  printf '%s\n%s\n' "$key" "$extras" >"$stamp"
}

_dynrec_environment() {
  local root venv
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  venv="${DYNREC_VENV:-$root/.venv}"
  _dynrec_make "$venv" && _dynrec_install "$root" "$venv" "${DYNREC_EXTRAS:-}" || return 1
  # shellcheck disable=SC1091
  . "$venv/bin/activate"
}

_dynrec_environment
