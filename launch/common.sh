# Shared by the three scripts. Source it, do not run it.

# Prints a command as a user would type it, and runs it unless --dry-run is set.
run() {
  printf '%q ' "$@" | sed 's/ $//'
  printf '\n'
  if [ -z "${DRY_RUN}" ]; then "$@"; fi
}

die() {
  echo "error: $*" >&2
  exit 1
}

# Prints the comment at the top of the script, whose absolute path is in SCRIPT.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$SCRIPT"
}

# read_options NAMES ARG...: reads --name=value options into upper-case variables. Arguments after --
# go to TRAIN_ARGS. NAMES are the known options, separated by spaces. Environment variables with these
# names are no options.
read_options() {
  local known=" $1 " option
  for option in $1; do
    option="${option//-/_}"
    unset "${option^^}"
  done
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
        [[ "$known" == *" $name "* ]] || die "unknown option --$name; expected one of:$known--dry-run"
        local variable="${name//-/_}"
        printf -v "${variable^^}" '%s' "${1#*=}"
        ;;
      *) die "got $1; expected --name=value, --dry-run, or -- and arguments for the training" ;;
    esac
    shift
  done
}

# require NAME...: exits if any of these options is missing, and names all that are.
require() {
  local name variable missing=()
  for name in "$@"; do
    variable="${name//-/_}"
    variable="${variable^^}"
    [ -n "${!variable:-}" ] || missing+=("--$name")
  done
  [ ${#missing[@]} -eq 0 ] || die "missing ${missing[*]}; see $0 --help"
}

# whole NAME...: exits if one of these options is given and is not a whole number from 1.
whole() {
  local name variable
  for name in "$@"; do
    variable="${name^^}"
    [[ "${!variable:-1}" =~ ^[1-9][0-9]*$ ]] || die "--$name: expected a whole number from 1; got ${!variable}"
  done
}

# The command that every process runs on any cluster.
train_command() {
  printf '%q ' python -m janusflow_jax.train "--config=$CONFIG" "--config.workdir=$WORKDIR" \
    ${TRAIN_ARGS[@]+"${TRAIN_ARGS[@]}"} | sed 's/ $//'
}

# The same for machines that do not inherit the environment: with the caller's folder of compiled programs.
remote_train_command() {
  if [ -n "${JANUSFLOW_COMPILATION_CACHE:-}" ]; then
    printf 'JANUSFLOW_COMPILATION_CACHE=%q ' "$JANUSFLOW_COMPILATION_CACHE"
  fi
  train_command
}

# This checkout as GIT_URL@COMMIT. The machines clone it from there, so all of it has to be there.
checkout_source() {
  local url commit
  url="$(git remote get-url origin 2>/dev/null)" || die "this checkout has no remote 'origin': set --source=GIT_URL@COMMIT"
  commit="$(git rev-parse HEAD)"
  [ -z "$(git status --porcelain --untracked-files=no)" ] ||
    die "expected a checkout with all changes committed; got others (git status), which the machines would not see: commit and push them, or set --source=GIT_URL@COMMIT"
  [ -n "$(git branch --remotes --contains "$commit" --list 'origin/*')" ] ||
    die "expected a commit that a branch of origin contains; got $commit: push it, or set --source=GIT_URL@COMMIT"
  echo "$url@$commit"
}
