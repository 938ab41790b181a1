# Sourced by the other scripts: makes .venv in the checkout once, and again only when its requirements change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.11 python3 python; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: Python 3.11 or 3.12 with the venv module is needed (Debian: apt install python3-venv); name it with PYTHON=..." >&2
    return 1
}

# Without an NVIDIA GPU the CPU build of torch saves gigabytes; a package index of the user's own is left alone.
torch_index() {
    local index=https://download.pytorch.org/whl/cpu
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 && [ -z "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}" ] &&
        .venv/bin/python -c "import urllib.request; urllib.request.urlopen('$index/torch/', timeout=5)" >/dev/null 2>&1; then
        echo "--extra-index-url $index"
    fi
}

wanted=$(cat pyproject.toml launch/constraints.txt | cksum)
if [ "$(cat .venv/.appa-lite 2>/dev/null || true)" != "$wanted" ]; then
    echo "setup: installing into .venv, once (a few minutes)"
    [ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
    # shellcheck disable=SC2046
    .venv/bin/python -m pip install --quiet --disable-pip-version-check $(torch_index) -c launch/constraints.txt -e '.[test]'
    echo "$wanted" > .venv/.appa-lite
fi
export PATH="$PWD/.venv/bin:$PATH"
