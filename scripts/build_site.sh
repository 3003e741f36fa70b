#!/usr/bin/env bash
# The documentation as a site in build/site, from docs/ and from docstrings, which are read and not
# run. A warning is an error. Needs the extra docs.
# usage: scripts/build_site.sh VENV [options of check_site.py]
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:?usage: scripts/build_site.sh VENV}/bin
shift
rm -rf build/site
"$bin/sphinx-build" --quiet --fail-on-warning --keep-going --fresh-env -d build/doctrees docs build/site
"$bin/python" scripts/check_site.py build/site "$@"
