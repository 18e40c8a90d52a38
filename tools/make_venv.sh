#!/bin/sh
# Install striate and its pinned packages for development: [EXTRAS=dev,tpu] tools/make_venv.sh .venv 3.13 3.12 3.11
set -eu
cd "$(dirname "$0")/.."
venv=$1
shift
python=$(tools/find_python.sh "$@")
constraints=constraints.txt
case $("$python" --version) in *" 3.11."*) constraints=constraints-floor.txt ;; esac

echo "setting up $venv with $python and $constraints (half a minute on a good network)" >&2
"$python" -m venv --clear "$venv"
# setuptools first and without build isolation: the pinned one builds, and it is fetched once. Byte-compiling is left to
# the first import, which needs a fraction of the files.
pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --constraint "$constraints" "$@"; }
pip setuptools
pip --no-build-isolation --editable ".[${EXTRAS:-dev}]"
touch "$venv/installed"
