#!/bin/bash
# The whole way on this machine, without a scheduler: train on handwritten digits, sample, score. `--help` says how.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in
    -h | --help)
        cat <<'TEXT'
Usage: tools/quickstart.sh [key=value …] [OPTIONS of launch/submit.py]

Makes .venv (tools/env.sh), then runs configs/quickstart.yaml through launch/submit.py --cluster local: about three
minutes on two cores after the downloads. Run again, it says that the run is complete; interrupted, it goes on.
TEXT
        exit 0
        ;;
esac

tools/env.sh digits
exec .venv/bin/python launch/submit.py configs/quickstart.yaml --cluster local --then sample,evaluate --wait "$@"
