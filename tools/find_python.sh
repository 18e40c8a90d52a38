#!/bin/sh
# Print the first of the given Python versions that works here, on PATH or under pyenv: tools/find_python.sh 3.13 3.12
for version in "$@"; do
    for python in "python$version" python3 python "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
        # A pyenv shim is on PATH also for versions that are not active, and some systems ship no ensurepip: run it and see.
        if path=$("$python" -c "
import ensurepip, sys, sysconfig, venv
print(sys.executable)
sys.exit('%d.%d' % sys.version_info[:2] != '$version' or bool(sysconfig.get_config_var('Py_GIL_DISABLED')))
" 2>/dev/null); then
            echo "$path"
            exit 0
        fi
    done
done
echo "striate needs Python $* (with venv) and found none on PATH or under pyenv; install one, e.g. from python.org." >&2
exit 1
