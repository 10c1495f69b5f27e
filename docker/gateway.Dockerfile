# The gateway: HTTP, SQL and notifications through Redis. No torch.
FROM python:3.11-slim
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
# pg_dump and pg_restore, for backups.
RUN apt-get update && apt-get install -y --no-install-recommends postgresql-client && rm -rf /var/lib/apt/lists/*
WORKDIR /app
# Dependencies first: code changes do not install them again.
COPY pyproject.toml constraints.txt README.md docker/gateway.loc[k] ./
COPY tunesmith/__init__.py tunesmith/__init__.py
# `make pin` makes the lock.
RUN if [ -f gateway.lock ]; then pip install --require-hashes --no-deps -r gateway.lock && pip install --no-deps .; \
    else pip install -c constraints.txt '.[gateway]'; fi
COPY shared shared
COPY services/__init__.py services/__init__.py
COPY services/gateway services/gateway
RUN useradd --create-home --uid 10001 tunesmith && mkdir /data /artifacts && chown tunesmith /data /artifacts
USER tunesmith
ENV PYTHONPATH=/app TUNESMITH_HOME=/data
CMD ["python", "-m", "services.gateway"]
