"""What runs in Celery: definitions, the driver, Celery steps, publishing, chores. Knows the store, never the worker."""
