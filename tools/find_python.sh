#!/bin/sh
# Prints the path of a Python that can hold the project's virtual environment, or says on the
# standard error what to install.  PYTHON=/path/to/python is tried first, and alone.
set -u

minimum="3, 12"

suitable() {
    # Run it: a pyenv shim exists on PATH also where its version is not selected.
    "$1" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < ($minimum))" >/dev/null 2>&1
}

resolve() {
    "$1" -c 'import sys; print(sys.executable)'
}

candidates() {
    printf '%s\n' python3 python3.12 python3.13 python3.14 python
    if command -v pyenv >/dev/null 2>&1; then
        for version in 3.12 3.13 3.14; do
            ls -d "$(pyenv root)"/versions/"$version"*/bin/python 2>/dev/null
        done
    fi
    if command -v uv >/dev/null 2>&1; then
        uv python find --no-project '>=3.12' 2>/dev/null
    fi
}

if [ -n "${PYTHON:-}" ]; then
    if suitable "$PYTHON"; then
        resolve "$PYTHON"
        exit 0
    fi
    echo "PYTHON=$PYTHON is not a Python >= 3.12 with the modules venv and ensurepip." >&2
    exit 1
fi

without_venv=""
for candidate in $(candidates); do
    if suitable "$candidate"; then
        resolve "$candidate"
        exit 0
    fi
    if "$candidate" -c "import sys; sys.exit(sys.version_info < ($minimum))" >/dev/null 2>&1; then
        without_venv=$candidate
    fi
done

{
    if [ -n "$without_venv" ]; then
        version=$("$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        echo "Python $version is here ($without_venv), but without the modules venv and ensurepip."
        echo "Install them, then run the same command again:"
        echo "  Debian, Ubuntu:  sudo apt-get install python$version-venv"
    else
        echo "Python 3.12 or newer is needed and was not found."
        echo "Install it in one of these ways, then run the same command again:"
        echo "  Debian 13, Ubuntu 24.04:  sudo apt-get install python3 python3-venv"
        echo "  Fedora:                   sudo dnf install python3.12"
        echo "  macOS, with Homebrew:     brew install python@3.12"
        echo "  anywhere, with pyenv:     pyenv install 3.12"
        echo "  anywhere, with uv:        uv python install 3.12"
        echo "A Python in an unusual place is named by PYTHON=/path/to/python3.12 make ..."
    fi
} >&2
exit 1
