"""The schema's history, one file a version; ``celery_flows.store.schema`` applies it."""
