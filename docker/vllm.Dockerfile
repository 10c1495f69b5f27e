# vLLM, whose versions of transformers and fastapi are not this project's: its own image, and one file of ours.
FROM vllm/vllm-openai:v0.32.0
WORKDIR /app
COPY services/inference/vllm_server.py ./
RUN useradd --create-home --uid 10001 tunesmith
USER tunesmith
ENV PYTHONUNBUFFERED=1 TUNESMITH_HOME=/data VLLM_CACHE_ROOT=/tmp/vllm
ENTRYPOINT []
CMD ["python3", "vllm_server.py"]
