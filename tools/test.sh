#!/bin/bash
# One command equals CI: style, types, tests. `tools/test.sh --help` says how.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 3
exec </dev/null # nothing here may wait for an answer

case ${1:-} in
    -h | --help)
        cat <<'TEXT'
Usage: tools/test.sh [PYTEST ARGUMENTS]      e.g. tools/test.sh tests/unit -k philox

Makes or updates .venv (tools/env.sh), then runs ruff, mypy and pytest over tests/, or over the paths given. As root
on Debian it installs the SLURM packages where they are missing, for the tests that run a small cluster on this host.
The last section lists what could not run on this machine and how to enable it.

Exit code: 0 if all passed, else that of the first of the three that failed; 3 if the environment cannot be made.
TEXT
        exit 0
        ;;
esac

tools/env.sh test,dev || exit 3
python=$PWD/.venv/bin/python

# Without them the SLURM tests skip, and say so at the end.
if [ "$(id -u)" = 0 ] && [ -e /etc/debian_version ]; then
    tools/slurm_testbed/start.sh --install || echo "test.sh: no SLURM packages, see above" >&2
fi

rc=0
step() {
    local failed=0
    echo "== $1"
    shift
    "$@" || failed=$?
    [ $rc != 0 ] || rc=$failed
}

step ruff "$python" -m ruff check .
step mypy "$python" -m mypy
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # what runs side by side must not fight for cores
if [ $# != 0 ]; then
    paths=(tests) # which a path among the arguments replaces
    for arg in "$@"; do
        case $arg in
            -*) ;;
            *) [ ! -e "${arg%%::*}" ] || paths=() ;;
        esac
    done
    step pytest "$python" -m pytest -ra --durations=10 "$@" ${paths[@]+"${paths[@]}"}
else
    # Three lines side by side: the tests on SLURM mostly wait, for grace periods and time limits.
    waiting=(tests/slurm tests/compat tests/chaos)
    scripts=(tests/cli)
    logs=$(mktemp -d)
    "$python" -m pytest -ra --durations=10 "${waiting[@]}" >"$logs/waiting" 2>&1 &
    first=$!
    "$python" -m pytest -ra --durations=10 "${scripts[@]}" >"$logs/scripts" 2>&1 &
    second=$!
    trap 'kill "$first" "$second" 2>/dev/null; wait; rm -rf "$logs"' EXIT
    covered=(tests/unit/run tests/unit/sampling) # of the rooms that save, fence and publish: every branch
    elsewhere=("${waiting[@]}" "${scripts[@]}" "${covered[@]}")
    step 'pytest' "$python" -m pytest -ra --durations=10 tests "${elsewhere[@]/#/--ignore=}"
    step 'pytest, covered' "$python" -m coverage run -m pytest -ra --durations=10 "${covered[@]}"
    step coverage "$python" -m coverage report
    step "pytest, ${scripts[*]}" wait "$second"
    cat "$logs/scripts"
    step "pytest, ${waiting[*]}" wait "$first"
    cat "$logs/waiting"
fi
exit "$rc"
