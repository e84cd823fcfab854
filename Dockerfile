# Builds engines for the GPU it finds, and serves them: NVIDIA's Triton with its TensorRT backend, and ditforge.
#
#   docker build -t ditforge .
#   docker run --gpus all --shm-size 1g -p 127.0.0.1:8001:8001 -v /path/to/checkpoint:/checkpoint:ro -v ditforge-cache:/cache ditforge
#
# Engines are kept in the volume /cache: the second start builds nothing.
ARG TRITON=26.07
FROM nvcr.io/nvidia/tritonserver:${TRITON}-py3 AS build
# Its CPU build is much smaller: --build-arg TORCH="torch==2.13.0 --index-url URL", as pytorch.org/get-started shows.
ARG TORCH=torch==2.13.0
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# A plan is loaded only by the TensorRT that compiled it, so the Python package is that of the image (TRT_VERSION).
RUN PIP_NO_CACHE_DIR=1 scripts/install /opt/ditforge "tensorrt-cu13==${TRT_VERSION%%+*}"

FROM nvcr.io/nvidia/tritonserver:${TRITON}-py3
COPY --from=build /opt/ditforge /opt/ditforge
RUN useradd --create-home --uid 10001 ditforge && install --directory --owner=10001 --group=10001 /cache
ENV PATH=/opt/ditforge/bin:${PATH} XDG_CACHE_HOME=/cache PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/ditforge
VOLUME /cache
EXPOSE 8001
# Connecting asks whether each model is ready.
HEALTHCHECK --interval=10s --start-period=1h CMD ["python", "-c", "from ditforge.client import Client; Client('localhost:8001', connect_timeout=5).close()"]
ENTRYPOINT ["ditforge"]
# Inside the container, all addresses are the container's; -p says who reaches it from outside. See docs/security.md.
CMD ["up", "/checkpoint", "--gpu", "local", "--host", "0.0.0.0", "--insecure"]
