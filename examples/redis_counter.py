"""The counter for many hosts: its sessions are in Redis (or Valkey).

    pip install redis
    REDIS_URL=redis://127.0.0.1:6379/0 python3 -m examples.redis_counter

    curl -c jar -b jar http://127.0.0.1:8000/       Visits: 1 (process 4711)

Start it on as many hosts as you like, behind any load balancer: they need the same REDIS_URL and
SECRET, and clocks that agree (NTP).
"""

import os

import redis

from examples import serve
from examples.counter import ICounter
from minisess import ISession, RedisStore, SessionMiddleware

# A store keeps classes by name, so ICounter's Counter lives in a module that all processes can import.


def app(environ, start_response):
    counter = ICounter(ISession(environ))
    counter.hits += 1
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [f"Visits: {counter.hits} (process {os.getpid()})\n".encode()]


store = RedisStore(
    redis.Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")),
    secret=os.environ.get("SECRET", "not a secret, since everybody can read it here"),
)
application = SessionMiddleware(app, store)

if __name__ == "__main__":
    serve(application)
