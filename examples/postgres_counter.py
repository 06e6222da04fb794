"""The counter for many hosts: its sessions are in PostgreSQL, in a table made on first use.

    pip install 'psycopg[binary,pool]'
    DATABASE_URL=postgresql://me@127.0.0.1/mine python3 -m examples.postgres_counter

    curl -c jar -b jar http://127.0.0.1:8000/       Visits: 1 (process 4711)

Start it on as many hosts as you like, behind any load balancer: they need the same DATABASE_URL and
SECRET, and clocks that agree (NTP).
"""

import os

import psycopg_pool

from examples import serve
from examples.counter import ICounter
from minisess import ISession, PostgresStore, SessionMiddleware

# A store keeps classes by name, so ICounter's Counter lives in a module that all processes can import.


def app(environ, start_response):
    counter = ICounter(ISession(environ))
    counter.hits += 1
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [f"Visits: {counter.hits} (process {os.getpid()})\n".encode()]


# A pool opens its connections in threads, which a server that forks after importing this would lose:
# then open it in the worker (gunicorn's post_fork).
pool = psycopg_pool.ConnectionPool(os.environ.get("DATABASE_URL", ""), min_size=1, max_size=4, open=True)
store = PostgresStore(
    pool.connection, secret=os.environ.get("SECRET", "not a secret, since everybody can read it here")
)
application = SessionMiddleware(app, store)

if __name__ == "__main__":
    serve(application)
    pool.close()
