# The image that launch.cluster's gke runs. For TPUs, and with --build-arg=EXTRA=cuda for GPUs:
#
#     docker build --tag=IMAGE . && docker push IMAGE
FROM python:3.11-slim
ARG EXTRA=tpu
WORKDIR /retro-jax
COPY setup.py pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir retro_jax data_pipelines launch \
    && pip install --no-cache-dir --constraint constraints.txt --editable ".[data,gcs,${EXTRA}]"
COPY . .
ENV PYTHONUNBUFFERED=1
STOPSIGNAL SIGTERM
