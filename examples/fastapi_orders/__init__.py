"""Orders over HTTP: a flow is started, told and cancelled in the transaction of the request, without blocking the loop.

::

    export FLOW_STORE_URL=postgresql://localhost/orders CELERY_BROKER_URL=redis://localhost
    celery -A examples.fastapi_orders.orders flow migrate
    celery -A examples.fastapi_orders.orders worker --beat
    DATABASE_URL=postgresql+psycopg://localhost/orders uvicorn --factory examples.fastapi_orders.api:make_api
"""
