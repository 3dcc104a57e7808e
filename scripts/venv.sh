# make_venv DIR EXTRAS: a virtual environment with this package in it, at the tested versions (constraints.txt).
# PYTHON chooses the interpreter. What is there and up to date is taken up.
make_venv() {
    local dir=$1 extras=$2 python=${PYTHON:-python3}
    local stamp="$dir/.installed" state
    state=$(cat pyproject.toml constraints.txt && echo "$extras" && "$python" --version)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
        echo "taking up $dir: it is installed already" >&2
        return
    fi
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' || {
        echo "error: litlora needs Python 3.10 or later, $python is $("$python" --version)" >&2
        exit 2
    }
    echo "installing into $dir (the first time takes minutes: torch)" >&2
    "$python" -m venv "$dir"
    "$dir/bin/python" -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e ".$extras"
    echo "$state" >"$stamp"
}
