# A server on a GPU:
#   docker build -f launch/serve.Dockerfile -t janusflow .
#   docker run --gpus 1 -p 8000:8000 -e JANUSFLOW_API_KEY=SECRET -v "$PWD/models:/models:ro" \
#       -v janusflow-cache:/cache janusflow --model /models/janusflow
# For CPUs or TPUs: --build-arg EXTRAS=serve or serve,tpu.
FROM python:3.12-slim
ARG EXTRAS=serve,cuda
WORKDIR /janusflow
COPY pyproject.toml README.md LICENSE ./
COPY janusflow_jax janusflow_jax
RUN pip install --no-cache-dir -e ".[$EXTRAS]"
RUN useradd --create-home --uid 1000 janusflow && mkdir /cache && chown janusflow /cache
USER janusflow
ENV JANUSFLOW_COMPILATION_CACHE=/cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=20m CMD ["python", "-c", \
  "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["python", "-m", "janusflow_jax.serve", "--host", "0.0.0.0"]
