"""Small programs to read and run, from a checkout: ``python3 -m examples.NAME [port]``."""

import sys
from socketserver import ThreadingMixIn
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIServer, make_server


class ThreadingServer(ThreadingMixIn, WSGIServer):
    """wsgiref's server, a thread for each connection: browsers open some that they leave idle."""

    daemon_threads = True


def read_form(environ):
    """The fields of a posted form, the first value of each; of a large one the beginning."""
    length = environ.get("CONTENT_LENGTH", "")
    body = environ["wsgi.input"].read(min(int(length), 10_000) if length.isdecimal() else 0)
    return {name: values[0] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}


def serve(application):
    """Serve *application* on the port given on the command line, 8000 if there is none, until Ctrl-C."""
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    with make_server("127.0.0.1", port, application, ThreadingServer) as server:
        try:
            print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            pass
