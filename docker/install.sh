#!/bin/sh
# The steps of ../Dockerfile and of ../singularity/bids_brainfm.def, on an image of the Debian family.
#
#     install.sh python      Python 3.11, where the base has none
#     install.sh libraries   all that bids_brainfm needs, in /opt/venv (from the folder of pyproject.toml)
#     install.sh program     bids_brainfm itself (from the same folder)
#     install.sh templates   the transforms between templates that making an atlas image needs
#     install.sh folders     places to mount on
#
# Read from the environment: TORCH_INDEX, VERSION (see ../Dockerfile), and pip's own settings.
set -eu
umask 022  # whatever it is here, any user must be able to read the result
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

add_packages() {
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
  rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log
}

python() {
  command -v python3 >/dev/null || add_packages python3 ca-certificates
  python3 -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "The base has $(python3 --version), and constraints.txt is for 3.11: give another BASE." >&2
    exit 1
  }
  # Slim images come without: on a read-only root each start would compile the standard library
  python3 -m compileall -q "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    -x '/(site|dist)-packages/|/test/|lib2to3/tests' >/dev/null
}

libraries() {
  python3 -c 'import ensurepip' 2>/dev/null || add_packages python3-venv
  python3 -m venv /opt/venv
  # torch comes first, alone, by its exact version: see the Makefile
  /opt/venv/bin/pip install --quiet --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
  # its test programs and C++ headers, which nothing here uses: 145 MB
  rm -rf /opt/venv/lib/python3.11/site-packages/torch/test \
    /opt/venv/lib/python3.11/site-packages/torch/include
  python3 -c 'import tomllib
for name in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]: print(name)' |
    /opt/venv/bin/pip install --quiet --constraint constraints.txt --requirement /dev/stdin
}

program() {
  # without a version given, pyproject.toml's fallback, since the image is built without the history
  [ -z "${VERSION:-}" ] || export SETUPTOOLS_SCM_PRETEND_VERSION="$VERSION"
  /opt/venv/bin/pip install --quiet --no-deps .
  /opt/venv/bin/pip check
}

templates() {
  # An image built without access to TemplateFlow lacks them and works all the same: no run needs
  # them, only `bids_brainfm_models fetch` of an atlas. Here is nothing but what was fetched: a
  # stub of every file of TemplateFlow would be read at each start.
  target=$TEMPLATEFLOW_HOME
  mkdir -p "$target"
  echo 'Transforms between templates, from TemplateFlow (https://www.templateflow.org).' \
    >"$target/README"
  TEMPLATEFLOW_HOME=$(mktemp -d) /opt/venv/bin/python - "$target" <<'END'
import shutil, sys
from pathlib import Path
from bids_brainfm.atlases.cards import atlas_names, load_card
from bids_brainfm.atlases.obtain import template_transform
from bids_brainfm.errors import BrainfmError

files = [file for name in atlas_names() for file in load_card(name).files]
for name in {file.made.transform for file in files if file.made and file.made.transform}:
    try:
        path = template_transform(name)
    except BrainfmError as error:
        print(f'Not in this image: {error}')
        continue
    folder = Path(sys.argv[1], path.parent.name)
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder)
END
}

folders() {
  mkdir -p /data /out /work "$BIDS_BRAINFM_HOME"
  chmod 1777 /work
}

for step in "$@"; do
  case $step in
  python | libraries | program | templates | folders) echo "== $step" && $step ;;
  *) echo "install.sh has no step $step" >&2 && exit 2 ;;
  esac
done
