# The base may be any image with Python 3.10 or newer. With CUDA and torch already installed:
#   docker build --build-arg BASE=pytorch/pytorch:latest -t vit-distillation .
ARG BASE=python:3.12-slim
FROM ${BASE}
WORKDIR /opt/vit-distillation
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
ENTRYPOINT ["torchrun"]
CMD ["--standalone", "--nproc_per_node=1", "main.py", "--distillation-type", "hard"]
