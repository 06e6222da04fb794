"""A whole Django project in one file whose views have their session, under a server and in django.test.Client.

    python3 -m examples.django_sessions

`Sessions` is what a project of yours copies, and names in MIDDLEWARE; the rest is there to try it.
(Wrapping the application in wsgi.py does under a server, but django.test.Client passes wsgi.py by.)
It works without django.contrib.sessions; where the admin or django.contrib.auth need that, have both.

    curl -c jar -b jar http://127.0.0.1:8000/           Visits: 1, by nobody
    curl -c jar -b jar http://127.0.0.1:8000/           Visits: 2, by nobody
    curl -c jar -b jar http://127.0.0.1:8000/login      a form, and the cookie with its token
    token() { awk '/csrftoken/ {print $7}' jar; }
    post() { curl -i -c jar -b jar -d "csrfmiddlewaretoken=$(token)&$2" http://127.0.0.1:8000$1; }
    post /login 'name=alice&password=wonderland'        303, with a new session id
    curl -c jar -b jar http://127.0.0.1:8000/           Visits: 3, by alice
    curl -c jar -b jar http://127.0.0.1:8000/report     a stream, which notes on the session that it was read
    curl -c jar -b jar http://127.0.0.1:8000/           Visits: 4, by alice, who has read 1 report
    post /logout                                        303, and the cookie is deleted

A test logs in as a visitor does, or without the form, on the way that `STORE` offers to any program:

    client = django.test.Client()
    client.post("/login", {"name": "alice", "password": "wonderland"})
    assert client.get("/").content == b"Visits: 1, by alice\\n"

    session = STORE.create(1800, 43200)
    session.login("alice")
    STORE.save(session)
    client.cookies["sid"] = session.uid
"""

import secrets

from django.conf import settings
from django.contrib.auth.hashers import check_password, make_password
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse, HttpResponseRedirect, StreamingHttpResponse
from django.middleware.csrf import get_token
from django.urls import path
from django.utils.html import format_html
from django.views.decorators.http import require_POST

from examples import serve
from minisess import ISession, MemoryStore, SessionMiddleware

STORE = MemoryStore()


class Sessions:
    """For MIDDLEWARE: ``ISession(request)`` is the visitor's session.

    Under WSGI only.  ``partitioned=True`` wants Python 3.14: http.cookies didn't know that before.
    """

    def __init__(self, get_response):
        self.get_response = get_response
        self.middleware = SessionMiddleware(self.answer, STORE)

    def __call__(self, request):
        box, headers = [request], []

        def start_response(status, sent, exc_info=None):
            headers.extend(sent)
            return lambda data: None

        request.environ["sessions.box"] = box
        body = self.middleware(request.environ, start_response)
        response = box[0]
        for name, value in headers:
            if name == "Set-Cookie":
                response.cookies.load(value)  # where the test client looks for it
            else:
                response[name] = value
        if response.streaming:
            response.streaming_content = body
        return response

    def answer(self, environ, start_response):
        """What stands further in, as a WSGI application.  Its headers leave before its body begins."""
        box = environ.pop("sessions.box")
        response = box[0] = self.get_response(box[0])
        headers = [(name, response[name]) for name in ("Vary", "Cache-Control") if name in response]
        write = start_response(f"{response.status_code} {response.reason_phrase}", headers)
        write(b"")
        return iter(response) if response.streaming else []


# The project
# ---------------------------------------------------------------------------

settings.configure(
    ROOT_URLCONF=__name__,
    MIDDLEWARE=[f"{__name__}.Sessions", "django.middleware.csrf.CsrfViewMiddleware"],
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    PASSWORD_HASHERS=["django.contrib.auth.hashers.ScryptPasswordHasher"],
    SECRET_KEY=secrets.token_hex(),
)
USERS = {"alice": make_password("wonderland"), "bob": make_password("builder")}


def index(request):
    session = ISession(request)
    session.visits = getattr(session, "visits", 0) + 1
    reports = getattr(session, "reports", 0)
    read = f", who has read {reports} report{'s' * (reports != 1)}" if reports else ""
    return HttpResponse(f"Visits: {session.visits}, by {session.owner or 'nobody'}{read}\n", content_type="text/plain")


def log_in(request):
    problem = ""
    if request.method == "POST":
        name = request.POST.get("name", "")
        if check_password(request.POST.get("password", ""), USERS.get(name, "!")):
            ISession(request).login(name)
            return HttpResponseRedirect("/", status=303)
        problem = "Wrong name or password."
    form = """<!doctype html><title>Log in</title><p>{}<form method=post>
<input type=hidden name=csrfmiddlewaretoken value="{}">
<label>Name <input name=name></label> <label>Password <input name=password type=password></label>
<button>Log in</button></form>
"""
    return HttpResponse(format_html(form, problem, get_token(request)), status=403 if problem else 200)


@require_POST
def log_out(request):
    ISession(request).expire()
    return HttpResponseRedirect("/", status=303)


def report(request):
    session = ISession(request)
    if session.owner is None:
        return HttpResponseRedirect("/login", status=303)

    def lines():  # The headers have left, and the session's next request may run beside this.
        for number in range(1, 4):
            yield f"line {number} for {session.owner}\n"
        session.reports = getattr(session, "reports", 0) + 1

    return StreamingHttpResponse(lines(), content_type="text/plain")


urlpatterns = [path("", index), path("login", log_in), path("logout", log_out), path("report", report)]
application = get_wsgi_application()

if __name__ == "__main__":
    serve(application)
