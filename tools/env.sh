#!/bin/bash
# Makes `.venv` at the project root and keeps it up to date. `tools/env.sh --help` says how.
# Run it (quickstart.sh and test.sh do), or source it, in bash or zsh, to have .venv/bin on the PATH as well.

# The work is always done by a bash of its own: no option, alias or function of the caller's is heeded or changed.
_ddpm_file=${BASH_SOURCE:-}
[ -z "${ZSH_VERSION:-}" ] || eval '_ddpm_file=${(%):-%x}'
if [ -z "$_ddpm_file" ]; then
    case $0 in env.sh | */env.sh) exec bash "$0" "$@" ;; esac # sh tools/env.sh
    echo "env.sh: source it in bash or zsh; elsewhere type tools/env.sh, and .venv/bin/python for python" >&2
    return 2
fi
if [ "$_ddpm_file" != "$0" ] || [ -n "${ZSH_VERSION:-}" ]; then
    BASH_ENV='' \bash "$_ddpm_file" "$@" || return
    VIRTUAL_ENV=$(BASH_ENV='' CDPATH='' \bash -c 'cd "$(dirname "$0")/.." && pwd' "$_ddpm_file")/.venv || return
    export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
    unset PYTHONHOME _ddpm_file # a module's Python has set it, in whose place this one is now
    return
fi
unset CDPATH PYTHONHOME PYTHONPATH # what other Pythons have is not here for jobs

_ddpm_usage() {
    cat <<'TEXT'
Usage: tools/env.sh [EXTRA,EXTRA]      e.g. tools/env.sh test,dev    (or: . tools/env.sh test,dev)

Installs the project, editable, with these extras of pyproject.toml into .venv; says nothing when that is done
already. Extras that were asked for earlier stay.

  PYTHON=python3.12      the interpreter, for a .venv that does not exist yet: 3.10 to 3.14
  TORCH=cpu|default      which torch: without CUDA, or PyPI's. Default: cpu where there is neither an NVIDIA GPU nor
                         a SLURM cluster with GPUs to be seen.

Exit codes: 0 up to date, 1 the installation failed, 2 the request was wrong, 3 no usable Python.
TEXT
}

_ddpm_env() (
    set -euo pipefail
    umask 022 # other users run jobs from this .venv
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    venv=$root/.venv
    stamp=$venv/.ddpm-stamp # "HASH EXTRAS": what pyproject.toml was, and the extras that are installed
    cpu_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

    say() { echo "env.sh: $*"; }
    die() { local rc=$1; shift; echo "env.sh: $*" >&2; exit "$rc"; }

    # Prints a sorted union of comma-separated lists.
    union() { printf '%s\n' "$@" | tr ',' '\n' | sed '/^$/d' | sort -u | paste -sd ','; }

    # True if the stamp holds for today's pyproject.toml and every extra asked for.
    up_to_date() {
        local hash='' installed=''
        [ -x "$venv/bin/python" ] && [ -r "$stamp" ] && read -r hash installed <"$stamp"
        [ "$hash" = "$want_hash" ] && [ "$(union "$installed" "$extras")" = "$installed" ]
    }

    # Through env, since what setpriv itself executes is still looked up with root's rights.
    as_nobody() { setpriv --reuid=65534 --regid=65534 --clear-groups env "$@" </dev/null >/dev/null 2>&1; }
    suitable() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' >/dev/null 2>&1; }
    executable_of() { "$1" -c 'import os, sys; print(os.path.realpath(sys.executable))'; }

    can_apt_get() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
    apt_get_install() {
        say "installing $*"
        export DEBIAN_FRONTEND=noninteractive
        # The second try is for a machine whose package lists are empty or old.
        { apt-get install -y --no-install-recommends "$@" ||
            { apt-get update && apt-get install -y --no-install-recommends "$@"; }; } </dev/null >/dev/null 2>&1 ||
            die 3 "apt-get could not install $*"
    }

    choose_python() {
        local candidate
        if [ -n "${PYTHON:-}" ]; then
            suitable "$PYTHON" || die 3 "PYTHON=$PYTHON is not Python 3.10 to 3.14:" \
                "$("$PYTHON" --version 2>&1 || true)"
            python=$PYTHON
            return
        fi
        for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
            suitable "$candidate" && python=$candidate && break
        done
        if [ -z "$python" ] && can_apt_get; then
            apt_get_install python3 python3-venv
            suitable /usr/bin/python3 && python=/usr/bin/python3
        fi
        [ -n "$python" ] || die 3 "Python 3.10 to 3.14 is needed, python3 is" \
            "$(python3 --version 2>&1 || true); set PYTHON=/path/to/python3.12 to name another"
        # The SLURM tests run jobs as an ordinary user, who must be able to execute this interpreter. Root's own one,
        # say pyenv's, often lies under /root, which is closed to others: then the system's is the better choice.
        if [ "$(id -u)" = 0 ] && ! as_nobody "$(executable_of "$python")" -c '' &&
            suitable /usr/bin/python3 && as_nobody /usr/bin/python3 -c ''; then
            say "using /usr/bin/python3: $(executable_of "$python") cannot be executed by other users"
            python=/usr/bin/python3
        fi
    }

    make_venv() {
        python=''
        choose_python
        # Debian keeps ensurepip, which venv needs, in a package of its own.
        if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
            can_apt_get || die 3 "$python has no ensurepip: install it (on Debian: apt-get install python3-venv)"
            apt_get_install python3-venv
            "$python" -c 'import ensurepip, venv' 2>/dev/null || die 3 "$python still has no ensurepip"
        fi
        say "making .venv with $("$python" --version) ($(executable_of "$python"))"
        "$python" -m venv --clear "$venv" || die 1 "$python -m venv failed"
    }

    # PyPI's torch for Linux brings some 5 GB of CUDA libraries. A login node has no GPU but its .venv is for nodes
    # that do, hence the look at SLURM.
    wants_cpu_torch() {
        case ${TORCH:-} in
            cpu) return 0 ;;
            default) return 1 ;;
            '') ;;
            *) die 2 "TORCH=$TORCH: it must be cpu or default" ;;
        esac
        [ "$(uname -s)" = Linux ] && [ ! -e /dev/nvidia0 ] && ! command -v nvidia-smi >/dev/null &&
            ! timeout 5 sinfo -h -o %G 2>/dev/null | grep -q gpu
    }

    answers() {
        "$venv/bin/python" - "$1" <<'PY' 2>/dev/null
import sys
from urllib.request import urlopen

urlopen(sys.argv[1] + "/torch/", timeout=8).close()
PY
    }

    install() {
        local log=$venv/install.log spec=$root index=()
        all=$(union "${installed:-}" "$extras")
        [ -z "$all" ] || spec="${root}[$all]"
        if ! "$venv/bin/python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' &&
            wants_cpu_torch; then
            # Among equal versions pip prefers "+cpu", so that one more index is all it takes.
            if answers "$cpu_index"; then
                index=(--extra-index-url "$cpu_index")
            else
                say "$cpu_index does not answer: torch comes from PyPI, with 5 GB of CUDA libraries"
            fi
        fi
        say "installing the project and its dependencies [${all:-no extras}], a few minutes the first time"
        if ! "$venv/bin/python" -m pip install --no-input --no-compile ${index[@]+"${index[@]}"} -e "$spec" \
            </dev/null >"$log" 2>&1; then
            tail -n 15 "$log" >&2
            die 1 "pip failed; everything it said is in $log"
        fi
        # pip would take one core for it. Some packages have files for other Pythons, which fail.
        "$venv/bin/python" -m compileall -q -j 4 -x '/tests/' "$venv"/lib/python*/site-packages </dev/null >/dev/null 2>&1 || true
        echo "$want_hash $all" >"$stamp.new"
        mv "$stamp.new" "$stamp"
        say "ready: .venv with [${all:-no extras}]"
    }

    case ${1:-} in
        -h | --help) _ddpm_usage; exit 0 ;;
        -*) die 2 "unknown option $1" ;;
    esac
    [ $# -le 1 ] || die 2 "one comma-separated list of extras, got: $*"
    extras=$(union "${1:-}")
    [[ $extras =~ ^[A-Za-z0-9._,-]*$ ]] || die 2 "extras are names with commas between them, got: $1"
    [ -r "$root/pyproject.toml" ] || die 2 "$root has no pyproject.toml"
    # To pip an extra that does not exist is only worth a warning.
    known=$(sed -n '/^\[project\.optional-dependencies\]/,/^\[[^]]*\]$/s/^\([A-Za-z0-9_-]*\) *=.*/\1/p' \
        "$root/pyproject.toml" | paste -sd ',')
    for extra in ${extras//,/ }; do
        [[ ,$known, == *,$extra,* ]] || die 2 "pyproject.toml has no extra '$extra'; there are ${known//,/, }"
    done
    want_hash=$(sha256sum <"$root/pyproject.toml" | cut -c 1-64)

    up_to_date && exit 0
    # One installation at a time. pyproject.toml is the lock, since .venv itself may be replaced.
    exec 9<"$root/pyproject.toml"
    command -v flock >/dev/null && ! flock -n 9 && { say "waiting for another installation"; flock 9; }
    up_to_date && exit 0
    # A .venv whose interpreter is gone (or was never finished) is made anew; one made by hand is kept and completed.
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
    installed=''
    [ ! -r "$stamp" ] || read -r _ installed <"$stamp"
    install
)

_ddpm_env "$@"
