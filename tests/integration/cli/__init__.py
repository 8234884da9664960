"""``celery -A APP flow …``, as an operator types it: processes of their own, through Celery's own entry point."""
