"""Who may use the server: this machine, or who has the token. It also adds the headers that protect the page."""

import hmac
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, RedirectResponse, Response

COOKIE = "sail-token"
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class Guard:
    """An ASGI application in front of another one.

    Without a token, only requests to this machine's own names are answered, so that no page of the web can read the
    server under another name (DNS rebinding). Pages of other origins cannot send anything.

    Args:
        app: The application.
        token: What clients have to know; "" if the server listens on the loopback interface only.
    """

    def __init__(self, app: Any, token: str):
        self._app, self._token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        refused = self._refusal(scope)
        await (refused or self._app)(scope, receive, send_guarded)

    def _refusal(self, scope: Any) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._token and _name_of(f"//{host}") not in LOOPBACK:
            return PlainTextResponse("Use http://127.0.0.1 to reach this server.", 421)
        origin = headers.get("origin", "")
        if scope["method"] not in ("GET", "HEAD") and origin and origin.partition("://")[2] != host:
            return PlainTextResponse("Requests of other origins are refused.", 403)
        return self._check_token(scope, headers) if self._token else None

    def _check_token(self, scope: Any, headers: Headers) -> Response | None:
        """Return a refusal, None for a request with the token, or a redirect that moves it from the URL to a cookie."""
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if self._is_token(query.pop("token", [""])[-1]):
            rest = urlencode(query, doseq=True)
            response = RedirectResponse("/" + scope["path"].lstrip("/") + (f"?{rest}" if rest else ""), 303)
            response.set_cookie(COOKIE, self._token, httponly=True, samesite="lax")
            return response
        cookie = SimpleCookie()
        try:
            cookie.load(headers.get("cookie", ""))
        except CookieError:
            cookie.clear()
        found = cookie[COOKIE].value if COOKIE in cookie else ""
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_token(found) or self._is_token(bearer):
            return None
        return PlainTextResponse("Open the address with the token that `sail-align serve` printed.", 401)

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())


def _name_of(url: str) -> str:
    """Return the name of the host in a URL; "" if it is invalid."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
