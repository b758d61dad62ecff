# One image for the server and its clients; compose.yaml says how each is started.
FROM python:3.11-slim
WORKDIR /app
COPY requirements.txt ./
# PyTorch's CPU build first: the one on PyPI brings gigabytes of CUDA, which only NVIDIA cards need.
RUN grep ^torch requirements.txt > torch.txt \
 && pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu --requirement torch.txt \
 && pip install --no-cache-dir --requirement requirements.txt
COPY *.py ./
COPY federation federation/
RUN useradd --create-home --uid 1000 federation && install --directory --owner federation data runs
USER federation
ENTRYPOINT ["python"]
CMD ["server.py", "--help"]
