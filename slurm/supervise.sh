# Sourced by the templates here and by the scripts that launch/ writes: what every batch shell of ours begins with.
# Expects DDPM_RUN (a run directory) and DDPM_STAGE (train | sample | evaluate), DDPM_SET for the last two.
# DDPM_HOME (the project) and DDPM_PYTHON are set by launch/; by hand, submit from the project's root.
DDPM_HOME=${DDPM_HOME:-$SLURM_SUBMIT_DIR}
if [ ! -f "$DDPM_HOME/launch/jobs.py" ]; then
  echo "DDPM_HOME=$DDPM_HOME is not the project: submit from its root, or export DDPM_HOME" >&2
  exit 2
fi
DDPM_HOME=$(CDPATH='' cd -- "$DDPM_HOME" && pwd)
ddpm_run_is_away() {   # with what it is on, as a mount may be for a moment: then nothing is beside it either
  [ ! -d "$DDPM_RUN" ] && ! compgen -G "$(dirname -- "$DDPM_RUN")/*" >/dev/null
}
for ddpm_try in {1..20}; do
  ddpm_run_is_away || break
  sleep 3
done
if [ ! -f "$DDPM_RUN/config.yaml" ]; then
  echo "$DDPM_RUN is no run directory: make one with 'python launch/submit.py --prepare', then give its path" >&2
  exit 2
fi
ddpm_record=$(cat "$DDPM_RUN/run.json" 2>/dev/null)
if [[ $ddpm_record == *'"run_id"'* && $ddpm_record != *"${DDPM_RUN_ID:-}"* ]]; then
  echo "$DDPM_RUN is not the run that this job was queued for, which was moved or deleted: nothing is done" >&2
  exit 2
fi
export DDPM_OF_RUN=${DDPM_RUN_ID:-}   # for a successor; what else is queued from this job may be another run's
unset DDPM_RUN_ID ddpm_record
DDPM_RUN=$(CDPATH='' cd -- "$DDPM_RUN" && pwd)
[ -n "${DDPM_PYTHON:-}" ] || { DDPM_PYTHON=$DDPM_HOME/.venv/bin/python; [ -x "$DDPM_PYTHON" ] || DDPM_PYTHON=python3; }
DDPM_SINCE=$(date -u +%FT%T.%3NZ)   # when this life got its nodes: goodput counts from here
export DDPM_HOME DDPM_PYTHON DDPM_RUN DDPM_SINCE PYTHONPATH="$DDPM_HOME${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONUTF8=1
# since 22.05 srun does not take it from sbatch
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
export SLURM_EXPORT_ENV=ALL   # where the user has SBATCH_EXPORT=NONE, srun would pass nothing on
mkdir -p "$DDPM_RUN/logs"
[ -z "${DDPM_LOG:-}" ] || exec >>"$DDPM_RUN/logs/$DDPM_LOG" 2>&1
ddpm_job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
ddpm_node=${SLURMD_NODENAME:-$(hostname)}

# What a module has set for its own Python, and no other can use: launch/first.py leaves it out on the login node.
ddpm_own_python() {
  local IFS=: path kept= own
  [ ! -f "${DDPM_PYTHON%/*}/../pyvenv.cfg" ] || unset PYTHONHOME
  case ${PYTHONPATH:-} in */python[0-9].*) ;; *) return 0 ;; esac
  own=$("$DDPM_PYTHON" -ESc 'import sys; print("python%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 0
  for path in $PYTHONPATH; do
    [[ $path/ =~ /lib[0-9]*/python[0-9]\.[0-9]+/ && $path/ != */"$own"/* ]] || kept=$kept${kept:+:}$path
  done
  PYTHONPATH=$kept
}

# From here on whatever ends this shell is looked into, by Python of ours where this node has it.
# The shell must outlive its ranks, which answer the signals: a command trap makes bash wait for srun, then go on.
trap : TERM USR2 CONT
ddpm_setup= ddpm_at_end=
ddpm_end() {
  local code=$? heard end once_more=1 times
  set +eu
  trap - EXIT
  ddpm_own_python
  unset SLURM_CLUSTERS SBATCH_CLUSTERS
  if [ -n "$ddpm_setup" ]; then
    echo "setup failed on $ddpm_node: it ended the job's shell (exit code $code), at the line: $ddpm_setup"
    [ "$code" != 0 ] || code=1
  fi
  for times in {1..20}; do
    if [ "$times" != 20 ] && { [ ! -f "$DDPM_HOME/launch/jobs.py" ] || ddpm_run_is_away; }; then
      [ "$times" != 1 ] || echo "[batch] $DDPM_RUN or $DDPM_HOME is away: waiting for it, up to a minute"
      sleep 3
      continue
    fi
    { heard=$(builtin cd -- "$DDPM_HOME" && DDPM_HEARD_FD=3 "$DDPM_PYTHON" -m launch.life.supervisor \
        "$DDPM_RUN" "$DDPM_STAGE" "$code" "${DDPM_SET:-}" 3>&1 >&4); } 4>&1
    end=$?
    if [ -n "$heard" ] || [ "$end" = 137 ] || [ "$end" = 143 ]; then break; fi
    [ -n "$once_more" ] || break   # what it needs may have come back just now
    once_more=
    sleep 3
  done
  [ -n "$heard" ] || [ "$code" = 0 ] || ddpm_end_without_python "$code" "$end"
  eval "$ddpm_at_end"
  exit "$end"
}
ddpm_end_without_python() {   # puts the job back elsewhere, three times at most: only SLURM and this shell are asked
  local code=$1 lives="$DDPM_RUN/logs/.without-python-$ddpm_job" times=0 total without reason bad=$ddpm_node
  [ ! -f "$lives" ] || times=$(wc -l <"$lives")
  reason="$DDPM_PYTHON does not run on node $ddpm_node"
  case $2 in
  137 | 143) bad= reason="what looks into a life's end was itself ended by signal $(($2 - 128)) on node $ddpm_node" ;;
  *) echo "error: $reason (or $DDPM_HOME is not there)" ;;
  esac
  if [ "$(scontrol show job -o "$ddpm_job" 2>/dev/null | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')" != RUNNING ]; then
    echo "[batch] SLURM does not call the job RUNNING: leaving it to SLURM"
    return
  fi
  if [ -e "$DDPM_RUN/STOP" ] || [ -L "$DDPM_RUN/STOP" ] || [ "$times" -ge 3 ] || ! echo "$ddpm_node" >>"$lives"; then
    ddpm_event failed "$code" "$reason; tried $((times + 1)) times: mend the environment, then submit again"
    echo "[batch] failed: $reason; see $DDPM_RUN/logs"
    rm -f "$lives"
    return
  fi
  ddpm_event requeued "$code" "$reason"
  echo "[batch] $reason: requeueing job $ddpm_job${bad:+, without node $bad}"
  trap '' TERM   # SLURM ends this shell once the job is put back, and the node is yet to be excluded
  scontrol requeue "$ddpm_job" || return
  total=$(sinfo -h -N -p "${SLURM_JOB_PARTITION:-}" -o %N 2>/dev/null | sort -u | wc -l)
  if [ -n "$bad" ] && [ "$total" -gt $((${SLURM_JOB_NUM_NODES:-1} + times)) ]; then
    without=$(scontrol show job -o "$ddpm_job" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
    [ "$without" != "(null)" ] || without=
    scontrol update jobid="$ddpm_job" excnodelist="${without:+$without,}$ddpm_node"
  fi
  [ "$times" = 0 ] || scontrol update jobid="$ddpm_job" starttime=now+60
  sleep 300
}
ddpm_event() {   # a line as launch/ writes them, by hand; a full disk must not keep the job from its return
  printf '{"event": "%s", "time": "%s", "job": "%s", "restart": %d, "host": "%s", "stage": "%s", "exit_code": %d, %s}\n' \
    "$1" "$(date -u +%FT%T.%3NZ)" "$ddpm_job" "${SLURM_RESTART_COUNT:-0}" "$ddpm_node" "$DDPM_STAGE" "$2" \
    "${SLURM_CLUSTER_NAME:+\"cluster\": \"${SLURM_CLUSTER_NAME,,}\", }\"reason\": \"${3//[\"\\]/_}\", ${bad:+\"bad_node\": \"$bad\", }\"world_size\": ${SLURM_NTASKS:-1}" \
    >>"$DDPM_RUN/events/$ddpm_job.${SLURM_RESTART_COUNT:-0}.jsonl" || true
}
trap ddpm_end EXIT
echo "[batch] $(date -u +%FT%TZ) job=$ddpm_job" \
     "restart=${SLURM_RESTART_COUNT:-0} stage=$DDPM_STAGE nodes=$SLURM_JOB_NODELIST run=$DDPM_RUN"

# What a rank's command begins with, and srun's options: the site profile's `container` has others.
ddpm_srun=() ddpm_python=("$DDPM_PYTHON")
[ ! -f "$DDPM_RUN/container.sh" ] || . "$DDPM_RUN/container.sh"

# The site profile's `setup` lines; what they make of this script's own words ends with them.
if [ -f "$DDPM_RUN/setup.sh" ]; then
  ddpm_words=("$@")
  . "$DDPM_HOME/slurm/setup.sh"
  [ -z "$ddpm_setup" ] || exit 0   # a line of them has returned: ddpm_end knows
  trap : TERM USR2 CONT
  set -- ${ddpm_words[@]+"${ddpm_words[@]}"}
fi
ddpm_own_python
# The user's, or of a `setup` line: a job asks the cluster that it is on, without the accounting that knows others, and
# its ranks write into its log, as they are.
unset SLURM_CLUSTERS SBATCH_CLUSTERS SLURM_LABELIO SLURM_STDOUTMODE SLURM_STDERRMODE SRUN_OUTPUT SRUN_ERROR
# Python's -m looks for modules in the working directory first, which mostly is the checkout, as it is by now.
builtin cd -- "$DDPM_HOME" || exit 2
export DDPM_SHELL_ASKS=   # whether this shell can ask SLURM where its ranks cannot, as in a container
command -v scontrol >/dev/null && DDPM_SHELL_ASKS=1
[ -n "$DDPM_SHELL_ASKS" ] || echo "[batch] no scontrol on node $ddpm_node: SLURM itself puts this job back where it" \
  "pre-empts it, but nothing does after a crash or at its time limit. Have the profile's setup lines bring SLURM's" \
  "commands, or submit the run again when it has ended"
:   # the echo fails where the log's disk is full, and the caller takes that for a missing file
