# One image for the server and its clients; compose.yaml says how each is started.
FROM python:3.11-slim
WORKDIR /app
COPY requirements.txt ./
# PyTorch from PyPI brings gigabytes of CUDA; with the address of its CPU builds here, pip takes those instead.
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir --requirement requirements.txt
COPY LICENSE ./
COPY pyproject.toml ./
COPY *.py ./
COPY federation federation/
RUN useradd --create-home --uid 1000 federation && install --directory --owner federation audit data runs
USER federation
ENTRYPOINT ["python"]
CMD ["server.py", "--help"]
