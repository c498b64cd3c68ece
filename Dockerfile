# The app in a container, for a CPU:
#   docker build -t warm_diffusion .
# for NVIDIA GPUs (JAX's packages bring CUDA; the machine needs the driver and the container toolkit):
#   docker build -t warm_diffusion --build-arg EXTRAS=app,cuda .
# for TPUs on GKE, with workdirs on Google Cloud Storage (CUDA: EXTRAS=app,cuda,gcs):
#   docker build -t warm_diffusion --build-arg EXTRAS=app,tpu,gcs .
# Flags are main.py's; for GPUs add --gpus=all:
#   mkdir -p runs
#   docker run --rm --user "$(id -u)" -v "$PWD/runs:/app/runs" warm_diffusion \
#     --mode=sample --checkpoint=pretrained/cifar10_16 --workdir=runs/first
FROM python:3.12-slim

ARG EXTRAS=app
# Any user can run it: caches go where all can write.
ENV HOME=/tmp PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /app

# Libraries first: a change of the code installs none of them anew.
COPY pyproject.toml README.md LICENSE ./
COPY warm_diffusion/__init__.py warm_diffusion/
# hadolint ignore=DL3013
RUN pip install ".[${EXTRAS}]" && pip uninstall --yes warm-diffusion

COPY warm_diffusion warm_diffusion
COPY configs configs
COPY pretrained pretrained
COPY main.py ./
RUN pip install --no-deps . && mkdir --mode=777 runs
USER 1000
ENTRYPOINT ["python", "main.py"]
CMD ["--help"]
