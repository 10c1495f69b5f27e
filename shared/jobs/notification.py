"""HOP 1: notifications from gateway to trainer. A Celery message without content; the SQL row is the truth.

Celery on Redis alone loses and doubles jobs of hours (visibility timeout, early acks, BRPOP). So a notification only
says "look into the database": it may be lost, doubled or late, and nothing is lost with it. JSON only, acknowledged
before the work, no result backend.
"""

from celery import Celery
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError

from shared.logs import get_logger

QUEUE = "tunesmith"
# The name on the wire, which gateways and workers of different versions share.
NOTIFY = "tunesmith.ring"
SOCKET_TIMEOUT_SECONDS = 5


def celery_app(redis_url: str) -> Celery:
    """The Celery application on both ends of the queue."""
    app = Celery("tunesmith", broker=redis_url)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        result_accept_content=["json"],
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_acks_late=False,
        task_default_queue=QUEUE,
        worker_hijack_root_logger=False,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_concurrency=1,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        # A replacement child imports torch; at the default of 4 s it would be killed for ever.
        worker_proc_alive_timeout=120,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "socket_connect_timeout": SOCKET_TIMEOUT_SECONDS,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
    )
    return app


class NotificationQueue:
    """The gateway's end: sends notifications, and counts those that no worker has taken."""

    def __init__(self, redis_url: str) -> None:
        self._app = celery_app(redis_url)
        # A sender stops trying soon, whether Redis refuses or is silent; a worker waits for it as long as it takes.
        self._app.conf.broker_transport_options |= {
            "socket_timeout": SOCKET_TIMEOUT_SECONDS,
            "max_retries": 1,
            "interval_start": 0,
        }
        self._redis = Redis.from_url(
            redis_url, socket_timeout=SOCKET_TIMEOUT_SECONDS, socket_connect_timeout=SOCKET_TIMEOUT_SECONDS
        )
        self._log = get_logger("notifications")

    def notify(self) -> bool:
        """Wake one worker. False if Redis is away: the reaper notifies again until the job is claimed."""
        try:
            self._app.send_task(NOTIFY, queue=QUEUE, ignore_result=True, retry=False)
        except (OperationalError, RedisError, OSError) as error:
            self._log.warning("notification not sent", error=str(error))
            return False
        return True

    def pending(self) -> int | None:
        """Notifications that wait in Redis; None if Redis is away."""
        try:
            return int(self._redis.llen(QUEUE))
        except (RedisError, OSError):
            return None

    def close(self) -> None:
        self._redis.close()
        self._app.close()
