# What the three scripts share; sourced, not run.

# Prints a command as it would be typed, and runs it unless --dry-run was given.
run() {
  printf '%q ' "$@" | sed 's/ $//'
  printf '\n'
  if [ -z "${DRY_RUN}" ]; then "$@"; fi
}

die() {
  echo "error: $*" >&2
  exit 1
}

# usage: prints the head comment of the script.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# Reads --name=value options into upper-case variables; what is left after -- goes to TRAIN_ARGS.
# known: the names, separated by spaces.
read_options() {
  local known=" $1 "
  shift
  DRY_RUN="${DRY_RUN:-}"
  TRAIN_ARGS=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --help) usage; exit 0 ;;
      --dry-run) DRY_RUN=1 ;;
      --) shift; TRAIN_ARGS=("$@"); break ;;
      --*=*)
        local name="${1%%=*}"
        name="${name#--}"
        [[ "$known" == *" $name "* ]] || die "unknown option --$name; known are:$known--dry-run"
        local variable="${name//-/_}"
        printf -v "${variable^^}" '%s' "${1#*=}"
        ;;
      *) die "got $1; expected --name=value, --dry-run, or -- and flags for training" ;;
    esac
    shift
  done
}

# need NAME...: stops where one of these options was not given, and names them all.
need() {
  local name variable missing=()
  for name in "$@"; do
    variable="${name//-/_}"
    variable="${variable^^}"
    [ -n "${!variable:-}" ] || missing+=("--$name")
  done
  [ ${#missing[@]} -eq 0 ] || die "missing ${missing[*]}; see $0 --help"
}

# The command that every process runs, on any cluster: CONFIG, WORKDIR and TRAIN_ARGS in it.
train_command() {
  printf '%q ' python -m janusflow_jax.train "--config=$CONFIG" "--config.workdir=$WORKDIR" \
    ${TRAIN_ARGS[@]+"${TRAIN_ARGS[@]}"} | sed 's/ $//'
}

# What this checkout is, as GIT_URL@COMMIT.
source_here() {
  local url commit
  url="$(git remote get-url origin 2>/dev/null)" || die "no remote 'origin': give --source=GIT_URL@COMMIT"
  commit="$(git rev-parse HEAD)"
  echo "$url@$commit"
}
