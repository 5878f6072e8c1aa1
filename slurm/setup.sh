# Sourced by supervise.sh: the site profile's `setup` lines, as module load …, each in the shell that the work runs in.
# One that fails ends this life, before it runs in another environment than was meant; lines that are no command by
# themselves, as of an `if`, are taken together. One that ends the shell, or what is sourced, has failed too, whatever
# its exit code: nothing was worked on. $ddpm_setup is the line at hand, empty once all are done.
ddpm_setup="(the first)"
ddpm_lines=
exec() {   # would put another program in the shell's place, which then ends as if the work were done
  if [ "$BASHPID" != "$$" ]; then builtin exec "$@"; fi
  [ $# -gt 0 ] || return 0
  echo "exec ends the batch shell: leave it out, or write (exec …)"
  exit 1
}
ddpm_keep() {   # -- COMMAND EXIT: theirs comes after ours, and never in its place
  [ "${2:-ddpm_end}" = ddpm_end ] || ddpm_at_end=$2
}
while IFS= read -r ddpm_line <&9 || [ -n "$ddpm_line" ]; do
  ddpm_lines=$ddpm_lines${ddpm_lines:+$'\n'}$ddpm_line
  case $ddpm_line in *\\) continue ;; esac
  bash -n -c "$ddpm_lines" 2>/dev/null || continue
  ddpm_setup=$ddpm_lines
  if [[ $ddpm_lines =~ ^[[:space:]]*exec[[:space:]]+[0-9{\<\>\&] ]]; then
    ddpm_lines="command $ddpm_lines"   # a redirection for all that follows
  fi
  eval "$ddpm_lines" || { ddpm_code=$?
    echo "setup failed on $ddpm_node (exit code $ddpm_code): $ddpm_setup"
    ddpm_setup=
    exit "$ddpm_code"; }
  ddpm_theirs=$(trap -p EXIT)
  eval "ddpm_keep ${ddpm_theirs#trap }"
  trap ddpm_end EXIT
  ddpm_lines=
done 9<"$DDPM_RUN/setup.sh"
if [ -n "$ddpm_lines" ]; then
  echo "setup failed on $ddpm_node: no whole command: $ddpm_lines"
  ddpm_setup=
  exit 2
fi
ddpm_setup=
unset -f exec
