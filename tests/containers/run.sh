#!/usr/bin/env bash
# Build the image of ../../Dockerfile and carry out ../../singularity/bids_brainfm.def, without
# Docker and Apptainer, and run both as little privileged as can be: no network, a root that is
# read-only, a user without an account, no home, no /tmp. As root on Debian; needs 8 GB of disk.
#
#     tests/containers/run.sh [image] [definition]        one of them; both if none is named
#
# The base is made by debootstrap. From the environment, all optional:
#     DEBIAN_MIRROR  where Debian's packages come from (debootstrap's default)
#     TORCH_INDEX    where torch comes from (pip's own index)
#     PYTHON         has bids_brainfm installed, to compare with (.venv/bin/python, if it is there)
# pip's settings (index, folder of wheels, certificates) are those of this machine.
set -euo pipefail
cd "$(dirname "$0")/../.."

here=tests/containers
python=${PYTHON:-.venv/bin/python}
image=localhost/bids_brainfm:test
user=12345
passed=0
scratch=$(mktemp -d "${TMPDIR:-/tmp}/brainfm-containers.XXXXXX")
chmod 755 "$scratch"  # the user inside must get through

engine_options=(--root "$scratch/storage" --runroot "$scratch/engine" --storage-driver overlay)

tidy_up() {
  podman "${engine_options[@]}" rm --all --force >/dev/null 2>&1 || true
  umount --quiet "$scratch/storage/overlay" || true
  rm -rf --one-file-system "$scratch"
}
trap tidy_up EXIT

shown() {
  passed=$((passed + 1))
  printf 'ok  %4d s  %s\n' "$SECONDS" "$*"
}

fail() {
  printf 'FAILED     %s\n' "$*" >&2
  exit 1
}

# quietly NAME COMMAND...: the output goes to a log, whose end is shown if the command fails
quietly() {
  local log="$scratch/$1.log"
  shift
  "$@" >"$log" 2>&1 &  # not before ||, where a function would go on after an error
  wait "$!" || { tail -n 30 "$log" >&2 && fail "$*"; }
}

new_folder() {
  mkdir "$scratch/$1"
  chown "$user:$user" "$scratch/$1"
}

install_tools() {
  local wanted=() tool
  for tool in buildah:buildah podman:podman runc:runc debootstrap:debootstrap bwrap:bubblewrap; do
    command -v "${tool%:*}" >/dev/null || wanted+=("${tool#*:}")
  done
  [ "${#wanted[@]}" -eq 0 ] && return
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${wanted[@]}"
}

pip_setting() {
  local variable="PIP_${1^^}"
  variable=${variable//-/_}
  [ -n "${!variable:-}" ] && echo "${!variable}" && return
  "$(command -v "$python" || echo python3)" -m pip config get "global.$1" 2>/dev/null || true
}

# What this machine's pip needs: values for the build, and the files that they name
pip_values=() pip_files=()
read_pip_settings() {
  local setting variable value place
  for setting in index-url find-links cert; do
    value=$(pip_setting "$setting")
    [ -n "$value" ] || continue
    variable="PIP_${setting^^}"
    if [ -e "$value" ]; then
      place="/run/host-$setting"
      pip_files+=("$(realpath "$value"):$place")
      value=$place
    fi
    pip_values+=("${variable//-/_}=$value")
  done
}

# ---------------------------------------------------------------------------------- the image

build_image() {
  local arguments=(--build-arg "BASE=localhost/base:bookworm" --build-arg "VERSION=0.1.0+test")
  local value
  arguments+=(--build-arg "TORCH_INDEX=${TORCH_INDEX:-}")
  for value in "${pip_values[@]}"; do arguments+=(--build-arg "$value"); done
  for value in "${pip_files[@]}"; do arguments+=(--volume "$value:ro"); done
  tar -C "$scratch/base" -c . | podman "${engine_options[@]}" import --quiet - localhost/base:bookworm
  buildah "${engine_options[@]}" build --isolation chroot --layers=false "${arguments[@]}" \
    --tag "$image" .
}

# engine OPTION... IMAGE ARGUMENT...: the limits and the runtime are for old kernels and nested use
engine() {
  podman "${engine_options[@]}" --cgroup-manager cgroupfs --runtime runc run --rm --interactive \
    --passwd=false --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 "$@"
}

cut_off=(--network none)
poor=(--read-only --read-only-tmpfs=false --user "$user:$user" --env HOME=/nonexistent)
confined=("${cut_off[@]}" "${poor[@]}")

# loosened NAME OPTION...: the probe must find just this, else it proves nothing
loosened() {
  local what=$1 found
  shift
  if found=$(engine "$@" --entrypoint python "$image" - <$here/probe.py); then
    fail "the probe does not see $what"
  fi
  [ "$found" = "$what" ] || fail "the probe says \"$found\" where there is $what"
}

check_image() {
  engine "${confined[@]}" --entrypoint python "$image" - <$here/probe.py ||
    fail 'the container has more than it should'
  loosened 'a writable root' "${confined[@]}" --read-only=false --tmpfs /tmp:ro
  loosened 'a network' "${poor[@]}" --network host
  loosened 'a writable home' "${confined[@]}" --env HOME=/dev/shm
  loosened 'a writable /tmp' "${confined[@]}" --tmpfs /tmp
  loosened 'another user than 12345' "${confined[@]}" --user 23456:23456
  shown 'image: no network, read-only root, user without account, no home, no /tmp (each seen to fail if not so)'

  new_folder demo
  quietly demo engine "${confined[@]}" --volume "$scratch/demo:/out" \
    --entrypoint bids_brainfm_demo "$image" /out
  shown 'image: bids_brainfm_demo'

  new_folder plain && new_folder plain-work
  mkdir -p "$scratch/home/checkpoint"
  cp bids_brainfm/data/models/brainlm-demo.safetensors "$scratch/home/checkpoint/model.safetensors"
  chmod -R a+rX "$scratch/home"
  quietly plain engine "${confined[@]}" --volume "$scratch/demo/data:/data:ro" \
    --volume "$scratch/plain:/out" --volume "$scratch/plain-work:/work" \
    --volume "$scratch/home:/opt/brainfm:ro" \
    "$image" /data /out participant --model brainlm-demo=/opt/brainfm/checkpoint
  shown 'image: bids_brainfm with read-only data and weights of another owner'
  agree plain demo/out

  local status=0
  engine "${confined[@]}" --volume "$scratch/demo/data:/data:ro" --volume "$scratch/plain:/out" \
    --volume "$scratch/plain-work:/work" "$image" /data /out participant \
    >"$scratch/absent.log" 2>&1 || status=$?
  [ "$status" -eq 2 ] || fail "without weights the exit code is $status, not 2"
  grep -q 'bids_brainfm_models fetch' "$scratch/absent.log" || fail 'absent weights are not said'
  shown 'image: weights that are not there are said, exit code 2'
}

# agree OUT OTHER: by the image's own Python
agree() {
  local said
  said=$(engine --network none --volume "$scratch:/scratch:ro" --volume "$PWD/$here:/tests:ro" \
    --entrypoint python "$image" /tests/compare.py "/scratch/$1" "/scratch/$2" 2>&1) || fail "$said"
  shown "$1 and $2: $said"
}

compare_with_this_machine() {
  command -v "$python" >/dev/null || { echo "There is no $python: not compared" && return; }
  quietly host "$python" -m bids_brainfm.cli.run "$scratch/demo/data" "$scratch/host" participant \
    --model brainlm-demo brain-jepa-demo --work-dir "$scratch/host-work"
  agree demo/out host
}

# ----------------------------------------------------------------------------- the definition

# The lines of a section of the definition, its arguments filled in
section() {
  awk -v name="%$1" '/^%/ { on = $1 == name; next } on' singularity/bids_brainfm.def |
    sed "s|{{ TORCH_INDEX }}|${TORCH_INDEX:-}|; s|{{ VERSION }}|0.1.0+test|"
}

# Do what `apptainer build` does with the sections
build_root() {
  local root=$scratch/root source target value bound=() set=()
  cp -a "$scratch/base" "$root"
  while read -r source target; do
    [ -n "$source" ] || continue
    mkdir -p "$(dirname "$root$target")"
    cp -rL "$source" "$root$target"
  done < <(section files)
  mkdir -p "$root/.singularity.d"
  for name in environment runscript test help post; do
    section "$name" >"$root/.singularity.d/$name"
    [ -s "$root/.singularity.d/$name" ] || fail "the definition has no %$name"
  done
  for value in "${pip_values[@]}"; do set+=(--setenv "${value%%=*}" "${value#*=}"); done
  for value in "${pip_files[@]}"; do bound+=(--ro-bind "${value%:*}" "${value#*:}"); done
  bwrap --bind "$root" / --proc /proc --dev /dev --tmpfs /run "${bound[@]}" \
    --ro-bind "$(realpath /etc/resolv.conf)" /run/resolv.conf \
    --clearenv --setenv PATH /usr/sbin:/usr/bin:/sbin:/bin --setenv HOME /root "${set[@]}" \
    sh -c 'cp /run/resolv.conf /etc/resolv.conf && exec sh -e /.singularity.d/post'
}

# inside [OPTION...] -- COMMAND...: as Apptainer runs an image, but with nothing of the home or /tmp
inside() {
  local options=()
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  shift
  setpriv --reuid "$user" --regid "$user" --clear-groups \
    bwrap --unshare-user --unshare-pid --unshare-net --ro-bind "$scratch/root" / --proc /proc \
    --dev /dev --perms 1777 --tmpfs /dev/shm --chdir / --clearenv --setenv HOME /nonexistent \
    "${options[@]}" sh -c '. /.singularity.d/environment; exec "$@"' inside "$@"
}

check_root() {
  inside -- python - <$here/probe.py || fail 'the root made from the definition has more than it should'
  if inside --tmpfs /tmp -- python - <$here/probe.py >/dev/null; then
    fail 'the probe does not see a writable /tmp'
  fi
  shown 'definition: no network, read-only root, user without account, no home, no /tmp'
  new_folder test
  quietly test inside --bind "$scratch/test" /out --setenv TMPDIR /out -- sh /.singularity.d/test
  shown 'definition: %test'
  new_folder made
  quietly made inside --bind "$scratch/made" /out -- bids_brainfm_demo /out
  new_folder run && new_folder run-work
  quietly run inside --ro-bind "$scratch/made/data" /data --bind "$scratch/run" /out \
    --bind "$scratch/run-work" /work -- \
    sh /.singularity.d/runscript /data /out participant --model brainlm-demo -w /work
  local said
  said=$(inside --ro-bind "$scratch/made" /data --ro-bind "$scratch/run" /out \
    --ro-bind "$PWD/$here" /work -- python /work/compare.py /out /data/out 2>&1) || fail "$said"
  shown "definition: bids_brainfm_demo and %runscript: $said"
}

# ------------------------------------------------------------------------------------------

[ "$#" -gt 0 ] || set -- image definition
install_tools
read_pip_settings
quietly base debootstrap --variant=minbase bookworm "$scratch/base" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
shown 'base made by debootstrap'
for part in "$@"; do
  case $part in
  image)
    quietly build build_image
    size=$(podman "${engine_options[@]}" image inspect --format '{{.Size}}' "$image")
    shown "image built, $((size / 1000000)) MB"
    check_image
    compare_with_this_machine
    ;;
  definition)
    quietly post build_root
    shown "definition carried out, $(du -sm "$scratch/root" | cut -f1) MB"
    check_root
    ;;
  *) fail "there is no $part to test: image, definition" ;;
  esac
done
echo "$passed passed, 0 failed"
