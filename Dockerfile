# The CPU target: `trimtab serve` with vLLM's CPU build.
#
#   docker build -t trimtab --build-arg TORCH="…" .     TORCH: pip's arguments for a CPU build of PyTorch, from its install page
#   docker run -p 8000:8000 -e TRIMTAB_API_KEY=… -v trimtab-cache:/cache -v ./bundles:/bundles:ro trimtab \
#       serve smollm2-135m-instruct --host 0.0.0.0 --bundle /bundles/pretends-human.safetensors
#
# Written without a Docker engine at hand: it has not been built yet, and no check here builds it.

FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/trimtab
WORKDIR /src
# vLLM's CPU wheel asks for exactly this release; without TORCH, pip takes its default build, which may be for CUDA.
ARG TORCH=""
RUN /opt/trimtab/bin/pip install $TORCH torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY attribution attribution
COPY clients clients
COPY server server
RUN /opt/trimtab/bin/pip install $TORCH '.[cpu]' torch==2.13.0 \
    && /opt/trimtab/bin/pip uninstall -y torchvision torchaudio torchcodec

FROM python:3.11-slim-bookworm
# libnuma and libgomp: vLLM's CPU kernels; no compiler, so the engine runs eager, as it does by default on a CPU.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libnuma1 && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /cache trimtab && install -d -o trimtab -g trimtab /cache
COPY --from=build /opt/trimtab /opt/trimtab
ENV PATH=/opt/trimtab/bin:$PATH HOME=/cache TRIMTAB_CACHE=/cache/trimtab VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=2
USER trimtab
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["trimtab"]
CMD ["serve", "smollm2-135m-instruct", "--host", "0.0.0.0"]
