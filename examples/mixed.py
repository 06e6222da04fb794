"""Two applications by two authors under one middleware: one cookie, one session, and they never meet.

python3 -m examples.mixed

curl -c jar -b jar http://127.0.0.1:8000/shop/tea       In your basket: tea
curl -c jar -b jar http://127.0.0.1:8000/quiz/yes       Answers so far: 1
curl -c jar -b jar http://127.0.0.1:8000/shop/milk      In your basket: tea, milk
curl -c jar -b jar http://127.0.0.1:8000/               <Session 3f0c9a11d2b7e645, stored, keeps IItems, IItems>
"""

from wsgiref.util import shift_path_info

from examples import serve
from minisess import Interface, ISession, Session, SessionMiddleware, implementer, registerAdapter


def text(start_response, body, status="200 OK"):
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{body}\n".encode()]


def make_shop():
    """The first author's application.  Her interface happens to have the same name as the other's."""

    class IItems(Interface):
        names: list

    @implementer(IItems)
    class Basket:
        def __init__(self, session):
            self.names = []

    registerAdapter(Basket, Session, IItems)

    def shop(environ, start_response):
        basket = IItems(ISession(environ))
        basket.names += filter(None, [shift_path_info(environ)])
        return text(start_response, "In your basket: " + ", ".join(basket.names))

    return shop


def make_quiz():
    """The second author's."""

    class IItems(Interface):
        def add(self, answer): ...

    class Answers(list):
        def add(self, answer):
            self.append(answer)

    implementer(IItems)(Answers)
    registerAdapter(lambda session: Answers(), Session, IItems)

    def quiz(environ, start_response):
        answers = IItems(ISession(environ))
        answers.add(shift_path_info(environ))
        return text(start_response, f"Answers so far: {len(answers)}")

    return quiz


MOUNTED = {"shop": make_shop(), "quiz": make_quiz()}


def front(environ, start_response):
    mounted = MOUNTED.get(shift_path_info(environ))
    return mounted(environ, start_response) if mounted else text(start_response, repr(ISession(environ)))


application = SessionMiddleware(front)

if __name__ == "__main__":
    serve(application)
