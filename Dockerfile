# celery-flows with Flower. Your own image: FROM celery-flows, and install your package into it.

FROM python:3.11-slim AS build
WORKDIR /source
RUN python -m venv /opt/celery-flows
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY _celery_flows_pytest.py ./
COPY celery_flows celery_flows
COPY store store
COPY tasks tasks
COPY worker worker
RUN /opt/celery-flows/bin/pip install --no-cache-dir --constraint constraints.txt ".[flower]"

FROM python:3.11-slim
COPY --from=build /opt/celery-flows /opt/celery-flows
ENV PATH=/opt/celery-flows/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --system --uid 10001 --no-create-home --home-dir /nonexistent flows && mkdir /code
USER flows
WORKDIR /code
STOPSIGNAL SIGTERM
CMD ["celery", "-A", "celery_flows.worker", "worker", "-E", "--loglevel=INFO"]
