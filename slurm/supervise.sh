# Sourced by the templates here and by the scripts that launch/ writes: what every batch shell of ours begins with.
# Expects DDPM_RUN (a run directory) and DDPM_STAGE (train | sample | evaluate), DDPM_SET for the last two.
# DDPM_HOME (the project) and DDPM_PYTHON are set by launch/; by hand, submit from the project's root.
DDPM_HOME=${DDPM_HOME:-$SLURM_SUBMIT_DIR}
if [ ! -f "$DDPM_HOME/launch/jobs.py" ]; then
  echo "DDPM_HOME=$DDPM_HOME is not the project: submit from its root, or export DDPM_HOME" >&2
  exit 2
fi
if [ ! -f "$DDPM_RUN/config.yaml" ]; then
  echo "$DDPM_RUN is no run directory: make one with 'python launch/submit.py --prepare', then give its path" >&2
  exit 2
fi
DDPM_RUN=$(CDPATH='' cd -- "$DDPM_RUN" && pwd)
[ -n "${DDPM_PYTHON:-}" ] || { DDPM_PYTHON=$DDPM_HOME/.venv/bin/python; [ -x "$DDPM_PYTHON" ] || DDPM_PYTHON=python3; }
DDPM_SINCE=$(date -u +%FT%T.%3NZ)   # when this life got its nodes: goodput counts from here
export DDPM_HOME DDPM_PYTHON DDPM_RUN DDPM_SINCE PYTHONPATH="$DDPM_HOME${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# since 22.05 srun does not take it from sbatch
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
export SLURM_EXPORT_ENV=ALL   # where the user has SBATCH_EXPORT=NONE, srun would pass nothing on
mkdir -p "$DDPM_RUN/logs"
# shellcheck source=/dev/null
[ ! -f "$DDPM_RUN/setup.sh" ] || . "$DDPM_RUN/setup.sh"   # the site profile's `setup` lines: module load …

# The shell must outlive its ranks, which answer the signals: a command trap makes bash wait for srun, then go on.
trap : TERM USR2 CONT
ddpm_end() {
  local code=$?
  trap - EXIT
  "$DDPM_PYTHON" -m launch.life.supervisor "$DDPM_RUN" "$DDPM_STAGE" "$code" "${DDPM_SET:-}"
  exit $?
}
trap ddpm_end EXIT
echo "[batch] $(date -u +%FT%TZ) job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}" \
     "restart=${SLURM_RESTART_COUNT:-0} stage=$DDPM_STAGE nodes=$SLURM_JOB_NODELIST run=$DDPM_RUN"
:   # the echo fails where the log's disk is full, and the caller takes that for a missing file
